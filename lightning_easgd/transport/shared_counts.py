"""Counts that one process publishes to others in shared memory, with the order of memory accesses that this needs.

What the publisher has written before :meth:`PublishedCount.publish` is there for a reader to whom the count is shown. A
plain number in the memory would not do: a processor such as aarch64's lets other processes see it before what was
written earlier, and neither Python nor a system call forbids that by contract. POSIX (Base Definitions, 4.12 Memory
Synchronization) names the functions that do synchronise memory between processes, ``sem_post`` and ``sem_trywait``
among them. So a count is handed on as posts to a semaphore of the reader's own, and the reader counts those that it has
taken. Nobody ever holds such a semaphore or waits in it: a process that dies or is stopped keeps none from another.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import final

from lightning_easgd.transport.errors import SharedMemoryUnavailableError

__all__ = ["SEMAPHORE_BYTES", "PublishedCount", "ReadCount"]

SEMAPHORE_BYTES = 64
"""Room for a ``sem_t``, which has 32 bytes on 64-bit Linux, in a cache line of its own."""


@final
class PublishedCount:
    """A count as its publisher has it; starts at 0.

    Args:
        semaphores: Addresses of zeroed shared memory, one for each reader.

    Raises:
        SharedMemoryUnavailableError: If this platform has no semaphores in shared memory.
    """

    def __init__(self, semaphores: Sequence[int]) -> None:
        self._semaphores = semaphores
        self.value = 0
        for semaphore in semaphores:
            if _library().sem_init(semaphore, 1, 0):
                raise SharedMemoryUnavailableError("PublishedCount: sem_init failed; no semaphores in shared memory.")

    def publish(self, value: int) -> None:
        """Let the readers see a count that is at least as high; what was written before is there when they do."""
        post = _library().sem_post
        for _ in range(value - self.value):
            for semaphore in self._semaphores:
                if post(semaphore):
                    raise OSError("PublishedCount: sem_post failed; its memory is not what it was.")
        self.value = max(value, self.value)


@final
class ReadCount:
    """A count as one of its readers has it.

    Args:
        semaphore: Address of this reader's semaphore.
    """

    def __init__(self, semaphore: int) -> None:
        self._semaphore = semaphore
        self._value = 0

    @property
    def value(self) -> int:
        """What has been published by now."""
        take = _library().sem_trywait
        while take(self._semaphore) == 0:
            self._value += 1
        return self._value


@cache
def _library() -> ctypes.PyDLL:
    """The C library; its calls here do not block, so that they need not let another thread run."""
    try:
        library = ctypes.PyDLL(None)
        library.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
        library.sem_post.argtypes = library.sem_trywait.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise SharedMemoryUnavailableError("PublishedCount: this platform has no POSIX semaphores.") from error
    return library
