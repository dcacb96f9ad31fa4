"""The sum over the workers of one host: each reads the others' differences where they lie."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.channel import ExchangeError
from lightning_easgd.transport.errors import CenterError
from lightning_easgd.transport.shared_vectors import SharedVectors

__all__ = ["SharedSum"]

_BLOCK = 2**18  # elements that are summed up at once: their sum stays in the cache until the center has it


@final
class SharedSum(DifferenceSum):
    r"""A sum in shared memory: nothing is sent, and nobody serves.

    A worker's wire lies in memory that the others map. When the last difference of an exchange is there each worker
    adds up all of them, in the order of the ranks, block by block in its cache, and moves its center. It writes its
    next difference when all others have read the last one. Two workers may still be a whole period apart: the one
    behind finds the others' differences there, and reads them at once.

    Args:
        center: On the host.
        vectors: One for each worker, of the center's size and dtype; the object takes them over.
    """

    def __init__(self, center: ReplicatedCenter, vectors: SharedVectors) -> None:
        super().__init__(center, center.values.like(vectors.own))
        self._vectors = vectors
        self._blocks: list[list[tuple[slice, list[Tensor]]]] = []  # for each group: where, and all differences there
        self._sum = torch.empty(min(_BLOCK, self.wire.flat.numel()), dtype=self.wire.flat.dtype)
        self._shares: Sequence[float] = []
        self._exchange = 0
        self._read = 0

    @override
    def renewed(self, center: ReplicatedCenter, origins: Sequence[int | None]) -> "SharedSum":
        self.make_room()
        self._blocks.clear()
        try:
            return SharedSum(center, self._vectors.renewed(center.flat.numel()))
        except CenterError as error:
            raise ExchangeError(
                f"{self._vectors.user}(process_group_backend=None): parameters were added, and their differences cannot"
                f" be shared ({error}) With process_group_backend='gloo' workers exchange without shared memory."
            ) from error

    @property
    @override
    def nbytes(self) -> int:
        return self.wire.flat.nbytes

    @override
    def make_room(self) -> None:
        super().make_room()
        self._vectors.wait_until_read(self._exchange)

    @property
    @override
    def has_room(self) -> bool:
        return self._vectors.all_have_read(self._exchange)

    @override
    def start(self, shares: Sequence[float]) -> None:
        self._shares = shares
        self._exchange += 1
        self._vectors.publish_written(self._exchange)
        self.advance()  # the last to come reads at once, so that the others may write again

    @override
    def advance(self) -> None:
        if self._read < self._exchange and self._vectors.all_have_written(self._exchange):
            self._add_up()

    @override
    def finish(self) -> None:
        if self._read < self._exchange:
            self._vectors.wait_until_written(self._exchange)
            self._add_up()

    @override
    def close(self) -> None:
        self._blocks.clear()
        self._vectors.close()

    def _add_up(self) -> None:
        self._blocks = self._blocks or _blocks(self.wire, self._vectors.of_all)
        for share, blocks in zip(self._shares, self._blocks, strict=True):
            for part, (first, *others) in blocks:
                total = first
                for other in others:
                    total = torch.add(total, other, out=self._sum[: first.numel()])
                self.center.move_(part, total, share)
        self.center.end_exchange()
        self._read = self._exchange
        self._vectors.publish_read(self._exchange)


def _blocks(wire: FlatTensors, vectors: Sequence[Tensor]) -> list[list[tuple[slice, list[Tensor]]]]:
    """For each group its blocks: where each is in the flat vector, and what all vectors have there."""
    ends = accumulate((segment.numel() for segment in wire.segments), initial=0)
    return [
        [
            (part, [vector[part] for vector in vectors])
            for part in (slice(start, min(start + _BLOCK, stop)) for start in range(first, stop, _BLOCK))
        ]
        for first, stop in pairwise(ends)
    ]
