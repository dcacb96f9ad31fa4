"""A center in memory that all ranks of one node map."""

import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import final

import torch
from torch import Tensor

from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.served_center.interface import CenterService
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.transport.errors import CenterError, CenterTimeoutError, SharedMemoryUnavailableError
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.memory import allocate_shared
from lightning_easgd.transport.range_locks import LockTimeoutError, RangeLocks

__all__ = ["SharedMemoryCenter"]

_ALIGNMENT = 64
_IDENTITY = 64  # bytes at the start of the memory
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
        descriptor: Descriptor of the memory; the object takes it over.
        layout: The chunks of the whole vector.
        dtype: float32 or float64.
        exchange: What a message does.
        held: The chunks kept here, in the order in which they lie in the memory.
        rank: This process's rank, shown to those who wait for it.
        timeout: Seconds that an operation may wait for another holder of its chunk.
    """

    def __init__(
        self,
        descriptor: int,
        layout: Layout,
        dtype: torch.dtype,
        exchange: ServedExchange,
        *,
        held: Sequence[int],
        rank: int,
        timeout: float,
    ) -> None:
        CenterService.__init__(self, layout, dtype)
        ForkAware.__init__(self)
        self._exchange = exchange
        self._rank = rank
        self._timeout = timeout
        self._descriptor = descriptor
        with ExitStack() as opened:  # closed again if something is missing here
            opened.callback(os.close, descriptor)
            try:
                self._memory = mmap.mmap(descriptor, _size(layout, held, exchange, dtype))
            except OSError as error:
                raise SharedMemoryUnavailableError(
                    f"SharedMemoryCenter: the memory cannot be mapped: {error.strerror}."
                ) from error
            opened.callback(self._memory.close)
            self._locks = RangeLocks(descriptor)
            opened.pop_all()
        self._rows = {chunk: row for row, chunk in enumerate(held)}
        headers = memoryview(self._memory)[_IDENTITY : _IDENTITY + 8 * _WORDS * len(held)].cast("q")
        self._headers = [headers[_WORDS * row : _WORDS * (row + 1)] for row in range(len(held))]
        self._stores: list[list[Tensor]] = []
        offset = _IDENTITY + 8 * _WORDS * len(held)
        for chunk in held:
            stores = []
            for _ in range(exchange.rule.stores):
                stores.append(torch.frombuffer(self._memory, dtype=dtype, count=layout.size(chunk), offset=offset))
                offset += _padded(stores[-1].nbytes)
            self._stores.append(stores)
        self._closed = False

    @classmethod
    def create(
        cls,
        layout: Layout,
        dtype: torch.dtype,
        exchange: ServedExchange,
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
        size = _size(layout, held, exchange, dtype)
        what = f"SharedMemoryCenter(size={size}): the node's part of the center"
        descriptor = allocate_shared(size, "lightning_easgd-center", what)
        os.pwrite(descriptor, secrets.token_bytes(_IDENTITY), 0)
        return cls(descriptor, layout, dtype, exchange, held=held, rank=rank, timeout=timeout)

    @classmethod
    def attach(
        cls,
        address: str,
        layout: Layout,
        dtype: torch.dtype,
        exchange: ServedExchange,
        *,
        held: Sequence[int],
        rank: int,
        timeout: float = 60.0,
    ) -> "SharedMemoryCenter":
        """Map the memory that another rank of this node created with the same arguments.

        Raises:
            SharedMemoryUnavailableError: If it cannot be reached: the ranks do not see each other's processes.
        """
        path, _, identity = address.rpartition("#")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryUnavailableError(
                f"SharedMemoryCenter.attach(address={path!r}): {error.strerror}. The ranks of a node must run in one"
                " process namespace and as one user to share memory."
            ) from error
        if os.pread(descriptor, _IDENTITY, 0).hex() != identity:
            os.close(descriptor)
            raise SharedMemoryUnavailableError(
                f"SharedMemoryCenter.attach(address={path!r}): another process's memory is there. The ranks of a node"
                " must run in one process namespace to share memory."
            )
        return cls(descriptor, layout, dtype, exchange, held=held, rank=rank, timeout=timeout)

    @property
    def address(self) -> str:
        """Where the other ranks of the node find the memory; valid while this process keeps it open."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}#{self._memory[:_IDENTITY].hex()}"

    def exchange(self, chunk: int, message: Tensor, rate: float) -> int:  # noqa: D102
        row = self._rows[chunk]
        header = self._headers[row]
        with self._holding(chunk):
            version = header[_VERSION]
            header[_CHANGING] = 1
            self._exchange.apply_(self._stores[row], message, rate, version)
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
        return chunk in self._rows and store < self._exchange.rule.stores

    def interruptions(self) -> dict[int, int]:
        """The chunks in which a worker died, or raised, while it changed them, with how often that happened."""
        counts = {chunk: self._headers[row][_INTERRUPTIONS] for chunk, row in self._rows.items()}
        return {chunk: count for chunk, count in counts.items() if count}

    def close(self) -> None:  # noqa: D102
        if self._closed:
            return
        self._closed = True
        self._locks.close()
        os.close(self._descriptor)
        self._stores.clear()
        self._headers.clear()
        with suppress(BufferError):  # another thread is in an exchange: the mapping goes when that ends
            self._memory.close()

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


def _size(layout: Layout, held: Sequence[int], exchange: ServedExchange, dtype: torch.dtype) -> int:
    elements = [layout.size(chunk) for chunk in held]
    return (
        _IDENTITY
        + 8 * _WORDS * len(held)
        + sum(exchange.rule.stores * _padded(size * dtype.itemsize) for size in elements)
    )
