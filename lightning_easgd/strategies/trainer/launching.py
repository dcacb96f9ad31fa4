"""How ranks that the Trainer's own launcher spawned or forked end, free of a class tree."""

import dataclasses
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from lightning_easgd.averagers import Statistics
from lightning_easgd.strategies.center_method import CenterMethod
from lightning_easgd.strategies.trainer.lightning_private import is_tuning
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy

if TYPE_CHECKING:
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher as _Base
else:
    _Base = object

__all__ = ["RankLauncher"]


_KEY = "easgd_communication"


class RankLauncher(_Base):
    """Ends a spawned or forked rank like a process of its own; Lightning handles errors in the parent alone.

    The parent gets what rank 0 has spent on communication. It is mixed into the
    ``_MultiProcessingLauncher`` of a class tree.
    """

    _sigterm_exception: ClassVar[type[SystemExit]]

    @override
    def launch(self, function: Callable[..., Any], *arguments: Any, trainer: Any = None, **keywords: Any) -> Any:
        if isinstance(self._strategy, CenterMethod) and trainer is not None and trainer.state.fn == "fit":
            self._strategy.take_launched(None)  # of an earlier fit
            if self._strategy.elastic is not None and not is_tuning(trainer):
                self._strategy.elastic.count_launch()
        return super().launch(function, *arguments, trainer=trainer, **keywords)

    @override
    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        extra = super().get_extra_results(trainer)
        strategy = self._strategy
        if isinstance(strategy, CenterMethod) and trainer.state.fn == "fit" and not strategy.only_launches:
            extra[_KEY] = dataclasses.asdict(strategy.communication)
        return extra

    @override
    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        if isinstance(self._strategy, CenterMethod) and _KEY in extra:
            self._strategy.take_launched(Statistics(**extra[_KEY]))
        super().update_main_process_results(trainer, extra)

    def _wrapping_function(self, *arguments: Any, **keywords: Any) -> None:
        try:
            super()._wrapping_function(*arguments, **keywords)
        except BaseException as error:
            if isinstance(self._strategy, TrainerStrategy):
                self._strategy.end_rank(error)
            if isinstance(error, self._sigterm_exception) and not error.code:
                # With exit code 0 the parent would wait for a result for ever.
                raise SystemExit(128 + signal.SIGTERM) from error
            raise
