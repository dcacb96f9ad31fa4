"""A center in ordinary memory, for the threads of one process."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from typing_extensions import override

from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.served_center.kept_chunks import HEADER_WORDS, KeptChunks
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.transport.range_locks import LockTimeoutError

__all__ = ["InProcessCenter"]


@final
class InProcessCenter(KeptChunks):
    """A center for workers that are threads, and the shard of a node that has one rank.

    Args:
        layout: The chunks of the whole vector.
        dtype: float32 or float64.
        exchange: What a message does.
        held: The chunks kept here; all of them if None.
        timeout: Seconds that an operation may wait for another thread.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        exchange: ServedExchange,
        *,
        held: Sequence[int] | None = None,
        timeout: float = 60.0,
    ) -> None:
        held = range(len(layout.chunks)) if held is None else held
        headers = {chunk: [0] * HEADER_WORDS for chunk in held}
        stores = {chunk: list(torch.zeros(exchange.rule.stores, layout.size(chunk), dtype=dtype)) for chunk in held}
        super().__init__(layout, dtype, exchange, headers, stores, timeout=timeout)
        self._locks = {chunk: threading.Lock() for chunk in held}

    @override
    @contextmanager
    def _lock(self, chunk: int) -> Iterator[None]:
        if not self._locks[chunk].acquire(timeout=self._timeout):
            raise LockTimeoutError
        try:
            yield
        finally:
            self._locks[chunk].release()
