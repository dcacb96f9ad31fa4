"""Sums of a few integers over the workers of one host, in shared memory."""

from collections import deque
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.channel import Channel, ExchangeError, Transfer
from lightning_easgd.averagers.shared_vectors import SharedVectors

__all__ = ["ELEMENTS", "SharedChannel"]

_LONGEST = 7  # integers of a sum that fits
_SUMS = 64  # that may be under way
ELEMENTS = _SUMS * (1 + _LONGEST)
"""The size of a vector: each sum has a row of it, with how many integers it adds up, and they."""


@final
class SharedChannel(Channel):
    """A channel whose sums of vectors of up to seven int64 go through memory that all workers map; others go elsewhere.

    Announcements are such sums. A process group takes some tenths of a millisecond for one, wherever the workers are,
    most of it in threads that wake each other up; here it takes some hundredths, in the callers' threads alone.

    A worker's part of the k-th sum lies in row k mod 64 of its vector, and is overwritten when all have read it.

    Args:
        vectors: One for each worker, of ``ELEMENTS`` int64; the object takes them over.
        otherwise: The channel of the other sums; the object takes it over.
    """

    def __init__(self, vectors: SharedVectors, otherwise: Channel) -> None:
        self._vectors = vectors
        self._otherwise = otherwise
        self._own = _rows(vectors.own)
        self._all: list[list[Tensor]] = []  # the rows of all ranks
        self._started = 0
        self._under_way: deque[_SharedTransfer] = deque()
        self.rank = otherwise.rank
        self.size = otherwise.size

    @override
    def sum(self, buffer: Tensor) -> Transfer:
        if buffer.dtype != torch.int64 or buffer.dim() != 1 or buffer.numel() > _LONGEST:
            return self._otherwise.sum(buffer)
        self._started += 1
        self._vectors.wait_until_read(self._started - _SUMS)
        self._own[self._started % _SUMS][: 1 + buffer.numel()] = torch.tensor([buffer.numel(), *buffer.tolist()])
        self._vectors.publish_written(self._started)
        transfer = _SharedTransfer(self, self._started, buffer)
        self._under_way.append(transfer)
        return transfer

    @override
    def bytes_sent(self, nbytes: int) -> int:
        return nbytes

    @override
    def close(self) -> None:
        self._all.clear()
        self._vectors.close()
        self._otherwise.close()

    def receive(self, number: int) -> None:
        """Finish the sums up to a number, in their order: only then is what all have read one number."""
        while self._under_way and self._under_way[0].number <= number:
            transfer = self._under_way[0]
            self._vectors.wait_until_written(transfer.number)
            self._all = self._all or [_rows(vector) for vector in self._vectors.all]
            values = [rows[transfer.number % _SUMS].tolist() for rows in self._all]
            numel = transfer.buffer.numel()
            if any(count != numel for count, *_ in values):
                raise ExchangeError(
                    "EASGDStrategy: the workers add up different things; build the same model and optimizer on every"
                    " rank."
                )
            transfer.buffer.copy_(torch.tensor([sum(column) for column in zip(*values, strict=True)][1 : 1 + numel]))
            self._vectors.publish_read(transfer.number)
            self._under_way.popleft()


@final
class _SharedTransfer(Transfer):
    """A sum under way.

    Args:
        channel: Where.
        number: Of the sum, from 1.
        buffer: What the sum replaces.
    """

    def __init__(self, channel: SharedChannel, number: int, buffer: Tensor) -> None:
        self._channel = channel
        self.number = number
        self.buffer = buffer

    @override
    def wait(self) -> None:
        self._channel.receive(self.number)


def _rows(vector: Tensor) -> list[Tensor]:
    return list(vector.view(_SUMS, 1 + _LONGEST))
