"""The ranks' processes, as other processes of their host see them."""

import os
from typing import final

__all__ = ["WatchedProcess", "has_ended", "is_stopped", "own_process"]

_UNKNOWN = "?", ""
_STATE, _START = 0, 19  # fields of /proc/PID/stat after the name


def own_process() -> str:
    """What :class:`WatchedProcess` needs to know of this process, to be handed to others."""
    status = _status(os.getpid())
    return f"{_host()} {os.getpid()} {'' if status is None else status[1]}"


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
        return has_ended(self._number, self._start)

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped it."""
        return not self.has_ended and is_stopped(self._number)


def has_ended(number: int, start: str | None = None) -> bool:
    """Whether a process of this host is gone, a zombie, or another one than that which started then."""
    status = _status(number)
    if status is None:
        return os.path.exists("/proc/self/stat")  # else nothing can be seen here
    return status[0] in "ZX" or (status is not _UNKNOWN and start not in (None, status[1]))


def is_stopped(number: int) -> bool:
    """Whether a signal or a debugger has stopped a process of this host."""
    status = _status(number)
    return status is not None and status[0] in "Tt"


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
