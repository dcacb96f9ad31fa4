"""The strategies for ``lightning.fabric.Fabric``."""

from lightning_easgd.strategies.fabric_tree import DownpourStrategy, EASGDStrategy, LocalStrategy

__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy"]
