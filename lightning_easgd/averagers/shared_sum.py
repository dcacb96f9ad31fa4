"""The sum over the workers of one host: each reads the others' differences where they lie."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.channel import ExchangeError
from lightning_easgd.averagers.difference_sum import DifferenceSum
from lightning_easgd.averagers.meeting_place import MeetingPlace
from lightning_easgd.averagers.shared_vector import SharedVector
from lightning_easgd.center import FlatTensors
from lightning_easgd.elastic import elastic_push_
from lightning_easgd.service.errors import CenterError, SharedMemoryUnavailableError

__all__ = ["SharedSum"]

_BLOCK = 2**18  # elements that are summed up at once: their sum stays in the cache until the center has it
_FIRST_PAUSE, _LONGEST_PAUSE = 20e-6, 1e-3  # seconds
_BETWEEN_LOOKS = 0.05  # seconds from one look at whether the others live to the next


@final
class SharedSum(DifferenceSum):
    r"""A sum in shared memory: nothing is sent, and nobody serves.

    A worker's wire lies in memory that the others map. When the last difference of an exchange is there each worker
    adds up all of them, in the order of the ranks, block by block in its cache, and moves its center. It writes its
    next difference when all others have read the last one. Two workers may still be a whole period apart: the one
    behind finds the others' differences there, and reads them at once.

    Args:
        center: On the host.
        place: Where the workers find each other's memory.
        timeout: How long to wait for another worker.
        processes: The workers' process ids, if they are known.

    Raises:
        SharedMemoryUnavailableError: If this platform cannot share memory.
        CenterError: If there is not enough memory.
    """

    def __init__(
        self, center: FlatTensors, place: MeetingPlace, timeout: timedelta, processes: Sequence[int] = ()
    ) -> None:
        self._own = SharedVector.create(center.flat.numel(), center.flat.dtype)
        super().__init__(center, center.like(self._own.elements))
        self._place = place
        self._timeout = timeout
        self._processes = processes
        self._vectors: list[SharedVector] = []  # of all ranks
        self._blocks: list[list[tuple[Tensor, list[Tensor]]]] = []  # for each group: center and differences
        self._sum = torch.empty(min(_BLOCK, center.flat.numel()), dtype=center.flat.dtype)
        self._shares: Sequence[float] = []
        self._exchange = 0
        place.enter(self._own.address)

    @override
    def renewed(self, center: FlatTensors) -> "SharedSum":
        self.make_room()
        processes = [vector.owner for vector in self._vectors] or self._processes
        self.close()
        try:
            return SharedSum(center, self._place.next(), self._timeout, processes)
        except CenterError as error:
            raise ExchangeError(
                f"EASGDStrategy(process_group_backend=None): parameters were added, and their differences cannot be"
                f" shared ({error}) With process_group_backend='gloo' workers exchange without shared memory."
            ) from error

    def attach(self) -> None:
        """Map the other workers' memory, waiting for theirs to be there.

        Raises:
            SharedMemoryUnavailableError: If one cannot be reached.
            ExchangeError: If its layout is another, or a worker does not come.
        """
        vectors: list[SharedVector] = []
        try:
            for rank in range(self._place.size):
                vectors.append(self._own if rank == self._place.rank else self._attach(rank))
        except BaseException:
            for vector in vectors:
                if vector is not self._own:
                    vector.close()
            raise
        self._vectors = vectors
        self._blocks = _blocks(self.center, self.wire, [vector.elements for vector in vectors])

    @property
    @override
    def nbytes(self) -> int:
        return self.wire.flat.nbytes

    @override
    def make_room(self) -> None:
        self._wait(lambda vector: vector.read, self._exchange)

    @property
    @override
    def has_room(self) -> bool:
        return all(vector.read >= self._exchange for vector in self._vectors)

    @override
    def start(self, shares: Sequence[float]) -> None:
        self._norms = None
        self._shares = shares
        self._exchange += 1
        self._own.publish_written(self._exchange)
        self.advance()  # the last to come reads at once, so that the others may write again

    @override
    def advance(self) -> None:
        if self._is_under_way and self._vectors and all(each.written >= self._exchange for each in self._vectors):
            self._add_up()

    @override
    def finish(self) -> None:
        if self._is_under_way:
            if not self._vectors:
                self._attach_at_last()
            self._wait(lambda vector: vector.written, self._exchange)
            self._add_up()

    @override
    def close(self) -> None:
        self._blocks.clear()
        for vector in {id(vector): vector for vector in (*self._vectors, self._own)}.values():
            vector.close()
        self._vectors = []

    @property
    def _is_under_way(self) -> bool:
        return self._own.read < self._exchange

    def _attach_at_last(self) -> None:
        try:
            self.attach()
        except SharedMemoryUnavailableError as error:
            raise ExchangeError(
                f"EASGDStrategy(timeout={self._timeout}): an exchange failed, as a worker is not there any more"
                f" ({error}). Look for the first error among the ranks."
            ) from error

    def _attach(self, rank: int) -> SharedVector:
        process = self._processes[rank] if self._processes else None
        vector = SharedVector.attach(self._place.find(rank, self._timeout, process), self.wire.flat.dtype)
        theirs = vector.elements.numel()
        if theirs != self.wire.flat.numel():
            vector.close()
            raise ExchangeError(
                f"EASGDStrategy: rank {rank} averages {theirs} parameters and rank {self._place.rank}"
                f" {self.wire.flat.numel()}; build the same model and optimizer on every rank."
            )
        return vector

    def _add_up(self) -> None:
        for share, blocks in zip(self._shares, self._blocks, strict=True):
            for center, (first, *others) in blocks:
                total = first
                for other in others:
                    total = torch.add(total, other, out=self._sum[: center.numel()])
                elastic_push_([center], [total], share)
        self._own.publish_read(self._exchange)

    def _wait(self, counter: Callable[[SharedVector], int], exchange: int) -> None:
        started = time.monotonic()
        look, pause = started + _BETWEEN_LOOKS, _FIRST_PAUSE
        while behind := [rank for rank, vector in enumerate(self._vectors) if counter(vector) < exchange]:
            now = time.monotonic()
            if now > look:
                look = now + _BETWEEN_LOOKS
                lost = [rank for rank in behind if not self._vectors[rank].owner_lives]
                # Looked at again, as a worker may leave when it has done its part.
                if any(counter(self._vectors[rank]) < exchange for rank in lost):
                    raise ExchangeError(
                        f"EASGDStrategy(timeout={self._timeout}): an exchange failed after this worker had waited"
                        f" {now - started:.1f} s; ranks {lost} died or raised an error. Look for the first error among"
                        " the ranks."
                    )
                if now - started > self._timeout.total_seconds():
                    raise ExchangeError(
                        f"EASGDStrategy(timeout={self._timeout}): an exchange failed after this worker had waited"
                        f" {now - started:.1f} s; ranks {behind} hang or are slow. Look for the first error among the"
                        " ranks; a longer timeout helps only if they are slow."
                    )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _blocks(
    center: FlatTensors, wire: FlatTensors, vectors: Sequence[Tensor]
) -> list[list[tuple[Tensor, list[Tensor]]]]:
    """For each group the blocks of the center, each with those of all vectors."""
    sizes = [segment.numel() for segment in wire.segments]
    parts = [
        [torch.split(segment, _BLOCK) for segment in torch.split(vector, sizes)] for vector in (center.flat, *vectors)
    ]
    return [
        [(blocks[0], list(blocks[1:])) for blocks in zip(*group, strict=True)] for group in zip(*parts, strict=True)
    ]
