"""Who has not come: asked when a collective operation has failed, so that it costs nothing while all goes well."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import final

from torch.distributed.distributed_c10d import Store

from lightning_easgd.transport.errors import StoreLostError
from lightning_easgd.transport.liveness import Presence
from lightning_easgd.transport.store_client import StoreClient, store_server
from lightning_easgd.transport.waiting import wait_until

__all__ = ["RollCall"]

_ANSWER = 2.0  # seconds within which the store answers, unless its server is stopped
_PATIENCE = 3.0  # seconds in which the ranks whose operation failed with this one's say so
_LONGEST_PAUSE = 0.05  # seconds

_calls = count()  # keys of those of before are still in the store


@final
class RollCall:
    """What the ranks of one run can say about a collective operation that failed.

    A rank whose operation has failed says that it was there. Who does not say so, and is neither dead nor stopped, has
    not come to it. All ranks make the object at the same point.

    Args:
        store: The ranks' store, of which nothing else is asked meanwhile.
        rank: This process's rank.
        size: The number of ranks.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._keys = f"easgd/roll/{next(_calls)}"
        with self._client() as client:
            Presence(client, rank).enter()

    def fail(self, reason: str) -> None:
        """Say that this rank has failed, and why."""
        with suppress(StoreLostError), self._client() as client:
            Presence(client, self._rank).fail(reason)

    def explain(self) -> str:
        """A sentence on who is to blame for the failure of an operation in which this rank was."""
        try:
            with self._client() as client:
                return self._ask(client)
        except StoreLostError as error:
            return str(error)

    @contextmanager
    def _client(self) -> Iterator[StoreClient]:
        client = StoreClient(self._store, _ANSWER, server=store_server(), clone=False)
        try:
            yield client.under(self._keys)
        finally:
            client.close()

    def _ask(self, store: StoreClient) -> str:
        presence = Presence(store, self._rank)
        waited = [rank for rank in self._others if store.check([f"waits/{rank}"])]
        store.set(f"waits/{self._rank}", "")
        lost: dict[int, str] = {}
        missing: list[int] = []

        def is_clear() -> bool:
            nonlocal lost, missing
            lost = presence.lost(self._others)
            missing = [rank for rank in self._others if rank not in lost and not store.check([f"waits/{rank}"])]
            return not missing or bool(presence.stopped(missing))

        wait_until(is_clear, _PATIENCE, longest_pause=_LONGEST_PAUSE)
        # Who has said so and failed afterwards has failed because of another.
        here = [rank for rank in lost if store.check([f"waits/{rank}"])]
        guilty = {rank: lost[rank] for rank in lost if rank not in here}
        return _sentence(guilty, sorted(presence.stopped(missing)), missing, waited)


def _sentence(lost: dict[int, str], stopped: list[int], missing: list[int], waited: list[int]) -> str:
    if stopped:
        return f"Ranks {stopped} are stopped by a signal."
    if lost:
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in lost.items())
        return f"Ranks {sorted(lost)} have died or raised an error ({reasons})."
    if missing:
        return (
            f"Ranks {missing} have not come to it: they are in a hook that takes longer than the timeout, or hang. Give"
            " a longer timeout if that hook is meant to take so long."
        )
    if waited:
        return (
            f"Ranks {waited} have given up before: they had waited for this one longer than the timeout. Give a longer"
            " timeout if a hook of this rank is meant to take so long."
        )
    return "All ranks were there; the connection between them failed."
