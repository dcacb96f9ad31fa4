"""Sums and messages over connections of every worker with every other: two one-way delays, however many workers."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.transport.channel import Channel, MessageChannel, MessageTransfer, Transfer
from lightning_easgd.transport.mesh import Mesh, Messages
from lightning_easgd.transport.tcp_wire import as_bytes

__all__ = ["DirectChannel", "DirectMessageChannel"]

_SMALL = 4096  # bytes that all send to all


@final
class DirectChannel(Channel):
    """Sums of CPU tensors, each worker's part of a sum made by that worker.

    Every worker sends each of the others its part, adds up what it gets in the order of the ranks, and sends the sum to
    all: a reduce-scatter and an all-gather, each of one one-way delay, and together of as many bytes as a ring's. The
    second begins on the mesh's thread when the first is there. What is small goes whole to all, in one delay.

    Args:
        mesh: The connections; the object takes them over.
        user: The name of who exchanges, for errors.
    """

    def __init__(self, mesh: Mesh, user: str) -> None:
        self.rank, self.size, self.user = mesh.rank, mesh.size, user
        self._mesh = mesh
        self._others = [rank for rank in range(mesh.size) if rank != mesh.rank]

    @override
    def sum(self, buffer: Tensor) -> Transfer:
        flat = buffer.detach().view(-1)
        return self._sum_small(flat) if flat.nbytes <= _SMALL else self._sum_large(flat)

    @override
    def bytes_sent(self, nbytes: int) -> int:
        return (self.size - 1) * nbytes if nbytes <= _SMALL else super().bytes_sent(nbytes)

    @override
    def close(self) -> None:
        self._mesh.close()

    def _sum_small(self, flat: Tensor) -> Transfer:
        rows = flat.repeat(self.size, 1)

        def add_up() -> None:
            torch.sum(rows, 0, out=flat)

        return self._mesh.post(
            0,
            sends=dict.fromkeys(self._others, as_bytes(rows[self.rank])),
            receives={rank: as_bytes(rows[rank]) for rank in self._others},
            then=add_up,
        )

    def _sum_large(self, flat: Tensor) -> Transfer:
        parts = flat.tensor_split(self.size)
        own = parts[self.rank]
        theirs = {rank: torch.empty_like(own) for rank in self._others}

        def send_sum() -> MessageTransfer:
            for part in theirs.values():
                own.add_(part)
            return self._mesh.post(
                1,
                sends=dict.fromkeys(self._others, as_bytes(own)),
                receives={rank: as_bytes(parts[rank]) for rank in self._others},
            )

        return self._mesh.post(
            0,
            sends={rank: as_bytes(parts[rank]) for rank in self._others},
            receives={rank: as_bytes(part) for rank, part in theirs.items()},
            then=send_sum,
        )


@final
class DirectMessageChannel(MessageChannel):
    """Messages between CPU tensors.

    Args:
        mesh: The connections; the object takes them over.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.rank, self.size = mesh.rank, mesh.size
        self._mesh = mesh
        self._others = [rank for rank in range(mesh.size) if rank != mesh.rank]

    @override
    def all_to_all(
        self, outgoing: Tensor, incoming: Tensor, then: Callable[[], MessageTransfer] | None = None
    ) -> MessageTransfer:
        return self._mesh.post(0, self._rows(outgoing), self._rows(incoming), then)

    @override
    def all_gather(self, message: Tensor, messages: Tensor) -> MessageTransfer:
        messages[self.rank].copy_(message)
        return self._mesh.post(1, dict.fromkeys(self._others, as_bytes(message)), self._rows(messages))

    @override
    def close(self) -> None:
        self._mesh.close()

    def _rows(self, rows: Tensor) -> Messages:
        return {rank: as_bytes(rows[rank]) for rank in self._others}
