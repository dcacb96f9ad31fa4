"""How the ranks of a worker, each of which has moved a slice of the center, come to have all of it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.transport.channel import Channel, ExchangeError
from lightning_easgd.transport.errors import CenterError
from lightning_easgd.transport.shared_vectors import SharedVectors

__all__ = ["ChannelJoin", "MemoryJoin", "SliceJoin", "cut"]


def cut(numel: int, ranks: int) -> list[slice]:
    """The slice of a vector that each of so many ranks has; the last ones may be shorter, or empty."""
    size = -(-numel // ranks)
    return [slice(min(rank * size, numel), min((rank + 1) * size, numel)) for rank in range(ranks)]


class SliceJoin(ABC):
    """Gives each rank of a worker the others' slices, whole and as they are; all of them call it at the same point.

    Attributes:
        rank: This one, 0 ≤ rank < size.
        size: How many ranks the worker has (k).
    """

    rank: int
    size: int

    @abstractmethod
    def join(self, center: ReplicatedCenter) -> None:
        """Replace in every store all slices but this rank's own by what they are on their ranks.

        Raises:
            ExchangeError: If a rank is lost.
        """

    @abstractmethod
    def renewed(self, center: ReplicatedCenter) -> "SliceJoin":
        """What takes this one's place for a center of another size. This one is closed."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""


@final
class ChannelJoin(SliceJoin):
    """Through a channel.

    Args:
        channel: Of the worker's ranks, of tensors where the center is, for this object alone.
    """

    def __init__(self, channel: Channel) -> None:
        self.rank, self.size = channel.rank, channel.size
        self._channel = channel

    @override
    def join(self, center: ReplicatedCenter) -> None:
        transfers = [
            self._channel.share(store.flat[part], rank)
            for store in center.stores
            for rank, part in enumerate(cut(store.flat.numel(), self.size))
            if part.start < part.stop
        ]
        for transfer in transfers:
            transfer.wait()

    @override
    def renewed(self, center: ReplicatedCenter) -> "ChannelJoin":
        return self

    @override
    def close(self) -> None:
        self._channel.close()


@final
class MemoryJoin(SliceJoin):
    """In memory that the ranks of one host share: each copies its slice there, and the others' from there.

    Args:
        rank: This one.
        size: How many ranks the worker has.
        vectors: One of each rank, with room for the longest slice of all stores; the object takes them over.
    """

    def __init__(self, rank: int, size: int, vectors: SharedVectors) -> None:
        self.rank, self.size = rank, size
        self._vectors = vectors
        self._joins = 0

    @staticmethod
    def room(center: ReplicatedCenter, size: int) -> int:
        """The size of a vector, in elements."""
        return len(center.stores) * -(-center.flat.numel() // size)

    @override
    def join(self, center: ReplicatedCenter) -> None:
        self._vectors.wait_until_read(self._joins)
        self._joins += 1
        own = self._vectors.own
        for written, part in self._places(center, self.rank, own):
            written.copy_(part)
        self._vectors.publish_written(self._joins)
        self._vectors.wait_until_written(self._joins)
        for rank, theirs in enumerate(self._vectors.of_all):
            if rank != self.rank:
                for written, part in self._places(center, rank, theirs):
                    part.copy_(written)
        self._vectors.publish_read(self._joins)

    def _places(self, center: ReplicatedCenter, rank: int, vector: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Where in a rank's vector the parts of the stores are, and those parts."""
        part = cut(center.flat.numel(), self.size)[rank]
        parts = [store.flat[part] for store in center.stores]
        return list(zip(torch.split(vector[: sum(map(len, parts))], [len(p) for p in parts]), parts, strict=True))

    @override
    def renewed(self, center: ReplicatedCenter) -> "MemoryJoin":
        self._vectors.wait_until_read(self._joins)
        try:
            return MemoryJoin(self.rank, self.size, self._vectors.renewed(self.room(center, self.size)))
        except CenterError as error:
            raise ExchangeError(
                f"{self._vectors.user}(process_group_backend=None): parameters were added, and the slices of the center"
                f" cannot be shared ({error}) With process_group_backend='gloo' ranks need no shared memory."
            ) from error

    @override
    def close(self) -> None:
        self._vectors.close()
