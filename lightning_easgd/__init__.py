"""Elastic Averaging SGD as a PyTorch Lightning strategy.

Importing this package registers the names ``easgd``, ``easgd_async``, ``eamsgd``, ``eamsgd_async``, ``downpour`` and
``mdownpour``, each also with ``_spawn``, ``_fork`` and ``_notebook``, for ``Trainer(strategy=...)``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_easgd.registration import register
from lightning_easgd.strategies.lightning_tree import DownpourStrategy, EASGDStrategy, LocalStrategy

__version__ = "0.1.0"
__all__ = ["DownpourStrategy", "EASGDStrategy", "LocalStrategy", "__version__"]

register(StrategyRegistry, EASGDStrategy, DownpourStrategy)
