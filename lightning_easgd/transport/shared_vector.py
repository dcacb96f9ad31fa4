"""A flat vector in memory that the processes of one host share."""

from typing import final

import torch

from lightning_easgd.transport.errors import SharedMemoryUnavailableError
from lightning_easgd.transport.processes import is_stopped
from lightning_easgd.transport.shared_counts import SEMAPHORE_BYTES, PublishedCount, ReadCount
from lightning_easgd.transport.shared_segment import SharedSegment

__all__ = ["SharedVector"]

# In a vector's memory: the segment's own, two semaphores for each reader, and after _DATA the elements.
_SEMAPHORES, _DATA = SharedSegment.RESERVED, 2**16  # bytes
_MOST_READERS = (_DATA - _SEMAPHORES) // (2 * SEMAPHORE_BYTES)


@final
class SharedVector:
    """A flat vector in memory that other processes of the host can map, and two counts that its owner publishes.

    Args:
        segment: The memory; the object takes it over.
        dtype: Dtype of the elements.
        reader: Which of the readers this process is, None for the owner.

    Attributes:
        elements: The vector, shape (elements,).
        dtype: As given.
    """

    def __init__(self, segment: SharedSegment, dtype: torch.dtype, reader: int | None = None) -> None:
        self._segment = segment
        self.dtype = dtype
        memory = segment.memory
        count = (len(memory) - _DATA) // dtype.itemsize
        self.elements = torch.frombuffer(memory, dtype=dtype, count=count, offset=_DATA) if count else (
            torch.empty(0, dtype=dtype)
        )  # fmt: skip
        self._written: PublishedCount | ReadCount = PublishedCount([])
        self._read: PublishedCount | ReadCount = PublishedCount([])
        if reader is not None:
            self._written, self._read = map(ReadCount, self._semaphores(reader))

    @classmethod
    def create(cls, numel: int, dtype: torch.dtype) -> "SharedVector":
        """Allocate a vector of zeros.

        Raises:
            SharedMemoryUnavailableError: If this platform cannot share memory.
            CenterError: If there is not enough memory.
        """
        size = _DATA + numel * dtype.itemsize
        return cls(SharedSegment.create(size, "lightning_easgd-vector", "SharedVector: a worker's vector"), dtype)

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
        return cls(SharedSegment.attach(address), dtype, reader)

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
        return self._segment.address

    @property
    def owner_lives(self) -> bool:
        """Whether the process that created it still has it open."""
        return self._segment.creator_has_it

    @property
    def owner_is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped its creator."""
        return is_stopped(self.owner)

    @property
    def owner(self) -> int:
        """Process id of its creator."""
        return self._segment.creator

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
        self.elements = torch.empty(0)
        self._written = self._read = PublishedCount([])  # nothing reaches into the memory any more
        self._segment.close()

    def _semaphores(self, reader: int) -> tuple[int, int]:
        """Addresses of a reader's semaphores."""
        memory = torch.frombuffer(self._segment.memory, dtype=torch.uint8).data_ptr()
        first = memory + _SEMAPHORES + 2 * SEMAPHORE_BYTES * reader
        return first, first + SEMAPHORE_BYTES
