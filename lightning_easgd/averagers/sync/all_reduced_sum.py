"""The sum over the workers as an all-reduce in buckets, spread over the first half of the period."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.channel import Channel, Transfer

__all__ = ["BUCKET_BYTES", "AllReducedSum"]

BUCKET_BYTES = 2**21
"""The least size of a bucket, 17 ms at 1 Gbit/s: below it the delay of a reduction counts more than its bytes."""


@final
class AllReducedSum(DifferenceSum):
    """A sum by all-reduces of whole parameters, one after the other, over τ steps.

    The first bucket leaves before the optimizer step whose gradient it runs beside, the others in even distances after
    the steps of the first half of the period: no step bears all of the cost, and the last bucket has τ / 2 steps to
    arrive, time for the round trips that it takes on a link with a long delay. A reduction overwrites the wire; of the
    first bucket, whose difference is still needed, a copy is kept. The memory is therefore the wire and one bucket: at
    τ = 10 and more than 20 MiB of parameters, about a tenth of the wire.

    Args:
        center: As for :class:`DifferenceSum`.
        channel: A channel for this sum alone: different sums start their buckets in different orders on each worker.
        tau: τ, from one exchange to the next.
    """

    def __init__(self, center: ReplicatedCenter, channel: Channel, tau: int) -> None:
        wire = center.values.like()
        super().__init__(center, wire)
        self._channel = channel
        self._tau = tau
        self._buckets = _cut(wire, count=max(1, min(tau, wire.flat.nbytes // BUCKET_BYTES)))
        first = self._buckets[0]
        self._kept = torch.empty_like(first.wire, pin_memory=wire.flat.is_pinned())
        self._given = [list(group) for group in wire.groups]
        views = iter(torch.split(self._kept, [wire.views[number].numel() for number in first.parameters]))
        place = [(group, index) for group, members in enumerate(wire.groups) for index in range(len(members))]
        for number in first.parameters:
            group, index = place[number]
            self._given[group][index] = next(views).view_as(wire.groups[group][index])
        self._shares: Sequence[float] = []
        self._transfers: list[Transfer] = []
        self._steps: int | None = None  # since the exchange under way began

    @override
    def renewed(self, center: ReplicatedCenter, origins: Sequence[int | None]) -> "AllReducedSum":
        return AllReducedSum(center, self._channel, self._tau)

    @property
    @override
    def given(self) -> list[list[Tensor]]:
        return self._given

    @property
    @override
    def nbytes(self) -> int:
        return self._channel.bytes_sent(self.wire.flat.nbytes)

    @override
    def start(self, shares: Sequence[float]) -> None:
        self.norms()  # while the differences are there
        self._kept.copy_(self._buckets[0].wire)
        self._shares = shares
        self._steps = 0
        self._start_buckets(1)

    @override
    def advance(self) -> None:
        if self._steps is None:
            return
        self._steps += 1
        self._start_buckets(2 * self._steps * len(self._buckets) // self._tau + 1)

    @override
    def finish(self) -> None:
        if self._steps is None:
            return
        self._start_buckets(len(self._buckets))
        for transfer in self._transfers:  # all of them first: an error leaves the center whole
            transfer.wait()
        for bucket in self._buckets:
            for group, part in bucket.pieces:
                self.center.move_(part, self.wire.flat[part], self._shares[group])
        self.center.end_exchange()
        self._transfers.clear()
        self._steps = None

    @override
    def close(self) -> None:
        self._channel.close()

    def _start_buckets(self, until: int) -> None:
        for bucket in self._buckets[len(self._transfers) : until]:
            self._transfers.append(self._channel.sum(bucket.wire))


@final
@dataclass(frozen=True)
class _Bucket:
    """A run of whole parameters: their numbers, their part of the wire, and where in it each group is."""

    parameters: range
    wire: Tensor
    pieces: list[tuple[int, slice]]


def _cut(wire: FlatTensors, count: int) -> list[_Bucket]:
    """Cut the vector where a parameter ends that is next to an even cut; the smallest comes first, as it is kept."""
    ends = [0, *accumulate(view.numel() for view in wire.views)]
    even = [round(number * ends[-1] / count) for number in range(1, count)]
    cuts = sorted({0, len(ends) - 1, *(min(range(len(ends)), key=lambda at: abs(ends[at] - e)) for e in even)})
    groups = [0, *accumulate(segment.numel() for segment in wire.segments)]
    buckets = []
    for first, last in pairwise(cuts):
        start, stop = ends[first], ends[last]
        pieces = []
        for group, (low, high) in enumerate(pairwise(groups)):
            part = slice(max(low, start), min(high, stop))
            if part.start < part.stop:
                pieces.append((group, part))
        buckets.append(_Bucket(range(first, last), wire.flat[start:stop], pieces))
    buckets = buckets or [_Bucket(range(0), wire.flat, [])]  # there is nothing to average, yet
    buckets.sort(key=lambda bucket: bucket.wire.numel())
    return [buckets[0], *reversed(buckets[1:])]
