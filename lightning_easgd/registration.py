"""The names under which ``Trainer(strategy=...)`` finds the strategies."""

from collections.abc import Mapping
from typing import Any

__all__ = ["register"]

_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {"easgd": {}, "eamsgd": {"momentum": 0.9}}


def register(registry: Any, strategy: type) -> None:
    """Register every name of this package in one of Lightning's registries.

    Args:
        registry: The ``StrategyRegistry`` of a class tree.
        strategy: The EASGD strategy of the same class tree.
    """
    for name, arguments in _ARGUMENTS.items():
        for suffix, start_method in _START_METHODS.items():
            registry.register(
                name + suffix,
                strategy,
                description=f"{name.upper()} with `start_method` '{start_method}'",
                override=True,
                start_method=start_method,
                **arguments,
            )
