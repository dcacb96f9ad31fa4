"""Work that a device does beside what its current stream does: all operations on streams and events."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from typing_extensions import override

__all__ = ["DeviceQueue", "HostQueue", "SideQueue", "make_queue"]


class SideQueue(ABC):
    """A second queue of a device. What is put into it runs in its order, at any time unless something below says when.

    A tensor that both queues use belongs to one of them at a time: :meth:`follow` hands over to the side queue,
    :meth:`rejoin` hands back. Tensors that are made in :meth:`beside` are given back to the side queue's own memory.
    """

    @abstractmethod
    def follow(self) -> None:
        """Let what is put into this queue from here on come after what the current one holds now."""

    @abstractmethod
    @contextmanager
    def beside(self) -> Iterator[None]:
        """Put the operations of the block into this queue."""

    @abstractmethod
    def rejoin(self) -> None:
        """Let what is put into the current queue from here on come after what this one holds now."""

    @abstractmethod
    def mark(self) -> None:
        """Set the point that :meth:`wait` waits for behind what this queue holds now."""

    @abstractmethod
    def wait(self) -> None:
        """Let the calling thread wait until the queue has come to the last mark; it sleeps, as others need its core."""

    @property
    @abstractmethod
    def has_come(self) -> bool:
        """Whether the queue has come to the last mark."""


@final
class HostQueue(SideQueue):
    """Operations of the host are done when they return."""

    @override
    def follow(self) -> None:
        pass

    @override
    @contextmanager
    def beside(self) -> Iterator[None]:
        yield

    @override
    def rejoin(self) -> None:
        pass

    @override
    def mark(self) -> None:
        pass

    @override
    def wait(self) -> None:
        pass

    @property
    @override
    def has_come(self) -> bool:
        return True


@final
class DeviceQueue(SideQueue):
    """A stream and an event of a CUDA device.

    Args:
        device: The device.
        runtime: Has ``Stream``, ``Event``, ``stream`` and ``current_stream``, as :mod:`torch.cuda` has.
    """

    def __init__(self, device: torch.device, runtime: Any = torch.cuda) -> None:
        self._device = device
        self._runtime = runtime
        self._side = runtime.Stream(device)
        self._mark = runtime.Event(blocking=True)

    @override
    def follow(self) -> None:
        self._side.wait_stream(self._runtime.current_stream(self._device))

    @override
    @contextmanager
    def beside(self) -> Iterator[None]:
        with self._runtime.stream(self._side):
            yield

    @override
    def rejoin(self) -> None:
        self._runtime.current_stream(self._device).wait_stream(self._side)

    @override
    def mark(self) -> None:
        self._mark.record(self._side)

    @override
    def wait(self) -> None:
        self._mark.synchronize()

    @property
    @override
    def has_come(self) -> bool:
        return bool(self._mark.query())


def make_queue(device: torch.device) -> SideQueue:
    """A side queue of this device."""
    return DeviceQueue(device) if device.type == "cuda" else HostQueue()
