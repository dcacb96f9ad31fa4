"""The strategies for Fabric of ``lightning_fabric``."""

from typing import final

from lightning_fabric.strategies import STRATEGY_REGISTRY
from lightning_fabric.strategies.ddp import DDPStrategy

from lightning_easgd.registration import register
from lightning_easgd.strategies.downpour_workers import DownpourWorkers
from lightning_easgd.strategies.elastic_workers import ElasticWorkers
from lightning_easgd.strategies.fabric_workers import FabricCenterWorkers, FabricWorkers

__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy"]


@final
class LocalStrategy(FabricWorkers, DDPStrategy):  # noqa: D101
    __doc__ = FabricWorkers.__doc__


@final
class EASGDStrategy(ElasticWorkers, FabricCenterWorkers, DDPStrategy):  # noqa: D101
    __doc__ = ElasticWorkers.__doc__


@final
class DownpourStrategy(DownpourWorkers, FabricCenterWorkers, DDPStrategy):  # noqa: D101
    __doc__ = DownpourWorkers.__doc__


register(STRATEGY_REGISTRY, EASGDStrategy, DownpourStrategy)
