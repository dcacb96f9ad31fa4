"""The names under which ``Trainer(strategy=...)`` and ``Fabric(strategy=...)`` find the strategies."""

from collections.abc import Mapping
from typing import Any

__all__ = ["register"]

_START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
_EASGD: Mapping[str, Mapping[str, Any]] = {
    "easgd": {},
    "easgd_async": {"mode": "async"},
    "eamsgd": {"momentum": 0.9},
    "eamsgd_async": {"mode": "async", "momentum": 0.9},
    "local_sgd": {"alpha": 1.0, "beta": 1.0, "pull_to": "new"},
    # The values of its paper; the inner optimizer is the user's, AdamW there.
    "diloco": {
        "tau": 500, "alpha": 1.0, "beta": 0.7, "outer_momentum": 0.9, "outer_nesterov": True, "pull_to": "new"
    },
}  # fmt: skip
_DOWNPOUR: Mapping[str, Mapping[str, Any]] = {"downpour": {}, "mdownpour": {"momentum": 0.9}}


def register(registry: Any, easgd: type, downpour: type) -> None:
    """Register every name of this package in one of Lightning's registries.

    Args:
        registry: The registry of a class tree; each tree has its own.
        easgd: The EASGD strategy of the same class tree.
        downpour: The DOWNPOUR strategy of the same class tree.
    """
    for strategy, names in ((easgd, _EASGD), (downpour, _DOWNPOUR)):
        for name, arguments in names.items():
            for suffix, start_method in _START_METHODS.items():
                registry.register(
                    name + suffix,
                    strategy,
                    description=f"{name.upper()} with `start_method` '{start_method}'",
                    override=True,
                    start_method=start_method,
                    **arguments,
                )
