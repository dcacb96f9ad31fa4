"""Whether a worker's difference is finite, asked before it is sent; on a device without waiting for the answer."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.tensors.flat_tensors import all_finite
from lightning_easgd.transport.device_queue import SideQueue, make_queue

__all__ = ["DeviceFiniteness", "Finiteness", "HostFiniteness", "make_finiteness"]


class Finiteness(ABC):
    """What is known of the differences of one averager.

    Attributes:
        learns_late: Whether the answer on a difference comes after it has been sent.
    """

    learns_late: bool = False

    @abstractmethod
    def judge(self, difference: Tensor, norms: Sequence[Tensor]) -> bool:
        """Take in the next difference; False if a difference that is not finite is known of.

        Args:
            difference: A flat vector; where the answer comes later, one that is not finite is made zeros.
            norms: The norms of its parts.
        """

    @abstractmethod
    def known(self) -> bool:
        """Whether all differences so far were finite; it waits for the answer on the last."""

    @abstractmethod
    def forget(self) -> None:
        """The worker has started again: what its last difference was no longer counts."""


@final
class HostFiniteness(Finiteness):
    """On the host the answer is there at once."""

    @override
    def judge(self, difference: Tensor, norms: Sequence[Tensor]) -> bool:
        return all_finite([difference], norms)

    @override
    def known(self) -> bool:
        return True

    @override
    def forget(self) -> None:
        pass


@final
class DeviceFiniteness(Finiteness):
    """On a device the answer comes one exchange later, and no host waits for it; the difference is zeros meanwhile.

    Args:
        flag: Of shape (), bool, in pinned host memory.
        queue: The device's side queue, for this object alone.
    """

    learns_late = True

    def __init__(self, flag: Tensor, queue: SideQueue) -> None:
        self._flag = flag.fill_(True)
        self._on_device: Tensor | None = None  # kept until it has been copied
        self._queue = queue

    @override
    def judge(self, difference: Tensor, norms: Sequence[Tensor]) -> bool:
        before = self.known()
        if difference.numel() == 0:
            return before
        # Not by the norms: the square of a large finite number may be infinite.
        finite = torch.isfinite(torch.linalg.vector_norm(difference, math.inf))
        difference.masked_fill_(finite.logical_not(), 0.0)
        self._on_device = finite
        self._queue.follow()
        with self._queue.beside():
            self._flag.copy_(finite, non_blocking=True)
        self._queue.mark()
        return before

    @override
    def known(self) -> bool:
        if self._on_device is not None:
            self._queue.wait()
            self._on_device = None
        return bool(self._flag)

    @override
    def forget(self) -> None:
        self.known()
        self._flag.fill_(True)


def make_finiteness(wire: Tensor) -> Finiteness:
    """What judges differences that lie where this one does."""
    if wire.device.type == "cpu":
        return HostFiniteness()
    return DeviceFiniteness(torch.empty((), dtype=torch.bool, pin_memory=True), make_queue(wire.device))
