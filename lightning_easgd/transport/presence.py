"""Which processes the ranks are, and what each has said of its own failure: known before anything else is set up."""

from collections.abc import Collection
from typing import final

from lightning_easgd.transport.processes import WatchedProcess, own_process
from lightning_easgd.transport.store_client import StoreClient

__all__ = ["Presence"]

ENDED = "its process has ended"


@final
class Presence:
    """What the ranks leave in the store about themselves, for whoever waits for one of them.

    Args:
        store: The ranks' store, under a prefix of this object's own.
        rank: This process's rank.
    """

    def __init__(self, store: StoreClient, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._failed = False
        self._known: dict[int, WatchedProcess | None] = {}

    def enter(self) -> None:
        """Leave word of this rank's process."""
        self._store.set(f"process/{self._rank}", own_process())

    def fail(self, reason: str) -> None:
        """Say that this rank has failed, and why; the first reason counts."""
        if not self._failed:
            self._failed = True
            self._store.set(f"failed/{self._rank}", reason)

    def process(self, rank: int) -> WatchedProcess | None:
        """The process of another rank, None if it is not known (yet), or not of this host."""
        key = f"process/{rank}"
        if rank not in self._known and self._store.check([key]):
            self._known[rank] = WatchedProcess.find(self._store.get(key).decode())
        return self._known.get(rank)

    def has_come(self, rank: int) -> bool:
        """Whether a rank has left word at all."""
        return rank in self._known or self._store.check([f"process/{rank}"])

    def lost(self, among: Collection[int]) -> dict[int, str]:
        """Those of these ranks that have failed or whose processes have ended, each with what is known of it."""
        reasons = {}
        for rank in among:
            process = self.process(rank)
            if self._store.check([f"failed/{rank}"]):
                reasons[rank] = self._store.get(f"failed/{rank}").decode()
            elif rank != self._rank and process is not None and process.has_ended:
                reasons[rank] = ENDED
        return reasons

    def stopped(self, among: Collection[int]) -> frozenset[int]:
        """Those of these ranks whose processes a signal has stopped, as far as this host can see; asks no store."""
        known = {rank: self._known.get(rank) for rank in among}
        return frozenset(rank for rank, process in known.items() if process is not None and process.is_stopped)
