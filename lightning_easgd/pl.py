"""The strategies for the package ``pytorch_lightning``; its Trainer refuses those of ``lightning.pytorch``."""

from lightning_easgd.strategies.trees.pytorch_lightning_tree import (
    DownpourStrategy,
    EASGDModelParallelStrategy,
    EASGDStrategy,
    LocalStrategy,
)

__all__ = ["DownpourStrategy", "EASGDModelParallelStrategy", "EASGDStrategy", "LocalStrategy"]
