"""The sum of workers whose ranks all hold all of the center: each rank exchanges a slice of it for its worker."""

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.difference_sum import DifferenceSum, Restored
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.sync.slice_join import SliceJoin, cut
from lightning_easgd.tensors.flat_tensors import FlatTensors

__all__ = ["SlicedSum"]


@final
class SlicedSum(DifferenceSum):
    r"""A sum of which rank c of a worker's k makes the c-th k-th, with the ranks of this coordinate of other workers.

    The ranks of a worker have the same parameters, bit for bit, and so the same :math:`\Delta^i`. What goes from worker
    to worker is a k-th on each rank, and each k-th once; when the center has been moved there, the worker's ranks give
    each other their parts of it, whole and as they are. The center is therefore bitwise the same on all ranks, also
    where sums of different ranks would not be, as NCCL's on different links. In this last part of :meth:`finish` all
    ranks of the worker take part.

    A sum that rounds keeps what the rounding drops on the rank that has that part. Where parameters come later, parts
    that are cut otherwise then begin without it.

    Args:
        center: As for :class:`DifferenceSum`.
        make_sum: Makes the sum of a slice.
        join: Gives the worker's ranks each other's slices; the object takes it over.
    """

    def __init__(
        self, center: ReplicatedCenter, make_sum: Callable[[ReplicatedCenter], DifferenceSum], join: SliceJoin
    ) -> None:
        super().__init__(center, center.values.like())
        self._join = join
        self._part = cut(center.flat.numel(), join.size)[join.rank]
        self._sum = make_sum(_sliced(center, self._part))
        self._slice = self._sum.center
        self._under_way = False

    @override
    def renewed(self, center: ReplicatedCenter, origins: Sequence[int | None]) -> "SlicedSum":
        join = self._join.renewed(center)
        part = _sliced(center, cut(center.flat.numel(), join.size)[join.rank])
        own = self._sum.renewed(part, [None] * len(part.values.views))
        return SlicedSum(center, lambda _: own, join)

    @property
    @override
    def nbytes(self) -> int:
        return self._sum.nbytes

    @override
    def make_room(self) -> None:
        super().make_room()
        self._sum.make_room()

    @override
    def start(self, shares: Sequence[float]) -> None:
        self.norms()
        self._note_version()
        self._sum.wire.flat.copy_(self.wire.flat[self._part])
        self._sum.start(shares)
        self._under_way = True

    @override
    def advance(self) -> None:
        self._sum.advance()

    @override
    def finish(self) -> None:
        if not self._under_way:
            return
        self._sum.finish()
        self._under_way = False
        self.is_lost = self._sum.is_lost
        if not self.is_lost:
            self._join_slices()

    def _join_slices(self) -> None:
        """Let the center be what its slices have become on the worker's ranks."""
        self._join.join(self.center)
        self.center.version = self._slice.version

    def _note_version(self) -> None:
        """Let the slice have the version of the whole, which may have been loaded."""
        if not self._under_way:
            self._slice.version = self.center.version

    # Where workers come and go

    @property
    @override
    def workers(self) -> int | None:
        return self._sum.workers

    @override
    def is_due(self, clock: int, tau: int) -> bool:
        return self._sum.is_due(clock, tau)

    @override
    def look_ahead(self, clock: int, complete: Callable[[], None]) -> None:
        self._note_version()
        self._sum.look_ahead(clock, complete)

    @override
    def is_expected(self) -> bool:
        return self._sum.is_expected()

    @override
    def enter(self, clock: int) -> bool:
        self._note_version()
        return self._sum.enter(clock)

    @property
    @override
    def must_enter_again(self) -> bool:
        return self._sum.must_enter_again

    @override
    def take_restored(self) -> Restored | None:
        restored = self._sum.take_restored()
        if restored is not None:
            self._join_slices()
        return restored

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._sum.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum.load_state_dict(state)

    @override
    def close(self) -> None:
        self._sum.close()
        self._join.close()


def _sliced(center: ReplicatedCenter, part: slice) -> ReplicatedCenter:
    """A part of a center, in the same memory and with the same groups; its clock is its own."""
    groups: list[list[Tensor]] = []
    start = 0
    for group in center.values.groups:
        groups.append([])
        for view in group:
            stop = start + view.numel()
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                groups[-1].append(center.flat[first:last])
            start = stop
    stores = [FlatTensors(groups, store.flat.dtype, memory=store.flat[part]) for store in center.stores]
    return ReplicatedCenter.of_stores(stores, center.rule)
