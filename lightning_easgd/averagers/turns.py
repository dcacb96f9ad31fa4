"""The order in which workers exchange with a served center."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import final

from torch.distributed.distributed_c10d import Store
from typing_extensions import override

from lightning_easgd.averagers.channel import ExchangeError

__all__ = ["FreeOrder", "RoundRobin", "Turns"]

_POLL_INTERVAL = 0.002
_AWAY = 1 << 62


class Turns(ABC):
    """Says when a worker may exchange."""

    @abstractmethod
    def turn(self) -> contextlib.AbstractContextManager[None]:
        """Context of one exchange: entered when this worker's turn has come."""

    def leave(self) -> None:  # noqa: B027 - without an order there is nothing to tell
        """Stand aside: the others' turns do not wait for this worker any more."""

    def come_back(self) -> None:  # noqa: B027
        """Take part again."""

    def close(self) -> None:  # noqa: B027
        """End the waiting for a turn that is under way, with an error."""


@final
class FreeOrder(Turns):
    """Every worker on its own clock."""

    @override
    def turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@final
class RoundRobin(Turns):
    """Worker 0, 1, …, p - 1, 0, …: runs with equal numbers of steps are reproducible, bit for bit.

    Each worker publishes how many exchanges it has made. The k-th exchange of worker i waits until those before it
    have made theirs of this round, and those behind it theirs of the round before. A worker that is at a meeting or
    has no more data stands aside.

    Args:
        store: A store client for the exchanging thread alone.
        rank: i.
        size: p.
        timeout: Seconds to wait for a turn.
        lost: The ranks that are dead, which are not waited for.
    """

    def __init__(
        self, store: Store, rank: int, size: int, *, timeout: float, lost: Callable[[], frozenset[int]]
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._timeout = timeout
        self._lost = lost
        self._made = 0
        self._closed = False
        self.come_back()

    @override
    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        deadline = time.monotonic() + self._timeout
        for other in range(self._size):
            needed = self._made + 1 if other < self._rank else self._made
            while other != self._rank and needed > 0 and other not in self._lost() and self._count(other) < needed:
                if self._closed:
                    raise ExchangeError("EASGDStrategy(order='round_robin'): the run ended before this worker's turn.")
                if time.monotonic() > deadline:
                    raise ExchangeError(
                        f"EASGDStrategy(order='round_robin', timeout={self._timeout:g} s): worker {other} has not"
                        f" taken its turn; it is frozen, or makes fewer steps. Use the free order for such workers."
                    )
                time.sleep(_POLL_INTERVAL)
        yield
        self._made += 1
        self._publish(self._made)

    @override
    def leave(self) -> None:
        self._publish(_AWAY)

    @override
    def come_back(self) -> None:
        self._publish(self._made)

    @override
    def close(self) -> None:
        self._closed = True

    def _publish(self, count: int) -> None:
        self._store.set(f"turns/{self._rank}", str(count))

    def _count(self, other: int) -> int:
        key = f"turns/{other}"
        return int(self._store.get(key)) if self._store.check([key]) else 0
