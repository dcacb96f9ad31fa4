"""A center in memory that all ranks of one node map."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.served_center.kept_chunks import HEADER_WORDS, KeptChunks
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.range_locks import RangeLocks
from lightning_easgd.transport.shared_segment import SharedSegment

__all__ = ["SharedMemoryCenter"]

_ALIGNMENT = 64  # bytes


@final
class SharedMemoryCenter(KeptChunks, ForkAware):
    """One node's part of the center, in memory that every rank of the node maps.

    The worker does the arithmetic itself, under the lock of the chunk: nothing is serialised, nobody serves. The
    kernel gives a dead holder's lock back. A worker that dies within the few instructions that change the center leaves
    its chunk with some elements changed and the others not; every other chunk is untouched.

    One rank creates it, with all numbers 0, and hands :attr:`address` to the others, which map it while the creator
    lives. The memory is anonymous: it is gone with the last process that maps it.

    Args:
        layout: The chunks of the whole vector.
        dtype: float32 or float64.
        exchange: What a message does.
        held: The chunks kept here, in the order in which they lie in the memory.
        rank: This process's rank, shown to those who wait for it.
        timeout: Seconds that an operation may wait for another holder of its chunk.
        address: Where another rank of this node, with the same arguments, has created it; None to create it here.

    Raises:
        SharedMemoryUnavailableError: If the platform lacks what it needs, or the memory cannot be reached.
        CenterError: If there is not enough memory.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        exchange: ServedExchange,
        *,
        held: Sequence[int],
        rank: int,
        timeout: float = 60.0,
        address: str | None = None,
    ) -> None:
        sizes = {chunk: -(-layout.size(chunk) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for chunk in held}
        offset = SharedSegment.RESERVED + 8 * HEADER_WORDS * len(held)
        if address is None:
            size = offset + exchange.rule.stores * sum(sizes.values())
            what = f"SharedMemoryCenter(size={size}): the node's part of the center"
            self._segment = SharedSegment.create(size, "lightning_easgd-center", what)
        else:
            self._segment = SharedSegment.attach(address)
        try:
            self._locks = RangeLocks(self._segment.descriptor)
        except BaseException:
            self._segment.close()
            raise
        memory = self._segment.memory
        words = memoryview(memory)[SharedSegment.RESERVED : offset].cast("q")
        headers = {chunk: words[HEADER_WORDS * row : HEADER_WORDS * (row + 1)] for row, chunk in enumerate(held)}
        stores: dict[int, list[Tensor]] = {chunk: [] for chunk in held}
        for chunk in held:
            for _ in range(exchange.rule.stores):
                count = layout.size(chunk)
                stores[chunk].append(torch.frombuffer(memory, dtype=dtype, count=count, offset=offset))
                offset += sizes[chunk]
        KeptChunks.__init__(self, layout, dtype, exchange, headers, stores, timeout=timeout, rank=rank)
        ForkAware.__init__(self)
        self._bytes = {chunk: row for row, chunk in enumerate(held)}  # that are locked

    @property
    def address(self) -> str:
        """Where the other ranks of the node find the memory; valid while this process keeps it open."""
        return self._segment.address

    @override
    def close(self) -> None:
        if not self._closed:
            super().close()
            self._locks.close()
            self._segment.close()

    @override
    def abandon(self) -> None:
        self.close()

    @override
    def _lock(self, chunk: int) -> AbstractContextManager[None]:
        return self._locks.hold(self._bytes[chunk], self._timeout)
