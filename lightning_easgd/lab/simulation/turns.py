"""The order in which simulated workers may exchange with a served center."""

from abc import ABC, abstractmethod
from typing import final

from typing_extensions import override

__all__ = ["FreeOrder", "RoundRobinOrder", "Turns"]


class Turns(ABC):
    """Says which workers may exchange now. Each method returns those that have just become free to."""

    @abstractmethod
    def request(self, worker: int) -> list[int]:
        """A worker wants to exchange."""

    def release(self, worker: int) -> list[int]:  # noqa: ARG002 - without an order nobody waits
        """A worker has its answer."""
        return []

    def leave(self, worker: int) -> list[int]:  # noqa: ARG002
        """A worker makes no more exchanges."""
        return []


@final
class FreeOrder(Turns):
    """Every worker on its own clock."""

    @override
    def request(self, worker: int) -> list[int]:
        return [worker]


@final
class RoundRobinOrder(Turns):
    """Worker 0, 1, …, p - 1, 0, …, each when the one before it has its answer.

    Args:
        workers: p.
    """

    def __init__(self, workers: int) -> None:
        self._present = [True] * workers
        self._waiting: set[int] = set()
        self._holder: int | None = None
        self._next = 0

    @override
    def request(self, worker: int) -> list[int]:
        self._waiting.add(worker)
        return self._grant()

    def release(self, worker: int) -> list[int]:  # noqa: D102
        self._holder = None
        self._next = worker + 1
        return self._grant()

    def leave(self, worker: int) -> list[int]:  # noqa: D102
        self._present[worker] = False
        self._waiting.discard(worker)
        return self.release(worker) if self._holder == worker else self._grant()

    def _grant(self) -> list[int]:
        if self._holder is not None or not any(self._present):
            return []
        self._next %= len(self._present)
        while not self._present[self._next]:
            self._next = (self._next + 1) % len(self._present)
        if self._next not in self._waiting:
            return []
        self._waiting.remove(self._next)
        self._holder = self._next
        return [self._holder]
