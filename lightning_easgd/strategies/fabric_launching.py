"""How a rank that Fabric's own launcher spawned or forked fails, free of a class tree."""

from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from lightning.fabric.strategies.launchers import _MultiProcessingLauncher as _Base
else:
    _Base = object

__all__ = ["FabricLauncher"]


class FabricLauncher(_Base):
    """Lets a rank tell the others why it fails: its own error may be one that nobody sees.

    The parent shows that of the first process that it finds ended, of several the one of the smallest rank. It is mixed
    into the ``_MultiProcessingLauncher`` of a class tree.
    """

    @override
    def _wrapping_function(self, *arguments: Any, **keywords: Any) -> None:
        try:
            super()._wrapping_function(*arguments, **keywords)
        except BaseException as error:
            self._strategy.tell_failure(error)  # type: ignore[attr-defined]  # it is a FabricStrategy
            raise
