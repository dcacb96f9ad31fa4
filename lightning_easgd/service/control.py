"""Who lives, who has left, and who asks to stop: the center's control plane, over the store alone."""

import os
import select
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import final

from torch.distributed.distributed_c10d import Store

from lightning_easgd.service.errors import CenterTimeoutError, WorkerLostError
from lightning_easgd.service.forking import ForkAware
from lightning_easgd.service.stores import own_client

__all__ = ["ControlPlane"]

_POLL_INTERVAL = 0.3
_MEETING_PAUSE = 0.01
_LONGEST_GOODBYE = 5.0  # a store whose server is stopped never answers
_CONFIRMATION = 1.0  # seconds without a heartbeat after which a rank with a lost connection is dead
_LEFT, _DEAD = "left", "dead"


@final
class ControlPlane(ForkAware):
    """Liveness of all ranks and a flag that asks all to stop.

    A daemon thread with a store client of its own looks a few times a second; what the training step asks for is
    answered from memory. A rank of the same node is watched through its process, whose end shows at once, and its
    death is told to the other nodes. A rank of another node is dead when its node says so, when it has ended a
    connection and its heartbeat has stopped too, or when the whole node has not been heard of for the timeout.

    Args:
        store: The ranks' store; cloned, not used itself.
        rank: This process's rank.
        nodes: The ranks of each node.
        processes: Process ids of the ranks of this node, by rank. A rank that is left out is watched by heartbeat.
        lost: Ranks whose connections ended without a goodbye; others add to it.
        timeout: Seconds of silence after which another node counts as dead, and a rank as silent.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        nodes: Sequence[Sequence[int]],
        processes: Mapping[int, int],
        lost: Collection[int],
        timeout: float,
    ) -> None:
        super().__init__()
        self._rank = rank
        self._nodes = [list(node) for node in nodes]
        self._ranks = sorted(other for node in nodes for other in node)
        self._timeout = timeout
        self._lost_connections = lost
        self._store = own_client(store)
        self._meeting_guard = threading.Lock()
        self._meeting: _Meeting | None = None
        now = time.monotonic()
        self._seen = {other: _Beat("", now) for other in self._ranks}
        self._watched = {
            other: descriptor
            for other, process in processes.items()
            if other != rank and (descriptor := _open_process(process)) is not None
        }
        self._dead: frozenset[int] = frozenset()
        self._left: frozenset[int] = frozenset()
        self._stop_wanted = False
        self._stop_requested = False
        self._store_lost = False
        self._wake = threading.Event()
        self._closing = False
        self._farewell = _LEFT
        self._store.set(_state_key(rank), "0")
        self._thread = threading.Thread(target=self._run, name="easgd-control", daemon=True)
        self._thread.start()

    @property
    def stop_requested(self) -> bool:
        """Whether any rank has asked all to stop."""
        return self._stop_requested

    @property
    def store_lost(self) -> bool:
        """Whether the store no longer answers: the process that serves it has ended."""
        return self._store_lost

    def request_stop(self) -> None:
        """Ask all ranks to stop; returns at once, and takes no lock: a signal handler may call it."""
        self._stop_wanted = self._stop_requested = True

    def dead_ranks(self) -> frozenset[int]:
        """The ranks that have died; not those that have left, nor those that are merely stopped on a living node."""
        return self._dead

    def left_ranks(self) -> frozenset[int]:
        """The ranks that have closed their control plane in good order."""
        return self._left

    def silent_ranks(self) -> frozenset[int]:
        """The ranks, neither dead nor left, that have given no sign for the timeout: stopped, stuck, or cut off."""
        now = time.monotonic()
        gone = self._dead | self._left | {self._rank}
        return frozenset(
            rank for rank, beat in self._seen.items() if rank not in gone and now - beat.time > self._timeout
        )

    def check(self) -> None:
        """Raise if a rank has died.

        Raises:
            WorkerLostError: It names the dead.
        """
        if self._dead:
            raise WorkerLostError(f"ControlPlane: ranks {sorted(self._dead)} have died.", self._dead)

    def meet(self, name: str, *, among: Collection[int] | None = None, timeout: float | None = None) -> None:
        """Return when all ranks have come to this meeting.

        Args:
            name: Marks one point of the run; a name is met once.
            among: The ranks that are expected; all if None.
            timeout: Seconds to wait; the control plane's own if None.

        Raises:
            WorkerLostError: If one who is expected has died.
            CenterTimeoutError: If one who is expected has not come in time.
        """
        timeout = self._timeout if timeout is None else timeout
        with self._meeting_guard:
            meeting = self._meeting = _Meeting(name, sorted(self._ranks if among is None else among))
            self._wake.set()
            try:
                deadline = time.monotonic() + timeout
                while not meeting.complete.wait(_MEETING_PAUSE):
                    lost = self._dead & frozenset(meeting.missing)
                    if lost:
                        raise WorkerLostError(
                            f"ControlPlane.meet(name={name!r}): ranks {sorted(lost)} have died before they came.", lost
                        )
                    if self._store_lost or time.monotonic() > deadline:
                        why = "the store is gone" if self._store_lost else f"ranks {meeting.missing} have not come"
                        raise CenterTimeoutError(f"ControlPlane.meet(name={name!r}, timeout={timeout:g}): {why}.")
            finally:
                self._meeting = None

    def resign(self) -> None:
        """Tell the others that this rank has failed, and end the thread: to them it is dead from now on."""
        self._farewell = _DEAD
        self.close()

    def close(self) -> None:
        """Tell the others that this rank has left, and end the thread. A second call does nothing."""
        if self._closing:
            return
        self._closing = True
        self._wake.set()
        self._thread.join(min(self._timeout, _LONGEST_GOODBYE))
        self._close_descriptors()

    def abandon(self) -> None:  # noqa: D102
        self._closing = True
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self._watched:
            os.close(self._watched.popitem()[1])

    def _run(self) -> None:
        next_look = 0.0
        beat = 0
        while not self._closing:
            meeting = self._meeting
            try:
                if meeting is not None and not meeting.complete.is_set():
                    self._attend(meeting)
                if self._stop_wanted or time.monotonic() >= next_look:
                    beat += 1
                    self._look_around(beat)
                    next_look = time.monotonic() + _POLL_INTERVAL
            except RuntimeError:  # every kind of failure of the store
                self._store_lost = True
                self._judge(self._ended_processes())
            waiting = self._meeting is not None and not self._store_lost
            self._wake.wait(_MEETING_PAUSE if waiting else _POLL_INTERVAL)
            self._wake.clear()
        if not self._store_lost:
            with suppress(RuntimeError):
                self._publish_stop()
                self._store.set(_state_key(self._rank), self._farewell)

    def _attend(self, meeting: "_Meeting") -> None:
        if not meeting.announced:
            self._store.set(f"meeting/{meeting.name}/{self._rank}", "")
            meeting.announced = True
        meeting.missing = [
            rank for rank in meeting.missing if not self._store.check([f"meeting/{meeting.name}/{rank}"])
        ]
        if not meeting.missing:
            meeting.complete.set()

    def _look_around(self, beat: int) -> None:
        ended = self._ended_processes()  # before the states are read: who left in good order had said so by then
        if self._store_lost:
            self._judge(ended)
            return
        self._store.set(_state_key(self._rank), str(beat))
        self._publish_stop()
        self._stop_requested |= self._store.check(["stop"])
        keys = [_state_key(rank) for rank in self._ranks]
        if self._store.check(keys):
            now = time.monotonic()
            for rank, state in zip(self._ranks, map(bytes.decode, self._store.multi_get(keys)), strict=True):
                if state != self._seen[rank].state:
                    self._seen[rank] = _Beat(state, now)
        known = self._dead
        self._judge(ended)
        for rank in self._dead - known:
            self._store.set(_state_key(rank), _DEAD)

    def _publish_stop(self) -> None:
        if self._stop_wanted:
            self._store.set("stop", "")
            self._stop_wanted = False

    def _judge(self, ended: frozenset[int]) -> None:
        left = {rank for rank, beat in self._seen.items() if beat.state == _LEFT}
        dead = {rank for rank, beat in self._seen.items() if beat.state == _DEAD} | ended
        if not self._store_lost:  # else everyone seems silent
            now = time.monotonic()
            dead |= {rank for rank in tuple(self._lost_connections) if now - self._seen[rank].time > _CONFIRMATION}
            for node in self._nodes:
                if self._rank not in node and all(now - self._seen[rank].time > self._timeout for rank in node):
                    dead |= set(node)
        self._left = frozenset(left)
        self._dead = frozenset(dead - left)

    def _ended_processes(self) -> frozenset[int]:
        if not self._watched:
            return frozenset()
        poll = select.poll()
        for descriptor in self._watched.values():
            poll.register(descriptor, select.POLLIN)
        ended = {descriptor for descriptor, _ in poll.poll(0)}
        return frozenset(rank for rank, descriptor in self._watched.items() if descriptor in ended)


@final
class _Meeting:
    """A meeting that this rank has come to."""

    def __init__(self, name: str, missing: list[int]) -> None:
        self.name = name
        self.missing = missing
        self.announced = False
        self.complete = threading.Event()


@final
@dataclass(frozen=True)
class _Beat:
    state: str
    time: float


def _state_key(rank: int) -> str:
    return f"state/{rank}"


def _open_process(process: int) -> int | None:
    """A descriptor that becomes readable when the process ends, None where there is no such thing."""
    try:
        return os.pidfd_open(process)
    except (AttributeError, OSError):
        return None
