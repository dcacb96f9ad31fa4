"""The strategies for ``lightning.pytorch``."""

import signal
from typing import Any, final

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_easgd.strategies.center_workers import CenterHooks
from lightning_easgd.strategies.downpour_workers import DownpourWorkers
from lightning_easgd.strategies.elastic_workers import ElasticWorkers
from lightning_easgd.strategies.workers import LocalWorkers

__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy"]


@final
class _CenterCallback(CenterHooks, Callback):
    pass


@final
class _Launcher(_MultiProcessingLauncher):
    """Ends a spawned or forked rank like a process of its own; Lightning handles errors in the parent alone."""

    @override
    def _wrapping_function(self, *arguments: Any, **keywords: Any) -> None:
        try:
            super()._wrapping_function(*arguments, **keywords)
        except BaseException as error:
            if isinstance(self._strategy, LocalWorkers):
                self._strategy.end_rank(error)
            if isinstance(error, SIGTERMException) and not error.code:
                # With exit code 0 the parent would wait for a result for ever.
                raise SystemExit(128 + signal.SIGTERM) from error
            raise


@final
class LocalStrategy(LocalWorkers, DDPStrategy):  # noqa: D101
    __doc__ = LocalWorkers.__doc__
    _launcher_class = _Launcher


@final
class EASGDStrategy(ElasticWorkers, DDPStrategy):  # noqa: D101
    __doc__ = ElasticWorkers.__doc__
    _callback_class = _CenterCallback
    _launcher_class = _Launcher
    _stop_exception = SIGTERMException


@final
class DownpourStrategy(DownpourWorkers, DDPStrategy):  # noqa: D101
    __doc__ = DownpourWorkers.__doc__
    _callback_class = _CenterCallback
    _launcher_class = _Launcher
    _stop_exception = SIGTERMException
