"""How the ranks tell each other where things are, over the store."""

import json
import time
from collections.abc import Sequence
from typing import Any, final

from lightning_easgd.transport.errors import CenterTimeoutError, WorkerLostError
from lightning_easgd.transport.presence import Presence
from lightning_easgd.transport.store_client import StoreClient

__all__ = ["Rendezvous"]

_PAUSE = 0.01
_BETWEEN_LOOKS = 0.1  # seconds from one look at whether the others live to the next


@final
class Rendezvous:
    """All ranks hand in a value each, and get all values.

    Args:
        store: The ranks' store.
        presence: Who the ranks are.
        rank: This process's rank.
        world_size: The number of ranks.
        timeout: Seconds to wait for the last rank.
    """

    def __init__(self, store: StoreClient, presence: Presence, rank: int, world_size: int, timeout: float) -> None:
        self._store = store
        self._presence = presence
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout

    def gather(self, name: str, value: Any) -> list[Any]:
        """Hand in a value that JSON can hold, and return those of all ranks.

        Raises:
            WorkerLostError: If a rank that has not come has died, or failed.
            CenterTimeoutError: If a rank does not come; it is named.
            StoreLostError: If the store does not answer.
        """
        keys = [f"{name}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], json.dumps(value))
        missing = list(range(self._world_size))
        started = look = time.monotonic()
        while not self._store.check([keys[rank] for rank in missing]):
            missing = [rank for rank in missing if not self._store.check([keys[rank]])]
            now = time.monotonic()
            if missing and now >= look:
                self._check(name, missing)
                look = now + _BETWEEN_LOOKS
            if missing and now - started > self._timeout:
                raise self._late(name, missing)
            time.sleep(_PAUSE)
        return [json.loads(answer) for answer in self._store.multi_get(keys)]

    def _check(self, name: str, missing: Sequence[int]) -> None:
        lost = self._presence.lost(missing)
        if lost:
            whose = "; ".join(f"rank {rank}: {reason}" for rank, reason in lost.items())
            raise WorkerLostError(
                f"open_center: ranks {list(lost)} have died or raised an error before they came to {name!r} ({whose});"
                " look for the first error among the ranks.",
                frozenset(lost),
            )

    def _late(self, name: str, missing: Sequence[int]) -> CenterTimeoutError:
        begun = f"open_center(timeout={self._timeout:g}):"
        stopped = sorted(self._presence.stopped(missing))
        stuck = [rank for rank in missing if self._presence.has_come(rank)]
        if stopped:
            return CenterTimeoutError(f"{begun} ranks {stopped} have not come to {name!r}: a signal has stopped them.")
        if stuck:
            return CenterTimeoutError(
                f"{begun} ranks {stuck} have not come to {name!r}; they are in a hook that takes longer, or hang."
            )
        return CenterTimeoutError(
            f"{begun} ranks {list(missing)} have not come to {name!r}; every rank must open the center."
        )
