"""The strategies for ``pytorch_lightning``."""

from typing import final

from pytorch_lightning import Callback
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from pytorch_lightning.utilities.exceptions import SIGTERMException

from lightning_easgd.registration import register
from lightning_easgd.strategies.downpour_family import DownpourMethod
from lightning_easgd.strategies.easgd import EASGDMethod
from lightning_easgd.strategies.local import LocalMethod
from lightning_easgd.strategies.trainer.hooks import CenterHooks
from lightning_easgd.strategies.trainer.launching import RankLauncher
from lightning_easgd.strategies.trainer.model_parallel import model_parallel_strategy
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy, TrainerTree

__all__ = ["DownpourStrategy", "EASGDModelParallelStrategy", "EASGDStrategy", "LocalStrategy"]


@final
class _CenterCallback(CenterHooks, Callback):
    pass


@final
class _Launcher(RankLauncher, _MultiProcessingLauncher):
    _sigterm_exception = SIGTERMException


_TREE = TrainerTree(_CenterCallback, _Launcher, SIGTERMException)


@final
class LocalStrategy(LocalMethod, TrainerStrategy, DDPStrategy):  # noqa: D101
    __doc__ = LocalMethod.__doc__
    tree = _TREE


@final
class EASGDStrategy(EASGDMethod, TrainerStrategy, DDPStrategy):  # noqa: D101
    __doc__ = EASGDMethod.__doc__
    tree = _TREE


@final
class DownpourStrategy(DownpourMethod, TrainerStrategy, DDPStrategy):  # noqa: D101
    __doc__ = DownpourMethod.__doc__
    tree = _TREE


EASGDModelParallelStrategy = model_parallel_strategy(ModelParallelStrategy, _TREE)
EASGDModelParallelStrategy.__module__ = __name__

register(StrategyRegistry, EASGDStrategy, DownpourStrategy)
StrategyRegistry.register(
    "easgd_model_parallel",
    EASGDModelParallelStrategy,
    description="EASGD whose workers are sharded over the devices of a node",
    override=True,
)
