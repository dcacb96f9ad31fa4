"""Chunks in memory that this process maps, each under a lock of its own: what a center is made of."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.served_center.interface import CenterService
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.transport.errors import CenterError, CenterTimeoutError
from lightning_easgd.transport.range_locks import LockTimeoutError
from lightning_easgd.transport.waiting import in_vain

__all__ = ["HEADER_WORDS", "KeptChunks"]

# Words of a chunk's header.
_VERSION, _HOLDER, _CHANGING, _INTERRUPTIONS = 0, 1, 2, 3
HEADER_WORDS = 8
"""64-bit integers beside each chunk: its version, who holds it, and whether it is whole."""


class KeptChunks(CenterService):
    """A :class:`CenterService` that does the arithmetic itself, under the lock of the chunk.

    Args:
        layout: The chunks of the whole vector.
        dtype: float32 or float64.
        exchange: What a message does.
        headers: Of each chunk that is kept here, ``HEADER_WORDS`` integers.
        stores: Of each chunk that is kept here, the rule's stores.
        timeout: Seconds that an operation may wait for another holder of its chunk.
        rank: This process's rank, shown to those who wait for it; None if only its own threads do.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        exchange: ServedExchange,
        headers: Mapping[int, MutableSequence[int] | memoryview],
        stores: Mapping[int, Sequence[Tensor]],
        *,
        timeout: float,
        rank: int | None = None,
    ) -> None:
        super().__init__(layout, dtype)
        self._exchange = exchange
        self._timeout = timeout
        self._rank = rank
        self._headers = dict(headers)
        self._stores = dict(stores)
        self._closed = False

    @override
    @torch.no_grad()  # of each thread that serves; a rule may hold parameters
    def exchange(self, chunk: int, message: Tensor, rate: float) -> int:
        with self._holding(chunk) as header:
            version = header[_VERSION]
            header[_CHANGING] = 1
            try:
                self._exchange.apply_(self._stores[chunk], message, rate, version)
            except Exception as error:  # of a rule of somebody's own; a client must not take it for a lost connection
                raise CenterError(
                    f"{type(self).__name__}: {self._exchange.rule!r} could not move chunk {chunk} of the center at its"
                    f" version {version}: move_ raised {error!r}; mend the rule."
                ) from error
            header[_VERSION] = version + 1
            header[_CHANGING] = 0
            return version

    @override
    def read(self, chunk: int, into: Tensor, store: int = 0) -> int:
        with self._holding(chunk) as header:
            into.copy_(self._stores[chunk][store])
            return header[_VERSION]

    @override
    def write(self, chunk: int, value: Tensor, store: int = 0, version: int | None = None) -> None:
        with self._holding(chunk) as header:
            self._stores[chunk][store].copy_(value)
            if version is not None:
                header[_VERSION] = version

    @override
    def keeps(self, chunk: int, store: int) -> bool:
        return chunk in self._stores and store < self._exchange.rule.stores

    def interruptions(self) -> dict[int, int]:
        """The chunks in which a worker died, or raised, while it changed them, with how often that happened."""
        return {chunk: header[_INTERRUPTIONS] for chunk, header in self._headers.items() if header[_INTERRUPTIONS]}

    @override
    def close(self) -> None:
        self._closed = True
        self._stores.clear()
        self._headers.clear()

    @abstractmethod
    def _lock(self, chunk: int) -> AbstractContextManager[None]:
        """Context in which nobody else holds the chunk; raises :class:`LockTimeoutError` after the timeout."""

    @contextmanager
    def _holding(self, chunk: int) -> Iterator[MutableSequence[int] | memoryview]:
        """Context in which nobody else holds the chunk, whose header it is."""
        if self._closed:
            raise CenterError(f"{type(self).__name__}: it has been closed on this rank.")
        header = self._headers[chunk]
        try:
            with self._lock(chunk):
                header[_HOLDER] = 0 if self._rank is None else self._rank + 1
                if header[_CHANGING]:
                    header[_CHANGING] = 0
                    header[_INTERRUPTIONS] += 1
                yield header
                header[_HOLDER] = 0
        except LockTimeoutError:
            others = "another thread of this process" if self._rank is None else "another rank"
            holder = f"rank {header[_HOLDER] - 1}" if header[_HOLDER] else others
            who = f"{type(self).__name__}(timeout={self._timeout:g} s)"
            remedy = "It is stopped or stuck; when it ends its lock is given back at once."
            raise CenterTimeoutError(
                in_vain(who, f"an operation on chunk {chunk}", self._timeout, f"{holder} holds it", remedy)
            ) from None
