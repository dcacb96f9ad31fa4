"""Registers the names in each of Lightning's class trees, whether it is imported before or after this package."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, final

from typing_extensions import override

__all__ = ["follow_imports"]

# Package of a class tree: our module for it, which registers the names when it is imported.
_TREES = {
    "lightning.pytorch": "lightning_easgd.strategies.lightning_tree",
    "pytorch_lightning": "lightning_easgd.strategies.pytorch_lightning_tree",
    "lightning.fabric": "lightning_easgd.strategies.fabric_tree",
    "lightning_fabric": "lightning_easgd.strategies.lightning_fabric_tree",
}


def follow_imports() -> None:
    """Register in every class tree that is imported, and in the others as soon as they are; none is imported here."""
    for tree in _TREES:
        if tree in sys.modules:
            _register(tree)
        elif not any(isinstance(finder, _AfterImport) and finder.tree == tree for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(tree))


def _register(tree: str) -> None:
    try:
        import_module(_TREES[tree])
    except ImportError as error:
        # A release of a tree that is not even used, perhaps: the user's import of it must not fail because of us.
        warnings.warn(
            f"lightning_easgd: the names 'easgd', ... are not registered in {tree}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )


@final
class _AfterImport(MetaPathFinder):
    """Waits for one tree to be imported, registers, and is gone."""

    def __init__(self, tree: str) -> None:
        self.tree = tree

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.tree:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
        else:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = execute
            try:
                execute(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # it may be tried again
                raise
            _register(self.tree)

        loader.exec_module = exec_module
