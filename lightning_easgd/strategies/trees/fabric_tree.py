"""The strategies for Fabric of ``lightning.fabric``."""

from typing import final

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

from lightning_easgd.registration import register
from lightning_easgd.strategies.downpour_family import DownpourMethod
from lightning_easgd.strategies.easgd import EASGDMethod
from lightning_easgd.strategies.fabric_launching import FabricLauncher
from lightning_easgd.strategies.fabric_model_parallel import fabric_model_parallel_strategy
from lightning_easgd.strategies.fabric_strategy import FabricStrategy
from lightning_easgd.strategies.local import LocalMethod

__all__ = ["DownpourStrategy", "EASGDModelParallelStrategy", "EASGDStrategy", "LocalStrategy"]


@final
class _Launcher(FabricLauncher, _MultiProcessingLauncher):
    pass


@final
class LocalStrategy(LocalMethod, FabricStrategy, DDPStrategy):  # noqa: D101
    __doc__ = LocalMethod.__doc__
    rank_launcher = _Launcher


@final
class EASGDStrategy(EASGDMethod, FabricStrategy, DDPStrategy):  # noqa: D101
    __doc__ = EASGDMethod.__doc__
    rank_launcher = _Launcher


@final
class DownpourStrategy(DownpourMethod, FabricStrategy, DDPStrategy):  # noqa: D101
    __doc__ = DownpourMethod.__doc__
    rank_launcher = _Launcher


EASGDModelParallelStrategy = fabric_model_parallel_strategy(ModelParallelStrategy)
EASGDModelParallelStrategy.__module__ = __name__

register(STRATEGY_REGISTRY, EASGDStrategy, DownpourStrategy)
