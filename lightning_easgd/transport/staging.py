"""How vectors get from the worker's device to the host and back."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.transport.device_queue import SideQueue, make_queue

__all__ = ["DeviceStaging", "HostStaging", "Staging", "brought_near", "make_staging"]

_PIECE = 2**22
"""Elements that are on the device at once beside a center in host memory: 16 MiB in float32."""


class Staging(ABC):
    """The way of one flat vector: :meth:`depart`, :meth:`messages` on another thread, :meth:`arrive`."""

    @abstractmethod
    def depart(self) -> None:
        """Start the vector on its way; what is written to it after this is not sent."""

    @abstractmethod
    def messages(self) -> Tensor:
        """The vector on the host, once it is there; called on the thread that exchanges it."""

    @abstractmethod
    def arrive(self) -> None:
        """After the exchange: let what follows on the device see the answers in the vector."""


@final
class HostStaging(Staging):
    """The vector is on the host already.

    Args:
        flat: The vector.
    """

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat

    @override
    def depart(self) -> None:
        pass

    @override
    def messages(self) -> Tensor:
        return self._flat

    @override
    def arrive(self) -> None:
        pass


@final
class DeviceStaging(Staging):
    """Host memory that the device copies to and from in a queue of its own, beside the gradient.

    The device's current queue waits for the answers alone, and for those on the device. Between :meth:`depart` and
    :meth:`arrive` it must leave the vector alone: the copy back does not wait for it, that is for the gradient.

    Args:
        flat: The vector, on the device.
        on_host: A vector like it in pinned memory; in other memory a copy would hold up the thread that asks for it.
        queue: The device's side queue, for this object alone.
    """

    def __init__(self, flat: Tensor, on_host: Tensor, queue: SideQueue) -> None:
        self._flat = flat
        self._on_host = on_host
        self._queue = queue

    @override
    def depart(self) -> None:
        self._queue.follow()
        with self._queue.beside():
            self._on_host.copy_(self._flat, non_blocking=True)
        self._queue.mark()

    @override
    def messages(self) -> Tensor:
        self._queue.wait()
        return self._on_host

    @override
    def arrive(self) -> None:
        with self._queue.beside():
            self._flat.copy_(self._on_host, non_blocking=True)
        self._queue.rejoin()


def make_staging(flat: Tensor) -> Staging:
    """The staging for the device that the vector is on."""
    if flat.device.type == "cpu":
        return HostStaging(flat)
    return DeviceStaging(flat, torch.empty_like(flat, device="cpu", pin_memory=True), make_queue(flat.device))


def brought_near(
    parameters: Sequence[Tensor], differences: Sequence[Tensor]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Parameters and their differences on one device: in pieces where the differences lie on another.

    The copies to a device are not waited for: the next writer of the differences comes after a read of the parameters,
    which waits for what is queued on their device.
    """
    if all(p.device == d.device for p, d in zip(parameters, differences, strict=True)):
        yield parameters, differences
        return
    for parameter, difference in zip(parameters, differences, strict=True):
        for near, far in zip(_pieces(parameter), _pieces(difference), strict=True):
            yield [near], [far.to(near.device, non_blocking=True)]


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Views of a tensor that need not be contiguous: cut along its longest dimension."""
    if tensor.numel() <= _PIECE:
        return [tensor]
    longest = max(range(tensor.dim()), key=lambda dimension: tensor.shape[dimension])
    return torch.tensor_split(tensor, -(-tensor.numel() // _PIECE), dim=longest)
