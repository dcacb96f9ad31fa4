"""A flat vector in memory that the processes of one host share."""

import mmap
import os
import secrets
import struct
from contextlib import suppress
from typing import final

import torch
from typing_extensions import override

from lightning_easgd.transport.errors import SharedMemoryUnavailableError
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.memory import allocate_shared
from lightning_easgd.transport.processes import is_stopped
from lightning_easgd.transport.shared_counts import SEMAPHORE_BYTES, PublishedCount, ReadCount

__all__ = ["SharedVector"]

# In a vector's memory: its identity, its size in bytes, two semaphores for each reader, and after _DATA the elements.
_IDENTITY, _SIZE, _SEMAPHORES, _DATA = 0, 16, 64, 2**16
_LENGTH = struct.Struct("=q")
_MOST_READERS = (_DATA - _SEMAPHORES) // (2 * SEMAPHORE_BYTES)


@final
class SharedVector(ForkAware):
    """A flat vector in memory that other processes of the host can map, and two counts that its owner publishes.

    The memory is anonymous: it is gone with the last process that maps it, however that ends.

    Args:
        descriptor: Descriptor of the memory; the object takes it over.
        dtype: Dtype of the elements.
        path: Where the memory was found, None for its owner.
        reader: Which of the readers this process is.

    Attributes:
        elements: The vector, shape (elements,).
        dtype: As given.
    """

    def __init__(self, descriptor: int, dtype: torch.dtype, path: str | None = None, reader: int = 0) -> None:
        super().__init__()
        self._descriptor: int | None = descriptor
        self._path = path
        self.dtype = dtype
        try:
            self._memory = mmap.mmap(descriptor, 0)
        except OSError as error:
            self.abandon()
            raise SharedMemoryUnavailableError(
                f"SharedVector: the memory cannot be mapped: {error.strerror}."
            ) from error
        (size,) = _LENGTH.unpack_from(self._memory, _SIZE)
        count = size // dtype.itemsize
        self.elements = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=_DATA) if count else (
            torch.empty(0, dtype=dtype)
        )  # fmt: skip
        self._written: PublishedCount | ReadCount
        self._read: PublishedCount | ReadCount
        if path is None:
            self._written, self._read = PublishedCount([]), PublishedCount([])
        else:
            self._written, self._read = map(ReadCount, self._semaphores(reader))

    @classmethod
    def create(cls, numel: int, dtype: torch.dtype) -> "SharedVector":
        """Allocate a vector of zeros.

        Raises:
            SharedMemoryUnavailableError: If this platform cannot share memory.
            CenterError: If there is not enough memory.
        """
        size = numel * dtype.itemsize
        descriptor = allocate_shared(_DATA + size, "lightning_easgd-vector", "SharedVector: a worker's vector")
        os.pwrite(descriptor, secrets.token_bytes(_SIZE) + _LENGTH.pack(size), _IDENTITY)
        return cls(descriptor, dtype)

    @classmethod
    def attach(cls, address: str, dtype: torch.dtype, reader: int = 0) -> "SharedVector":
        """Map the vector of another process of this host, which must live.

        Args:
            address: Its :attr:`address`.
            dtype: Dtype of the elements.
            reader: Which of the readers that its owner admitted this is; no two have one number.

        Raises:
            SharedMemoryUnavailableError: If it cannot be reached.
        """
        path, _, identity = address.rpartition("#")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryUnavailableError(f"{path}: {error.strerror}") from error
        try:
            found = os.pread(descriptor, _SIZE, _IDENTITY).hex()
        except OSError:  # no memory at all
            found = ""
        if found != identity:
            os.close(descriptor)
            raise SharedMemoryUnavailableError(f"{path}: something else is there")
        return cls(descriptor, dtype, path, reader)

    def admit(self, readers: int, own: int | None = None) -> None:
        """Publish the counts to so many readers; called by the owner before any of them attaches.

        Args:
            readers: How many there are, the owner among them.
            own: Which of them is the owner, who needs no word from itself; None if none is.

        Raises:
            SharedMemoryUnavailableError: If they are too many, or this platform has no semaphores in shared memory.
        """
        if readers > _MOST_READERS:
            raise SharedMemoryUnavailableError(f"SharedVector: more than {_MOST_READERS} workers on one host.")
        each = [self._semaphores(reader) for reader in range(readers) if reader != own]
        self._written = PublishedCount([written for written, _ in each])
        self._read = PublishedCount([read for _, read in each])

    @property
    def address(self) -> str:
        """Where other processes find it; valid while this one, its owner, keeps it open."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}#{self._memory[:_SIZE].hex()}"

    @property
    def owner_lives(self) -> bool:
        """Whether the process that created it still has it open."""
        if self._path is None or self._descriptor is None:
            return True
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            return False

    @property
    def owner_is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped its creator."""
        return self._path is not None and is_stopped(self.owner)

    @property
    def owner(self) -> int:
        """Process id of its creator."""
        return os.getpid() if self._path is None else int(self._path.split("/")[2])

    def publish_written(self, exchanges: int) -> None:
        """Say that the owner's part of this exchange is there."""
        assert isinstance(self._written, PublishedCount)
        self._written.publish(exchanges)

    def publish_read(self, exchanges: int) -> None:
        """Say that the owner has read everybody's part of this exchange."""
        assert isinstance(self._read, PublishedCount)
        self._read.publish(exchanges)

    @property
    def written(self) -> int:
        """The last exchange of which the owner's part is there."""
        return self._written.value

    @property
    def read(self) -> int:
        """The last exchange that the owner has read everybody's part of."""
        return self._read.value

    def close(self) -> None:
        """Let go of it."""
        self.abandon()
        self.elements = torch.empty(0)
        self._written = self._read = PublishedCount([])  # nothing reaches into the memory any more
        with suppress(BufferError):  # somebody still has a view: the mapping goes with that
            self._memory.close()

    @override
    def abandon(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _semaphores(self, reader: int) -> tuple[int, int]:
        """Addresses of a reader's semaphores."""
        memory = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        first = memory + _SEMAPHORES + 2 * SEMAPHORE_BYTES * reader
        return first, first + SEMAPHORE_BYTES
