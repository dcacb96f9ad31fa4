"""How a flat vector gets from the worker's device to the host, where the served center is, and back."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["Staging", "make_staging"]


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
class CudaStaging(Staging):
    """Pinned memory and a stream of its own: the copies run beside the gradient.

    The default stream waits for the answers alone, and for those on the device.

    Args:
        flat: The vector, on a CUDA device.
    """

    def __init__(self, flat: Tensor) -> None:
        self._flat = flat
        self._pinned = torch.empty_like(flat, device="cpu", pin_memory=True)
        self._stream = torch.cuda.Stream(flat.device)  # type: ignore[no-untyped-call]
        self._on_host = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @override
    def depart(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._flat.device))
        with torch.cuda.stream(self._stream):
            self._pinned.copy_(self._flat, non_blocking=True)
            self._on_host.record()

    @override
    def messages(self) -> Tensor:
        self._on_host.synchronize()
        return self._pinned

    @override
    def arrive(self) -> None:
        with torch.cuda.stream(self._stream):
            self._flat.copy_(self._pinned, non_blocking=True)
        torch.cuda.current_stream(self._flat.device).wait_stream(self._stream)


def make_staging(flat: Tensor) -> Staging:
    """The staging for the device that the vector is on."""
    return CudaStaging(flat) if flat.is_cuda else HostStaging(flat)
