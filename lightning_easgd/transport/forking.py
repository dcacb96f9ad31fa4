"""Descriptors that a forked child must not keep.

A lock is given back, and a connection ends, only when the *last* copy of its descriptor is closed. A data loader's
worker that was forked from a rank would keep both alive after the rank's death, and every other rank would wait for it.
"""

import os
import weakref
from abc import ABC, abstractmethod

__all__ = ["ForkAware"]

_alive: "weakref.WeakSet[ForkAware]" = weakref.WeakSet()


class ForkAware(ABC):
    """Something that owns descriptors; a forked child drops its copies of them."""

    def __init__(self) -> None:
        _alive.add(self)

    @abstractmethod
    def abandon(self) -> None:
        """In a forked child: close the copied descriptors, and touch nothing that is shared with the parent."""


def _abandon_all() -> None:
    for owner in list(_alive):
        owner.abandon()


os.register_at_fork(after_in_child=_abandon_all)
