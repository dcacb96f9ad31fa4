"""Where workers of one host find each other's memory."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, final

from lightning_easgd.transport.channel import ExchangeError
from lightning_easgd.transport.processes import has_ended

__all__ = ["MeetingPlace"]

_PAUSE = 1e-3  # seconds between two looks at the store


class Keys(Protocol):
    """What a meeting place needs of a store."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of these keys are there."""

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""


@final
class MeetingPlace:
    """Where workers leave word of where their memory is: keys of the store that all ranks share.

    Args:
        store: Whose calls have a deadline, or do not wait.
        rank: This worker's rank.
        size: The number of workers.
        number: How many places in this store there have been before.
        let_go: Gives the store back.
    """

    def __init__(
        self, store: Keys, *, rank: int, size: int, number: int = 0, let_go: Callable[[], None] = lambda: None
    ) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._number = number
        self._let_go = let_go

    def next(self) -> "MeetingPlace":
        """The place that takes this one's place."""
        return MeetingPlace(self._store, rank=self.rank, size=self.size, number=self._number + 1, let_go=self._let_go)

    def close(self) -> None:
        """Give back the store, which all places have in common; nobody is found any more."""
        self._let_go()

    def enter(self, address: str) -> None:
        """Leave word."""
        self._store.set(self._key(self.rank), address)

    def find(self, rank: int, timeout: timedelta, process: int | None) -> str:
        """The word of a worker.

        Args:
            rank: The worker.
            timeout: How long to wait.
            process: Its process, if that is known: not waited for when it is gone.

        Raises:
            ExchangeError: If it does not come.
        """
        started = time.monotonic()
        while not self._store.check([self._key(rank)]):
            waited = time.monotonic() - started
            lost = process is not None and has_ended(process)
            if lost or waited > timeout.total_seconds():
                raise ExchangeError(
                    f"EASGDStrategy(timeout={timeout}): an exchange failed after this worker had waited {waited:.1f} s;"
                    f" rank {rank} {'died' if lost else 'hangs or is slow'}. Look for the first error among the ranks."
                )
            time.sleep(_PAUSE)
        return str(self._store.get(self._key(rank)).decode())

    def _key(self, rank: int) -> str:
        return f"{self._number}/{rank}"
