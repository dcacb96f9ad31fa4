"""Who lives, who has left, and who asks to stop: the center's control plane, over the store alone."""

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import final

from typing_extensions import override

from lightning_easgd.transport.discovery import Rendezvous
from lightning_easgd.transport.errors import StoreLostError
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.liveness import (
    ENDED,
    STOPPED,
    UNHEARD,
    Heartbeats,
    Liveness,
    WatchedProcess,
    alive,
    dead,
    left,
)
from lightning_easgd.transport.store_client import StoreClient

__all__ = ["ControlPlane"]

_POLL_INTERVAL = 0.3  # seconds
_LONGEST_GOODBYE = 2.0  # seconds; a store whose server is stopped never answers
_CONFIRMATION = 1.0  # seconds without a heartbeat after which a rank with a lost connection is dead


@final
class ControlPlane(Liveness, ForkAware):
    """Liveness of all ranks and a flag that asks all to stop.

    A daemon thread looks a few times a second; what the training step asks for is answered from memory. A rank of the
    same host is watched through its process, whose end shows at once, and its death is told to the others. A rank of
    another host is dead when its host says so, when it has ended a connection and its heartbeat has stopped too, or
    when its whole node has not been heard of for the timeout.

    That the thread lives does not show that its rank gets on. The heartbeat therefore carries how often the rank's
    main thread has called :meth:`note_progress`, or waited for others here.

    Args:
        store: The ranks' store, under a prefix of the control plane's own.
        rank: This process's rank.
        nodes: The ranks of each node.
        processes: The processes that can be watched from here, by rank. Another rank is watched by heartbeat.
        lost: Ranks whose connections ended without a goodbye; others add to it.
        timeout: Seconds of silence after which another node counts as dead, and a rank as silent.
    """

    def __init__(
        self,
        store: StoreClient,
        *,
        rank: int,
        nodes: Sequence[Sequence[int]],
        processes: Mapping[int, WatchedProcess],
        lost: Collection[int],
        timeout: float,
    ) -> None:
        super().__init__()
        self._rank = rank
        self._nodes = [frozenset(node) for node in nodes]
        self._ranks = sorted(other for node in nodes for other in node)
        self._timeout = timeout
        self._lost_connections = lost
        self._store = store
        self._meetings = Rendezvous(
            store.under("meeting"), self, rank, len(self._ranks), timeout, user="ControlPlane.meet"
        )
        self._beats = Heartbeats(self._ranks)
        self._processes = {other: process for other, process in processes.items() if other != rank}
        self._moves = 0
        self._dead: Mapping[int, str] = {}  # with what is known of each
        self._stop_wanted = False
        self._stop_requested = False
        self._wake = threading.Event()
        self._closing = False
        self._farewell = left()
        self._store.set(_state_key(rank), alive(0, 0))
        self._thread = threading.Thread(target=self._run, name="easgd-control", daemon=True)
        self._thread.start()

    @property
    def stop_requested(self) -> bool:
        """Whether any rank has asked all to stop."""
        return self._stop_requested

    @property
    def store_lost(self) -> bool:
        """Whether the store no longer answers: the process that serves it has ended, or is stopped."""
        return self._store.problem is not None

    def note_progress(self) -> None:
        """Show the others that this rank's main thread gets on; costs an addition."""
        self._moves += 1

    def request_stop(self) -> None:
        """Ask all ranks to stop; returns at once, and takes no lock: a signal handler may call it."""
        self._stop_wanted = self._stop_requested = True

    def dead_ranks(self) -> frozenset[int]:
        """The ranks that have died; not those that have left, nor those that are merely stopped on a living node."""
        return frozenset(self._dead)

    def reasons(self) -> Mapping[int, str]:
        """Why ranks have died, and who is stopped."""
        return dict.fromkeys(self.stopped(self._ranks), STOPPED) | dict(self._dead)

    def left_ranks(self) -> frozenset[int]:
        """The ranks that have closed their control plane in good order."""
        return self._beats.left

    def silent_ranks(self) -> frozenset[int]:
        """The ranks, neither dead nor left nor this one, that do not get on: stopped, stuck, or cut off.

        Their main thread has not moved for the timeout. Where the store does not answer nothing is known of the others
        but what this host sees, and the rank that serves it is the silent one.
        """
        gone = self.dead_ranks() | self.left_ranks() | {self._rank}
        if self.store_lost:
            return (self.stopped(self._ranks) | {rank for rank in self._ranks if rank == self._store.server}) - gone
        return self._beats.unmoved(self._timeout) - gone

    @override
    def lost(self, among: Collection[int]) -> Mapping[int, str]:
        self.note_progress()  # who asks has come to a meeting, and waits there for others
        return {rank: why for rank, why in self._dead.items() if rank in among}

    @override
    def stopped(self, among: Collection[int]) -> frozenset[int]:
        watched = {rank: self._processes[rank] for rank in among if rank in self._processes}
        return frozenset(rank for rank, process in watched.items() if process.is_stopped)

    def meet(self, name: str, *, among: Collection[int] | None = None, timeout: float | None = None) -> None:
        """Return when all ranks have come to this meeting.

        Args:
            name: Marks one point of the run; a name is met once.
            among: The ranks that are expected; all if None.
            timeout: Seconds to wait; the control plane's own if None.

        Raises:
            WorkerLostError: If one who is expected has died.
            CenterTimeoutError: If one who is expected has not come in time, or the store is lost.
        """
        self._meetings.enter(name)
        self._meetings.wait(name, self._ranks if among is None else among, timeout)

    def resign(self, reason: str = "") -> None:
        """Tell the others that this rank has failed, and end the thread: to them it is dead from now on.

        Args:
            reason: Why, in one line; the others' errors quote it.
        """
        self._farewell = dead(reason)
        self.close()

    def close(self) -> None:
        """Tell the others that this rank has left, and end the thread. A second call does nothing."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        self._thread.join(min(self._timeout, _LONGEST_GOODBYE))

    @override
    def abandon(self) -> None:
        self._closing = True

    def _run(self) -> None:
        beat = 0
        while not self._closing:
            beat += 1
            try:
                self._look_around(beat)
            except StoreLostError:
                self._judge(self._ended_processes())
            self._wake.wait(_POLL_INTERVAL)
        with suppress(StoreLostError):
            self._publish_stop()
            self._store.set(_state_key(self._rank), self._farewell)

    def _look_around(self, beat: int) -> None:
        ended = self._ended_processes()  # before the states are read: who left in good order had said so by then
        self._store.set(_state_key(self._rank), alive(beat, self._moves))
        self._publish_stop()
        self._stop_requested |= self._store.check(["stop"])
        keys = [_state_key(rank) for rank in self._ranks]
        if self._store.check(keys):
            states = map(bytes.decode, self._store.multi_get(keys))
            self._beats.see(dict(zip(self._ranks, states, strict=True)))
        known = self._dead
        self._judge(ended)
        for rank in self._dead.keys() - known.keys() - self._beats.dead.keys():
            self._store.set(_state_key(rank), dead(self._dead[rank]))

    def _publish_stop(self) -> None:
        if self._stop_wanted:
            self._store.set("stop", "")
            self._stop_wanted = False

    def _judge(self, ended: frozenset[int]) -> None:
        gone: set[int] = set()
        if not self.store_lost:  # else everyone seems silent
            gone |= frozenset(self._lost_connections) & self._beats.unheard(_CONFIRMATION)
            unheard = self._beats.unheard(self._timeout)
            for node in self._nodes:
                if self._rank not in node and node <= unheard:
                    gone |= node
        reasons = dict.fromkeys(gone, UNHEARD) | dict.fromkeys(ended, ENDED) | self._beats.dead
        self._dead = {rank: why for rank, why in reasons.items() if rank not in self._beats.left | {self._rank}}

    def _ended_processes(self) -> frozenset[int]:
        return frozenset(rank for rank, process in self._processes.items() if process.has_ended)

    @override
    def _describe(self, rank: int) -> str:
        if self.stopped([rank]):
            return STOPPED
        if rank in self.left_ranks():
            return "has ended early"
        if self.store_lost:
            return "serves the store, which does not answer"
        if rank in self._beats.unheard(self._timeout):
            return f"has not been heard of for {self._timeout:g} s"
        return (
            f"lives, but its main thread has not got on for {self._timeout:g} s: it hangs (in a data loader, a lock, a"
            " collective), or is in one hook that takes longer"
        )


def _state_key(rank: int) -> str:
    return f"state/{rank}"
