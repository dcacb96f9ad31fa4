"""Where workers of one host find each other's memory."""

import time
from datetime import timedelta
from typing import final

from torch.distributed.distributed_c10d import Store

from lightning_easgd.averagers.channel import ExchangeError

__all__ = ["MeetingPlace"]

_PAUSE = 1e-3  # seconds between two looks at the store


@final
class MeetingPlace:
    """Where workers leave word of where their memory is: keys of the store that all ranks share.

    Args:
        store: For the use of this thread, and for this alone.
        rank: This worker's rank.
        size: The number of workers.
        number: How many places in this store there have been before.
    """

    def __init__(self, store: Store, *, rank: int, size: int, number: int = 0) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._number = number

    def next(self) -> "MeetingPlace":
        """The place that takes this one's place."""
        return MeetingPlace(self._store, rank=self.rank, size=self.size, number=self._number + 1)

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
            lost = process is not None and not _is_running(process)
            if lost or waited > timeout.total_seconds():
                raise ExchangeError(
                    f"EASGDStrategy(timeout={timeout}): an exchange failed after this worker had waited {waited:.1f} s;"
                    f" rank {rank} {'died' if lost else 'hangs or is slow'}. Look for the first error among the ranks."
                )
            time.sleep(_PAUSE)
        return str(self._store.get(self._key(rank)).decode())

    def _key(self, rank: int) -> str:
        return f"{self._number}/{rank}"


def _is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
