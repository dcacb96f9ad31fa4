"""How ranks that the Trainer's own launcher spawned or forked end, free of a class tree."""

import signal
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_easgd.strategies.workers import LocalWorkers

if TYPE_CHECKING:
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as _Base
else:
    _Base = object

__all__ = ["RankLauncher"]


class RankLauncher(_Base):
    """Ends a spawned or forked rank like a process of its own; Lightning handles errors in the parent alone.

    It is mixed into the ``_MultiProcessingLauncher`` of a class tree.
    """

    _sigterm_exception: ClassVar[type[SystemExit]]

    def _wrapping_function(self, *arguments: Any, **keywords: Any) -> None:
        try:
            super()._wrapping_function(*arguments, **keywords)
        except BaseException as error:
            if isinstance(self._strategy, LocalWorkers):
                self._strategy.end_rank(error)
            if isinstance(error, self._sigterm_exception) and not error.code:
                # With exit code 0 the parent would wait for a result for ever.
                raise SystemExit(128 + signal.SIGTERM) from error
            raise
