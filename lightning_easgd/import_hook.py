"""Registers the names in each of Lightning's class trees, whether it is imported before or after this package."""

import contextlib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, final

from typing_extensions import override

__all__ = ["follow_imports"]

# Package of a class tree: our module for it, which registers the names when it is imported.
_TREES = {
    "lightning.pytorch": "lightning_easgd.strategies.trees.lightning_tree",
    "pytorch_lightning": "lightning_easgd.strategies.trees.pytorch_lightning_tree",
    "lightning.fabric": "lightning_easgd.strategies.trees.fabric_tree",
    "lightning_fabric": "lightning_easgd.strategies.trees.lightning_fabric_tree",
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
    """Waits for one tree to be executed, registers, and is gone.

    Who only asks where the tree is (``importlib.util.find_spec``, ``pkgutil``) gets an answer, any number of times.
    """

    def __init__(self, tree: str) -> None:
        self.tree = tree

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.tree:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._follow(spec.loader)
                return spec
        return None

    def _follow(self, loader: Any) -> None:
        execute = getattr(loader, "exec_module", None)
        if execute is None:  # of a package without an __init__
            return

        def exec_module(module: ModuleType) -> None:
            execute(module)  # where it raises, it may be tried again
            if module.__name__ == self.tree:  # a loader may be that of a whole archive
                vars(loader).pop("exec_module", None)
                self._register()

        with contextlib.suppress(AttributeError):  # of a loader that is closed to us the user's import still works
            loader.exec_module = exec_module

    def _register(self) -> None:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        _register(self.tree)
