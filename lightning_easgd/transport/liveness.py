"""What shows that a rank lives: its process, as its host sees it; what it left in the store; and its heartbeats."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from lightning_easgd.transport.store_client import StoreClient

__all__ = [
    "ENDED",
    "STOPPED",
    "UNHEARD",
    "Heartbeats",
    "Liveness",
    "Presence",
    "WatchedProcess",
    "alive",
    "dead",
    "died",
    "left",
    "own_process",
]

ENDED, UNHEARD, STOPPED = "its process has ended", "it is not heard of any more", "is stopped by a signal"

_UNKNOWN = "?", ""
_ALIVE, _LEFT, _DEAD = "alive", "left", "dead"
_STATE, _START = 0, 19  # fields of /proc/PID/stat after the name


class Liveness(ABC):
    """Who waits for other ranks asks it about those that do not come."""

    @abstractmethod
    def lost(self, among: Collection[int]) -> Mapping[int, str]:
        """Those of these ranks that have failed or whose processes have ended, each with what is known of it."""

    @abstractmethod
    def stopped(self, among: Collection[int]) -> frozenset[int]:
        """Those of these ranks whose processes a signal has stopped, as far as this host can see."""

    def describe(self, among: Collection[int]) -> str:
        """What is known of ranks that do not come, in words."""
        return "; ".join(f"rank {rank} {self._describe(rank)}" for rank in sorted(among))

    def blame(self, missing: Collection[int]) -> str:
        """Who does not come, and what is known of them; of one that is stopped the others may be the victims."""
        guilty = self.stopped(missing) or missing
        return f"ranks {sorted(guilty)} have not come ({self.describe(guilty)})"

    @abstractmethod
    def _describe(self, rank: int) -> str:
        """What is known of one that does not come: "is …", "has …"."""


def died(lost: Mapping[int, str]) -> str:
    """Who is lost, and why, in words."""
    reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(lost.items()))
    return f"ranks {sorted(lost)} have died or raised an error ({reasons})"


@final
class WatchedProcess:
    """A process of this host. Its number may be given to another process when it has ended, its start time is not.

    Args:
        number: Process id.
        start: When it started, as ``/proc`` has it.
    """

    def __init__(self, number: int, start: str) -> None:
        self._number = number
        self._start = start

    @classmethod
    def find(cls, process: str) -> "WatchedProcess | None":
        """The process that :func:`own_process` described, None if it cannot be seen from here."""
        host, number, start = process.split(" ")
        return cls(int(number), start) if host and start and host == _host() else None

    @property
    def has_ended(self) -> bool:
        """Whether it is gone, or a zombie."""
        status = _status(self._number)
        if status is None:
            return os.path.exists("/proc/self/stat")  # else nothing can be seen here
        return status[0] in "ZX" or (status is not _UNKNOWN and status[1] != self._start)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped it."""
        status = _status(self._number)
        return status is not None and status[0] in "Tt" and status[1] == self._start


@final
class Presence(Liveness):
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

    @override
    def lost(self, among: Collection[int]) -> dict[int, str]:
        reasons = {}
        for rank in among:
            process = self.process(rank)
            if self._store.check([f"failed/{rank}"]):
                reasons[rank] = self._store.get(f"failed/{rank}").decode()
            elif rank != self._rank and process is not None and process.has_ended:
                reasons[rank] = ENDED
        return reasons

    @override
    def stopped(self, among: Collection[int]) -> frozenset[int]:
        known = {rank: self._known.get(rank) for rank in among}  # asks no store
        return frozenset(rank for rank, process in known.items() if process is not None and process.is_stopped)

    @override
    def _describe(self, rank: int) -> str:
        if self.stopped([rank]):
            return STOPPED
        return "hangs, is slow, or is in a hook that takes longer" if self.has_come(rank) else "has never been there"


def alive(beat: int, moves: int) -> str:
    """The state of a rank that lives.

    Args:
        beat: Of the thread that says so.
        moves: How often the rank's main thread has shown that it gets on.
    """
    return f"{_ALIVE} {beat} {moves}"


def left() -> str:
    """The state of a rank that has left in good order."""
    return _LEFT


def dead(reason: str = "") -> str:
    """The state of a rank that has failed, or was seen to have died, and why."""
    return f"{_DEAD} {reason or 'it has failed'}"


@final
class Heartbeats:
    """The states of all ranks as they were last seen, and since when they have not changed.

    Silence is measured up to the last look, not up to now: nothing is known of a rank while the store does not answer.

    Args:
        ranks: The ranks.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.seen = time.monotonic()
        self._states = {rank: _State("", 0, self.seen, self.seen) for rank in ranks}

    def see(self, states: Mapping[int, str]) -> None:
        """Take notice of the states that the ranks have now."""
        self.seen = time.monotonic()
        for rank, text in states.items():
            known = self._states[rank]
            if text != known.text:
                moves = int(text.split(" ")[2]) if text.startswith(_ALIVE) else known.moves
                moved = self.seen if moves != known.moves else known.moved
                self._states[rank] = _State(text, moves, self.seen, moved)

    @property
    def left(self) -> frozenset[int]:
        """The ranks that have left in good order."""
        return frozenset(rank for rank, state in self._states.items() if state.text == _LEFT)

    @property
    def dead(self) -> dict[int, str]:
        """The ranks that have failed, or of which others say that they have died; with the reason."""
        dead = {rank: state.text for rank, state in self._states.items() if state.text.startswith(_DEAD)}
        return {rank: text.partition(" ")[2] for rank, text in dead.items()}

    def unheard(self, seconds: float) -> frozenset[int]:
        """The ranks whose heartbeat has not changed for so long: their processes do not run, or are cut off."""
        return frozenset(rank for rank, state in self._states.items() if self.seen - state.heard > seconds)

    def unmoved(self, seconds: float) -> frozenset[int]:
        """The ranks whose main thread has not got on for so long."""
        return frozenset(rank for rank, state in self._states.items() if self.seen - state.moved > seconds)


@final
@dataclass(frozen=True)
class _State:
    text: str
    moves: int
    heard: float  # when the text last changed
    moved: float


def own_process() -> str:
    """What :class:`WatchedProcess` needs to know of this process, to be handed to others."""
    status = _status(os.getpid())
    return f"{_host()} {os.getpid()} {'' if status is None else status[1]}"


def _status(number: int) -> tuple[str, str] | None:
    """State and start time of a process, None if there is none; not known where this process cannot look."""
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except OSError:  # no descriptor is left, or it is forbidden: that says nothing of the other process
        return _UNKNOWN
    return (fields[_STATE], fields[_START]) if len(fields) > _START else None


def _host() -> str:
    """Within which a process id means one process: a boot of a machine, and a namespace; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
