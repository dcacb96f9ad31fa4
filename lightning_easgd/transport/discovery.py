"""How the ranks tell each other where things are, over the store that they share."""

import json
from collections.abc import Collection, Sequence
from typing import Any, final

from lightning_easgd.transport.errors import CenterTimeoutError, WorkerLostError
from lightning_easgd.transport.liveness import Liveness, died
from lightning_easgd.transport.store_client import StoreClient
from lightning_easgd.transport.waiting import in_vain, wait_until

__all__ = ["Rendezvous"]

_LONGEST_PAUSE = 0.01  # seconds between two looks at the store


@final
class Rendezvous:
    """Where each rank leaves values under names, and finds those of the others.

    Args:
        store: The ranks' store, under a prefix of this object's own.
        liveness: Who of the ranks lives.
        rank: This process's rank.
        world_size: The number of ranks.
        timeout: Seconds to wait for the last rank.
        user: The name of who waits, for errors.

    Attributes:
        liveness: As given.
        rank: As given.
        world_size: As given.
        timeout: As given.
        user: As given.
    """

    def __init__(
        self,
        store: StoreClient,
        liveness: Liveness,
        rank: int,
        world_size: int,
        timeout: float,
        *,
        user: str = "Rendezvous",
    ) -> None:
        self.liveness = liveness
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.user = user
        self._store = store

    def enter(self, name: str, value: Any = None) -> None:
        """Leave a value that JSON can hold."""
        self._store.set(f"{name}/{self.rank}", json.dumps(value))

    def find(self, name: str, ranks: Sequence[int]) -> list[Any]:
        """The values of ranks, when they have left them; raises as :meth:`wait` does."""
        self.wait(name, ranks)
        return [json.loads(answer) for answer in self._store.multi_get([f"{name}/{rank}" for rank in ranks])]

    def gather(self, name: str, value: Any) -> list[Any]:
        """Leave a value, and return those of all ranks; raises as :meth:`wait` does."""
        self.enter(name, value)
        return self.find(name, range(self.world_size))

    def wait(self, name: str, ranks: Collection[int], timeout: float | None = None) -> None:
        """Return when ranks have left their values.

        Args:
            name: Of the values.
            ranks: Who is waited for.
            timeout: Seconds to wait; the rendezvous' own if None.

        Raises:
            WorkerLostError: If a rank that has not come has died, or failed.
            CenterTimeoutError: If a rank does not come; it is named.
            StoreLostError: If the store does not answer.
        """
        timeout = self.timeout if timeout is None else timeout
        who, what = f"{self.user}(timeout={timeout:g} s)", f"the wait for {name!r}"
        missing = {rank: f"{name}/{rank}" for rank in ranks}

        def look(waited: float) -> None:
            for rank in [rank for rank, key in missing.items() if self._store.check([key])]:
                del missing[rank]
            lost = self.liveness.lost(missing)
            # Looked at again, as a rank may leave when it has done its part.
            lost = {rank: why for rank, why in lost.items() if not self._store.check([missing[rank]])}
            if lost:
                raise WorkerLostError(in_vain(who, what, waited, died(lost)), frozenset(lost))

        if not wait_until(
            lambda: self._store.check(list(missing.values())), timeout, longest_pause=_LONGEST_PAUSE, look=look
        ):
            raise CenterTimeoutError(in_vain(who, what, timeout, self.liveness.blame(missing)))

    def close(self) -> None:
        """End the connection to the store."""
        self._store.close()
