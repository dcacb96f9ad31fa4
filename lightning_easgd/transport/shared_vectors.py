"""A vector of each worker of one host, which all of them map."""

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import final

import torch
from torch import Tensor

from lightning_easgd.transport.channel import ExchangeError
from lightning_easgd.transport.errors import SharedMemoryUnavailableError
from lightning_easgd.transport.meeting_place import MeetingPlace
from lightning_easgd.transport.shared_vector import SharedVector
from lightning_easgd.transport.waiting import wait_until

__all__ = ["SharedVectors"]


@final
class SharedVectors:
    """What each worker writes for all others to read, exchange after exchange, and who has written and read what.

    Each worker makes one at the same point and calls :meth:`attach`, or leaves that to the first wait.

    Args:
        numel: Elements of each vector.
        dtype: Dtype of the elements.
        place: Where the workers find each other's memory.
        timeout: How long to wait for another worker.
        processes: The workers' process ids, if they are known.

    Raises:
        SharedMemoryUnavailableError: If this platform cannot share memory.
        CenterError: If there is not enough memory.
    """

    def __init__(
        self, numel: int, dtype: torch.dtype, place: MeetingPlace, timeout: timedelta, processes: Sequence[int] = ()
    ) -> None:
        self._own = SharedVector.create(numel, dtype)
        self._place = place
        self._timeout = timeout
        self._processes = processes
        self._vectors: list[SharedVector] = []  # of all ranks
        try:
            self._own.admit(place.size, own=place.rank)
            place.enter(self._own.address)
        except BaseException:
            self.close()
            raise

    def renewed(self, numel: int) -> "SharedVectors":
        """Vectors of another size in place of these, which are closed; each worker makes them when it gets there."""
        processes = [vector.owner for vector in self._vectors] or self._processes
        self._close_vectors()
        return SharedVectors(numel, self._own.dtype, self._place.next(), self._timeout, processes)

    @property
    def own(self) -> Tensor:
        """This worker's vector, shape (elements,)."""
        return self._own.elements

    @property
    def of_all(self) -> list[Tensor]:
        """The vectors of all ranks, each of shape (elements,); empty until they are attached."""
        return [vector.elements for vector in self._vectors]

    @property
    def are_attached(self) -> bool:
        """Whether the other workers' vectors are there."""
        return bool(self._vectors)

    def attach(self) -> None:
        """Map the other workers' memory, waiting for theirs to be there.

        Raises:
            SharedMemoryUnavailableError: If one cannot be reached.
            ExchangeError: If its size is another, or a worker does not come.
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

    def publish_written(self, exchange: int) -> None:
        """Say that this worker's part of an exchange is in its vector."""
        self._own.publish_written(exchange)

    def publish_read(self, exchange: int) -> None:
        """Say that this worker has read everybody's part of an exchange."""
        self._own.publish_read(exchange)

    def all_have_written(self, exchange: int) -> bool:
        """Whether everybody's part of an exchange is there."""
        return self.are_attached and all(vector.written >= exchange for vector in self._vectors)

    def all_have_read(self, exchange: int) -> bool:
        """Whether everybody has read an exchange."""
        return exchange <= 0 or (self.are_attached and all(vector.read >= exchange for vector in self._vectors))

    def wait_until_written(self, exchange: int) -> None:
        """Return when everybody's part of an exchange is there.

        Raises:
            ExchangeError: If a worker is lost.
        """
        self._wait(lambda vector: vector.written, exchange)

    def wait_until_read(self, exchange: int) -> None:
        """Return when everybody has read an exchange.

        Raises:
            ExchangeError: If a worker is lost.
        """
        self._wait(lambda vector: vector.read, exchange)

    def close(self) -> None:
        """Let go of the memory, and of the meeting place."""
        self._close_vectors()
        self._place.close()

    def _close_vectors(self) -> None:
        for vector in {id(vector): vector for vector in (*self._vectors, self._own)}.values():
            vector.close()
        self._vectors = []

    def _attach(self, rank: int) -> SharedVector:
        process = self._processes[rank] if self._processes else None
        vector = SharedVector.attach(self._place.find(rank, self._timeout, process), self._own.dtype, self._place.rank)
        theirs, own = vector.elements.numel(), self._own.elements.numel()
        if theirs != own:
            vector.close()
            raise ExchangeError(
                f"EASGDStrategy: rank {rank} shares {theirs} numbers and rank {self._place.rank} {own}; build the same"
                " model and optimizer on every rank."
            )
        return vector

    def _attach_at_last(self) -> None:
        try:
            self.attach()
        except SharedMemoryUnavailableError as error:
            raise ExchangeError(
                f"EASGDStrategy(timeout={self._timeout}): an exchange failed, as a worker is not there any more"
                f" ({error}). Look for the first error among the ranks."
            ) from error

    def _wait(self, counter: Callable[[SharedVector], int], exchange: int) -> None:
        if exchange <= 0:
            return
        if not self.are_attached:
            self._attach_at_last()
        wait_until(
            lambda: all(counter(vector) >= exchange for vector in self._vectors),
            math.inf,
            look=lambda waited: self._check(counter, exchange, waited),
        )

    def _check(self, counter: Callable[[SharedVector], int], exchange: int, waited: float) -> None:
        """Raise if a worker that this one waits for is lost, or has kept it waiting for the timeout."""
        behind = self._to_blame(counter, exchange)
        lost = [rank for rank in behind if not self._vectors[rank].owner_lives]
        # Looked at again, as a worker may leave when it has done its part.
        lost = [rank for rank in lost if rank in self._to_blame(counter, exchange)]
        if lost:
            raise self._failure(
                waited, f"ranks {lost} died or raised an error. Look for the first error among the ranks."
            )
        if waited > self._timeout.total_seconds():
            stopped = [rank for rank, vector in enumerate(self._vectors) if vector.owner_is_stopped]
            why = f"ranks {stopped} are stopped by a signal" if stopped else f"ranks {behind} hang or are slow"
            raise self._failure(
                waited,
                f"{why}. Look for the first error among the ranks; a longer timeout helps only if they are slow.",
            )

    def _to_blame(self, counter: Callable[[SharedVector], int], exchange: int) -> list[int]:
        """The other workers that hold an exchange up.

        One that has not read it may itself wait for one that has not written: that one is to blame, and nobody else.
        """
        others = [rank for rank in range(self._place.size) if rank != self._place.rank]
        silent = [rank for rank in others if self._vectors[rank].written < exchange]
        return silent or [rank for rank in others if counter(self._vectors[rank]) < exchange]

    def _failure(self, waited: float, why: str) -> ExchangeError:
        return ExchangeError(
            f"EASGDStrategy(timeout={self._timeout}): an exchange failed after this worker had waited {waited:.1f} s;"
            f" {why}"
        )
