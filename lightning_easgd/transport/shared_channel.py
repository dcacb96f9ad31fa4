"""Sums of a few integers over the workers of one host, in shared memory."""

from collections import deque
from datetime import timedelta
from typing import final

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from typing_extensions import override

from lightning_easgd.transport.channel import Channel, ExchangeError, Transfer
from lightning_easgd.transport.shared_vectors import SharedVectors, shared_vectors

__all__ = ["ROW", "SharedChannel", "shared_channel"]

_LONGEST = 9  # integers of a sum that fits
ROW = 1 + _LONGEST
"""Elements of a vector that a sum takes: how many integers it has, then the integers."""


@final
class SharedChannel(Channel):
    """A channel whose sums of vectors of up to nine int64 go through memory that all workers map; others go elsewhere.

    Announcements are such sums. A process group takes some tenths of a millisecond for one, wherever the workers are,
    most of it in threads that wake each other up; here it takes some hundredths, in the callers' threads alone.

    A vector has a row for each sum, used in turn. A row is written again when all have read it: a worker may start as
    many sums as there are rows before it waits for the first, and :meth:`sum` waits for workers that are so far behind.
    Workers whose sums have different lengths are told so, unless one is short and the other is not.

    Args:
        vectors: One for each worker, of int64, attached; a multiple of ``ROW`` elements. The object takes them over.
        otherwise: The channel of the other sums; the object takes it over.
    """

    def __init__(self, vectors: SharedVectors, otherwise: Channel) -> None:
        self._vectors = vectors
        self._otherwise = otherwise
        self._rows = [list(vector.view(-1, ROW)) for vector in vectors.of_all]
        self._started = 0
        self._under_way: deque[_SharedTransfer] = deque()
        self.rank = otherwise.rank
        self.size = otherwise.size
        self.user = otherwise.user

    @override
    def sum(self, buffer: Tensor) -> Transfer:
        if buffer.dtype != torch.int64 or buffer.dim() != 1 or buffer.numel() > _LONGEST:
            return self._otherwise.sum(buffer)
        number = self._started + 1
        own = self._rows[self.rank]
        self._vectors.wait_until_read(number - len(own))
        own[number % len(own)][: 1 + buffer.numel()] = torch.tensor([buffer.numel(), *buffer.tolist()])
        self._vectors.publish_written(number)
        self._started = number  # now: a sum that an exception cut short has not taken its turn
        transfer = _SharedTransfer(self, number, buffer)
        self._under_way.append(transfer)
        return transfer

    @override
    def bytes_sent(self, nbytes: int) -> int:
        return nbytes if nbytes <= 8 * _LONGEST else self._otherwise.bytes_sent(nbytes)

    @override
    def close(self) -> None:
        self._rows.clear()
        self._under_way.clear()
        self._vectors.close()
        self._otherwise.close()

    def receive(self, number: int) -> None:
        """Finish the sums up to a number, in their order: only then is what has been read one number."""
        while self._under_way and self._under_way[0].number <= number:
            transfer = self._under_way[0]
            self._vectors.wait_until_written(transfer.number)
            rows = [rows[transfer.number % len(rows)].tolist() for rows in self._rows]
            numel = transfer.buffer.numel()
            if any(count != numel for count, *_ in rows):
                raise ExchangeError(
                    f"{self.user}: the workers add up different things; build the same model and optimizer on every"
                    " rank."
                )
            parts = (row[1 : 1 + numel] for row in rows)
            transfer.buffer.copy_(torch.tensor([sum(column) for column in zip(*parts, strict=True)]))
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


def shared_channel(store: Store, channel: Channel, timeout: timedelta, sums: int) -> Channel:
    """A channel that sums up a few integers in shared memory and all else on another; or that one, with a warning.

    Args:
        store: The workers' store.
        channel: Reduces CPU tensors.
        timeout: How long to wait for another worker.
        sums: How many sums of integers a worker may be ahead of another.
    """
    vectors = shared_vectors(ROW * sums, torch.int64, store, channel, timeout)
    return channel if vectors is None else SharedChannel(vectors, channel)
