"""Elastic Averaging SGD as a PyTorch Lightning strategy.

Importing this package registers the names ``easgd``, ``easgd_async``, ``eamsgd``, ``eamsgd_async``, ``downpour`` and
``mdownpour``, each also with ``_spawn``, ``_fork`` and ``_notebook``, for ``Trainer(strategy=...)`` and
``Fabric(strategy=...)``, whether Lightning is imported before or after it.

The classes here are those for ``lightning.pytorch``; :mod:`lightning_easgd.pl` has those for ``pytorch_lightning``, and
:mod:`lightning_easgd.fabric` those for ``lightning.fabric``.
"""

from typing import TYPE_CHECKING, Any

from lightning_easgd.import_hook import follow_imports

if TYPE_CHECKING:
    from lightning_easgd.strategies.fault_tolerance import FaultTolerance
    from lightning_easgd.strategies.trees.lightning_tree import (
        DownpourStrategy,
        EASGDModelParallelStrategy,
        EASGDStrategy,
        LocalStrategy,
    )

__version__ = "0.1.0"  # the one place: pyproject.toml reads it, and a test compares CITATION.cff and CHANGELOG.md
_CLASSES = ("DownpourStrategy", "EASGDModelParallelStrategy", "EASGDStrategy", "LocalStrategy")
__all__ = [
    "DownpourStrategy",
    "EASGDModelParallelStrategy",
    "EASGDStrategy",
    "FaultTolerance",
    "LocalStrategy",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Not imported above: who uses another class tree need not wait for lightning.pytorch.
    if name in _CLASSES:
        from lightning_easgd.strategies.trees import lightning_tree  # noqa: PLC0415

        return getattr(lightning_tree, name)
    if name == "FaultTolerance":
        from lightning_easgd.strategies.fault_tolerance import FaultTolerance  # noqa: PLC0415

        return FaultTolerance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


follow_imports()
