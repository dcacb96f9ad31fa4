"""The strategies for each of Lightning's class trees."""

from lightning_easgd.strategies.lightning_tree import DownpourStrategy, EASGDStrategy, LocalStrategy
from lightning_easgd.strategies.post_local_sgd import PostLocalSGDStrategy

__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy", "PostLocalSGDStrategy"]
