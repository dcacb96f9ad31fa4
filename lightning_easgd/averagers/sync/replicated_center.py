r"""The center of synchronous averaging: on every worker, and moved on all of them by the same sum."""

import zlib
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_easgd.method.rules import CenterRule, PlainRule
from lightning_easgd.tensors.checksums import checksum, sum_of_bits
from lightning_easgd.tensors.flat_tensors import FlatTensors

__all__ = ["ReplicatedCenter"]


@final
class ReplicatedCenter:
    r""":math:`\tilde x` and what else its rule keeps; bitwise the same on all workers when no exchange is under way.

    Args:
        values: The center's initial value; taken over as the first store.
        rule: How a difference moves it.

    Attributes:
        stores: The center, then what else the rule keeps; all of one layout.
        version: How many exchanges have moved it.
    """

    def __init__(self, values: FlatTensors, rule: CenterRule | None = None) -> None:
        self.rule = rule or PlainRule()
        stores = self.rule.initial_stores(values.flat)
        self.stores = [values]
        for store in stores[1:]:  # copied: a rule may begin a store with the center itself
            own = values.like()
            own.flat.copy_(store)
            self.stores.append(own)
        self.version = 0

    @classmethod
    def of_stores(cls, stores: Sequence[FlatTensors], rule: CenterRule) -> "ReplicatedCenter":
        """A center whose stores are these, taken over."""
        center = cls(stores[0], rule)
        center.stores = list(stores)
        return center

    @property
    def values(self) -> FlatTensors:
        r""":math:`\tilde x`."""
        return self.stores[0]

    @property
    def flat(self) -> Tensor:
        r""":math:`\tilde x` as one vector."""
        return self.values.flat

    @property
    def shown(self) -> FlatTensors:
        """The store that is the model."""
        return self.stores[self.rule.shown]

    def move_(self, part: slice, difference: Tensor, rate: float) -> None:
        """Move a part of the flat center by a difference, or a sum of differences, at a rate."""
        self.rule.move_([store.flat[part] for store in self.stores], difference, rate, self.version)

    def checksum(self) -> int:
        """A checksum of all stores, 0 ≤ checksum < 2^32."""
        return zlib.crc32(repr([checksum(store.flat) for store in self.stores]).encode())

    def sum_of_bits(self) -> int:
        """Another checksum, which costs next to nothing; numbers in another order may have the same."""
        return zlib.crc32(repr([sum_of_bits(store.flat) for store in self.stores]).encode())

    def end_exchange(self) -> None:
        """All parts have been moved by one exchange."""
        self.version += 1

    @torch.no_grad()
    def take_over(self, other: "ReplicatedCenter", origins: Sequence[int | None]) -> None:
        """Go on where a center of another layout was; views that it did not have begin as they are.

        Args:
            other: The center of before.
            origins: For each view the number of its view there; None for a new one.
        """
        self.version = other.version
        for store, before in zip(self.stores, other.stores, strict=True):
            views = before.views
            for view, origin in zip(store.views, origins, strict=True):
                if origin is not None:
                    view.copy_(views[origin])

    def state_dict(self) -> dict[str, Any]:
        """The flat stores, and the version."""
        return {"stores": [store.flat for store in self.stores], "version": self.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; stores that it does not have stay."""
        for store, saved in zip(self.stores, state["stores"], strict=False):
            store.flat.copy_(saved)
        self.version = state["version"]
