"""Lightning's class trees: which of them a class belongs to. Nothing of Lightning is imported to find out."""

from typing import Any

__all__ = ["check_tree", "describe", "tree_of"]

_STRATEGIES = {
    "lightning.pytorch": "lightning_easgd.{}",
    "pytorch_lightning": "lightning_easgd.pl.{}",
    "lightning.fabric": "lightning_easgd.fabric.{}",
    "lightning_fabric": "lightning_easgd.strategies.trees.lightning_fabric_tree.{}",
}


def tree_of(cls: type) -> str | None:
    """The package of the class tree that a class belongs to, None if it belongs to none.

    The nearest base class counts: a Trainer's accelerators are also subclasses of Fabric's.
    """
    for base in cls.__mro__:
        package = ".".join(base.__module__.split(".")[:2])
        for tree in _STRATEGIES:
            if tree in (package, package.split(".")[0]):
                return tree
    return None


def describe(strategy: object) -> str:
    """A strategy by the name that users give it, and for whom it is."""
    cls = type(strategy)
    tree = tree_of(cls)
    name = cls.__name__ if tree is None else _STRATEGIES[tree].format(cls.__name__)
    return f"<{name}, a strategy for {tree}>"


def check_tree(strategy: Any) -> None:
    """Raise if a strategy was given to the Trainer or Fabric of another class tree.

    Lightning itself refuses an instance of another tree, but takes what its registry gives: the ranks would then
    train on all data each, without a word.

    Raises:
        TypeError: If the accelerator, which the Trainer or Fabric has just set, is of another tree.
    """
    cls = type(strategy)
    own = tree_of(cls)
    accelerator = strategy.accelerator
    theirs = own if accelerator is None else tree_of(type(accelerator))
    if theirs is not None and own is not None and theirs != own:
        raise TypeError(
            f"{cls.__name__} is a strategy for {own} and was given to {theirs}; use"
            f" {_STRATEGIES[theirs].format(cls.__name__)}."
        )
