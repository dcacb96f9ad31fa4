"""Locks between processes, one for each byte of a file, which the kernel gives back when their holder dies."""

import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from typing_extensions import override

from lightning_easgd.transport.errors import SharedMemoryUnavailableError
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.waiting import wait_until

__all__ = ["LockTimeoutError", "RangeLocks"]

_PROBED = 2**40  # a byte that is no chunk's


class LockTimeoutError(Exception):
    """Another holder kept the lock for longer than the caller would wait."""


@final
class RangeLocks(ForkAware):
    """Open-file-description locks on the bytes of one file.

    A lock belongs to the open file description through which it was taken: two threads exclude each other only if each
    has opened the file anew. The descriptors used here are never mapped and never inherited by a forked child, since
    either would keep the lock after its holder's death.

    What a holder has written is there for the next one: Linux changes a file's locks under one spin lock of that file,
    so that the release in the one's unlocking call and the acquisition in the other's locking call order their accesses
    on every processor, aarch64 included. (POSIX promises it of semaphores and mutexes alone, which outlive a death.)

    Waiting polls. The kernel's own wait (``F_OFD_SETLKW``) has no timeout, and would hang behind a stopped process.

    Args:
        descriptor: A descriptor of the file, which must stay open as long as this object is used.

    Raises:
        SharedMemoryUnavailableError: If this platform, kernel or file has no such locks.
    """

    def __init__(self, descriptor: int) -> None:
        if not hasattr(fcntl, "F_OFD_SETLK") or sys.maxsize < 2**32:
            raise SharedMemoryUnavailableError("RangeLocks: this platform has no open-file-description locks.")
        super().__init__()
        self._path = f"/proc/self/fd/{descriptor}"
        self._idle: list[int] = []
        self._descriptors: set[int] = set()
        self._probe()

    @contextmanager
    def hold(self, byte: int, timeout: float) -> Iterator[None]:
        """Hold the lock of one byte.

        Raises:
            LockTimeoutError: If it cannot be had within ``timeout`` seconds.
        """
        descriptor = self._borrow()
        try:
            if not wait_until(lambda: _try(descriptor, byte), timeout):
                raise LockTimeoutError
            try:
                yield
            finally:
                _set_lock(descriptor, fcntl.F_UNLCK, byte)
        finally:
            if descriptor in self._descriptors:  # not closed meanwhile
                self._idle.append(descriptor)

    def close(self) -> None:
        """Close all descriptors; no lock may be held."""
        self.abandon()

    @override
    def abandon(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        self._idle.clear()

    def _probe(self) -> None:
        """Take and give back a lock beyond those in use: some kernels and sandboxes know the call, and refuse it."""
        try:
            with self.hold(_PROBED, timeout=0.0):
                pass
        except LockTimeoutError:  # another rank probes: it works
            pass
        except OSError as error:
            self.abandon()
            raise SharedMemoryUnavailableError(
                f"RangeLocks: open-file-description locks are refused here ({error.strerror})."
            ) from error

    def _borrow(self) -> int:
        try:
            return self._idle.pop()
        except IndexError:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            self._descriptors.add(descriptor)
            return descriptor


def _try(descriptor: int, byte: int) -> bool:
    try:
        _set_lock(descriptor, fcntl.F_WRLCK, byte)
    except BlockingIOError:
        return False
    return True


def _set_lock(descriptor: int, kind: int, byte: int) -> None:
    # struct flock of 64-bit Linux: type, whence, start, length, pid (which must be 0 for these locks).
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("hhqqi0q", kind, os.SEEK_SET, byte, 1, 0))
