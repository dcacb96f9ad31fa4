"""The order in which workers exchange with a served center."""

import contextlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import final

from typing_extensions import override

from lightning_easgd.transport.channel import ExchangeError
from lightning_easgd.transport.control import ControlPlane
from lightning_easgd.transport.errors import StoreLostError
from lightning_easgd.transport.store_client import StoreClient
from lightning_easgd.transport.waiting import in_vain, wait_until

__all__ = ["FreeOrder", "RoundRobin", "Turns"]

_LONGEST_PAUSE = 0.002  # seconds between two looks at a worker's count
_AWAY = 1 << 62  # exchanges


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
        store: The workers' store, under a prefix of this object's own.
        rank: i.
        size: p.
        timeout: Seconds for which a worker whose turn it is may neither take it nor get on.
        control: Who lives and who gets on. The dead are not waited for.
        strategy: The strategy's name, for errors.
    """

    def __init__(
        self,
        store: StoreClient,
        rank: int,
        size: int,
        *,
        timeout: float,
        control: ControlPlane,
        strategy: str = "RoundRobin",
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._timeout = timeout
        self._control = control
        self._user = strategy
        self._made = 0
        self._begun: set[int] = set()  # the workers that have published a count
        self._closed = False
        self.come_back()

    @override
    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        for other in range(self._size):
            needed = self._made + 1 if other < self._rank else self._made
            if other != self._rank and needed > 0:
                self._wait_for(other, needed)
        yield
        self._made += 1
        self._publish(self._made)

    def _wait_for(self, other: int, needed: int) -> None:
        def look(waited: float) -> None:
            if self._closed:
                raise ExchangeError(f"{self._user}(order='round_robin'): the run ended before this worker's turn.")
            silent = self._control.silent_ranks() | self._control.left_ranks()
            if waited > self._timeout and other in silent:
                raise self._late({other}, waited, f"worker {other} has not taken its turn")
            self._control.note_progress()  # the main thread waits for this one, and this one for another worker

        def has_come() -> bool:
            return other in self._control.dead_ranks() or self._count(other) >= needed

        started = time.monotonic()
        try:
            wait_until(has_come, math.inf, longest_pause=_LONGEST_PAUSE, look=look)
        except StoreLostError as error:
            guilty = self._control.dead_ranks() or self._control.silent_ranks()  # the store may have gone with them
            raise self._late(
                guilty, time.monotonic() - started, f"no turn comes, as the store is lost ({error})"
            ) from error

    def _late(self, silent: Collection[int], waited: float, what: str) -> ExchangeError:
        return ExchangeError(
            in_vain(
                f"{self._user}(order='round_robin', timeout={self._timeout:g} s)",
                "an exchange",
                waited,
                f"{what}{f' ({self._control.describe(silent)})' if silent else ''}",
                "Use the free order where workers make fewer steps.",
            )
        )

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
        if other not in self._begun and not self._store.check([key]):
            return 0
        self._begun.add(other)
        return int(self._store.get(key))
