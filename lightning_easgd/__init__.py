"""Elastic Averaging SGD as a PyTorch Lightning strategy.

Importing this package registers the names ``easgd`` and ``eamsgd``, each also with ``_spawn``, ``_fork`` and
``_notebook``, for ``Trainer(strategy=...)``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_easgd.registration import register
from lightning_easgd.strategies import EASGDStrategy, LocalStrategy

__version__ = "0.1.0"
__all__ = ["EASGDStrategy", "LocalStrategy", "__version__"]

register(StrategyRegistry, EASGDStrategy)
