"""A center in memory that all ranks of one node map."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from lightning_easgd.method.rules import CenterRule
from lightning_easgd.served_center.interface import CenterService
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.transport.errors import CenterError, CenterTimeoutError
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.range_locks import LockTimeoutError, RangeLocks
from lightning_easgd.transport.shared_segment import SharedSegment

__all__ = ["SharedMemoryCenter"]

_ALIGNMENT = 64
# Words of a chunk's header.
_VERSION, _HOLDER, _CHANGING, _INTERRUPTIONS, _WORDS = 0, 1, 2, 3, 8


@final
class SharedMemoryCenter(CenterService, ForkAware):
    """One node's part of the center, in memory that every rank of the node maps.

    The worker does the arithmetic itself, under the lock of the chunk: nothing is serialised, nobody serves. The
    kernel gives a dead holder's lock back. A worker that dies within the few instructions that change the center leaves
    its chunk with some elements changed and the others not; every other chunk is untouched.

    Create it on one rank with :meth:`create`, hand :attr:`address` to the others, and have them :meth:`attach` while
    the creator lives. The memory is anonymous: it is gone with the last process that maps it.

    Args:
        segment: The memory; the object takes it over.
        layout: The chunks of the whole vector.
        dtype: float32 or float64.
        rule: What an exchange does.
        held: The chunks kept here, in the order in which they lie in the memory.
        rank: This process's rank, shown to those who wait for it.
        timeout: Seconds that an operation may wait for another holder of its chunk.
    """

    def __init__(
        self,
        segment: SharedSegment,
        layout: Layout,
        dtype: torch.dtype,
        rule: CenterRule,
        *,
        held: Sequence[int],
        rank: int,
        timeout: float,
    ) -> None:
        CenterService.__init__(self, layout, dtype)
        ForkAware.__init__(self)
        self._rule = rule
        self._rank = rank
        self._timeout = timeout
        self._segment = segment
        try:
            self._locks = RangeLocks(segment.descriptor)
        except BaseException:
            segment.close()
            raise
        self._rows = {chunk: row for row, chunk in enumerate(held)}
        offset = SharedSegment.RESERVED + 8 * _WORDS * len(held)
        headers = memoryview(segment.memory)[SharedSegment.RESERVED : offset].cast("q")
        self._headers = [headers[_WORDS * row : _WORDS * (row + 1)] for row in range(len(held))]
        self._stores: list[list[Tensor]] = []
        for chunk in held:
            stores = []
            for _ in range(rule.stores):
                stores.append(torch.frombuffer(segment.memory, dtype=dtype, count=layout.size(chunk), offset=offset))
                offset += _padded(stores[-1].nbytes)
            self._stores.append(stores)
        self._closed = False

    @classmethod
    def create(
        cls,
        layout: Layout,
        dtype: torch.dtype,
        rule: CenterRule,
        *,
        held: Sequence[int],
        rank: int,
        timeout: float = 60.0,
    ) -> "SharedMemoryCenter":
        """Allocate the memory, all zeros.

        Raises:
            SharedMemoryUnavailableError: If the platform lacks what it needs.
            CenterError: If there is not enough memory.
        """
        size = _size(layout, held, rule, dtype)
        what = f"SharedMemoryCenter(size={size}): the node's part of the center"
        segment = SharedSegment.create(size, "lightning_easgd-center", what)
        return cls(segment, layout, dtype, rule, held=held, rank=rank, timeout=timeout)

    @classmethod
    def attach(
        cls,
        address: str,
        layout: Layout,
        dtype: torch.dtype,
        rule: CenterRule,
        *,
        held: Sequence[int],
        rank: int,
        timeout: float = 60.0,
    ) -> "SharedMemoryCenter":
        """Map the memory that another rank of this node created with the same arguments.

        Raises:
            SharedMemoryUnavailableError: If it cannot be reached: the ranks do not see each other's processes.
        """
        segment = SharedSegment.attach(address)
        return cls(segment, layout, dtype, rule, held=held, rank=rank, timeout=timeout)

    @property
    def address(self) -> str:
        """Where the other ranks of the node find the memory; valid while this process keeps it open."""
        return self._segment.address

    def exchange(self, chunk: int, message: Tensor, rate: float) -> int:  # noqa: D102
        row = self._rows[chunk]
        header = self._headers[row]
        with self._holding(chunk):
            version = header[_VERSION]
            header[_CHANGING] = 1
            self._rule.apply_(self._stores[row], message, rate, version)
            header[_VERSION] = version + 1
            header[_CHANGING] = 0
            return version

    def read(self, chunk: int, into: Tensor, store: int = 0) -> int:  # noqa: D102
        row = self._rows[chunk]
        with self._holding(chunk):
            into.copy_(self._stores[row][store])
            return self._headers[row][_VERSION]

    def write(self, chunk: int, value: Tensor, store: int = 0, version: int | None = None) -> None:  # noqa: D102
        row = self._rows[chunk]
        with self._holding(chunk):
            self._stores[row][store].copy_(value)
            if version is not None:
                self._headers[row][_VERSION] = version

    def keeps(self, chunk: int, store: int) -> bool:  # noqa: D102
        return chunk in self._rows and store < self._rule.stores

    def interruptions(self) -> dict[int, int]:
        """The chunks in which a worker died, or raised, while it changed them, with how often that happened."""
        counts = {chunk: self._headers[row][_INTERRUPTIONS] for chunk, row in self._rows.items()}
        return {chunk: count for chunk, count in counts.items() if count}

    def close(self) -> None:  # noqa: D102
        if self._closed:
            return
        self._closed = True
        self._locks.close()
        self._stores.clear()
        self._headers.clear()
        self._segment.close()

    def abandon(self) -> None:  # noqa: D102
        self.close()

    @contextmanager
    def _holding(self, chunk: int) -> Iterator[None]:
        if self._closed:
            raise CenterError("SharedMemoryCenter: it has been closed on this rank.")
        row = self._rows[chunk]
        header = self._headers[row]
        try:
            with self._locks.hold(row, self._timeout):
                header[_HOLDER] = self._rank + 1
                if header[_CHANGING]:
                    header[_CHANGING] = 0
                    header[_INTERRUPTIONS] += 1
                yield
                header[_HOLDER] = 0
        except LockTimeoutError:
            holder = f"rank {header[_HOLDER] - 1}" if header[_HOLDER] else "another rank"
            raise CenterTimeoutError(
                f"SharedMemoryCenter(timeout={self._timeout:g}): rank {self._rank} has waited longer than that for"
                f" chunk {chunk}, which {holder} holds. That rank is stopped or stuck; end it, and its lock is given"
                " back at once."
            ) from None


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _size(layout: Layout, held: Sequence[int], rule: CenterRule, dtype: torch.dtype) -> int:
    elements = [layout.size(chunk) for chunk in held]
    headers = SharedSegment.RESERVED + 8 * _WORDS * len(held)
    return headers + sum(rule.stores * _padded(size * dtype.itemsize) for size in elements)
