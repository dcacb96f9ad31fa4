"""The strategies for ``lightning.pytorch``."""

from typing import final

from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from lightning_easgd.strategies.center_workers import CenterHooks
from lightning_easgd.strategies.downpour_workers import DownpourWorkers
from lightning_easgd.strategies.elastic_workers import ElasticWorkers
from lightning_easgd.strategies.workers import LocalWorkers

__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy"]


@final
class _CenterCallback(CenterHooks, Callback):
    pass


@final
class LocalStrategy(LocalWorkers, DDPStrategy):  # noqa: D101
    __doc__ = LocalWorkers.__doc__


@final
class EASGDStrategy(ElasticWorkers, DDPStrategy):  # noqa: D101
    __doc__ = ElasticWorkers.__doc__
    _callback_class = _CenterCallback


@final
class DownpourStrategy(DownpourWorkers, DDPStrategy):  # noqa: D101
    __doc__ = DownpourWorkers.__doc__
    _callback_class = _CenterCallback
