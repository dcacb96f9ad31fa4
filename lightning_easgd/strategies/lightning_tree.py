"""The strategies for ``lightning.pytorch``."""

from typing import final

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_easgd.registration import register
from lightning_easgd.strategies.center_hooks import CenterHooks
from lightning_easgd.strategies.downpour_workers import DownpourWorkers
from lightning_easgd.strategies.elastic_workers import ElasticWorkers
from lightning_easgd.strategies.launching import RankLauncher
from lightning_easgd.strategies.trainer_workers import TrainerWorkers
from lightning_easgd.strategies.workers import LocalWorkers

__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy"]


@final
class _CenterCallback(CenterHooks, Callback):
    pass


@final
class _Launcher(RankLauncher, _MultiProcessingLauncher):
    _sigterm_exception = SIGTERMException


@final
class LocalStrategy(LocalWorkers, DDPStrategy):  # noqa: D101
    __doc__ = LocalWorkers.__doc__
    _launcher_class = _Launcher


class _CenterStrategy(TrainerWorkers, DDPStrategy):
    _callback_class = _CenterCallback
    _launcher_class = _Launcher
    _stop_exception = SIGTERMException


@final
class EASGDStrategy(ElasticWorkers, _CenterStrategy):  # noqa: D101
    __doc__ = ElasticWorkers.__doc__


@final
class DownpourStrategy(DownpourWorkers, _CenterStrategy):  # noqa: D101
    __doc__ = DownpourWorkers.__doc__


register(StrategyRegistry, EASGDStrategy, DownpourStrategy)
