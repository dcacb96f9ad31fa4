"""The strategies for each of Lightning's class trees."""

from lightning_easgd.strategies.lightning_tree import DownpourStrategy, EASGDStrategy, LocalStrategy

__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy"]
