"""A center in ordinary memory, for the threads of one process."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor

from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.served_center.interface import CenterService
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.transport.errors import CenterTimeoutError

__all__ = ["InProcessCenter"]


@final
class InProcessCenter(CenterService):
    """A :class:`CenterService` for workers that are threads, and the shard of a node that has one rank.

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
        super().__init__(layout, dtype)
        self._exchange = exchange
        self._timeout = timeout
        held = range(len(layout.chunks)) if held is None else held
        self._stores = {
            chunk: list(torch.zeros(exchange.rule.stores, layout.size(chunk), dtype=dtype)) for chunk in held
        }
        self._versions = dict.fromkeys(held, 0)
        self._locks = {chunk: threading.Lock() for chunk in held}

    def exchange(self, chunk: int, message: Tensor, rate: float) -> int:  # noqa: D102
        with self._holding(chunk):
            version = self._versions[chunk]
            self._exchange.apply_(self._stores[chunk], message, rate, version)
            self._versions[chunk] = version + 1
            return version

    def read(self, chunk: int, into: Tensor, store: int = 0) -> int:  # noqa: D102
        with self._holding(chunk):
            into.copy_(self._stores[chunk][store])
            return self._versions[chunk]

    def write(self, chunk: int, value: Tensor, store: int = 0, version: int | None = None) -> None:  # noqa: D102
        with self._holding(chunk):
            self._stores[chunk][store].copy_(value)
            if version is not None:
                self._versions[chunk] = version

    def keeps(self, chunk: int, store: int) -> bool:  # noqa: D102
        return chunk in self._stores and store < self._exchange.rule.stores

    def close(self) -> None:  # noqa: D102
        self._stores = {}

    @contextmanager
    def _holding(self, chunk: int) -> Iterator[None]:
        if not self._locks[chunk].acquire(timeout=self._timeout):
            raise CenterTimeoutError(
                f"InProcessCenter(timeout={self._timeout:g}): another thread of this process has held chunk {chunk}"
                " for longer than that; it is stuck in an exchange."
            )
        try:
            yield
        finally:
            self._locks[chunk].release()
