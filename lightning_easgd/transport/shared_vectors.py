"""A vector of each worker of one host, which all of them map, and what each has written and read."""

import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from itertools import count
from typing import final

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from lightning_easgd.transport.channel import Channel, ExchangeError
from lightning_easgd.transport.discovery import Rendezvous
from lightning_easgd.transport.errors import CenterError, SharedMemoryUnavailableError
from lightning_easgd.transport.liveness import ENDED, Presence, died
from lightning_easgd.transport.shared_counts import SEMAPHORE_BYTES, PublishedCount, ReadCount
from lightning_easgd.transport.shared_segment import SharedSegment
from lightning_easgd.transport.store_client import StoreClient, store_server
from lightning_easgd.transport.waiting import in_vain, wait_until

__all__ = ["SharedVector", "SharedVectors", "shared_vectors"]

# In a vector's memory: the segment's own, two semaphores for each reader, and after _DATA the elements.
_SEMAPHORES, _DATA = SharedSegment.RESERVED, 2**16  # bytes
_MOST_READERS = (_DATA - _SEMAPHORES) // (2 * SEMAPHORE_BYTES)

_places = count()  # keys of those of before are still in the store


@final
class SharedVector:
    """A flat vector in memory that other processes of the host can map, and two counts that its owner publishes.

    Args:
        segment: The memory; the object takes it over.
        dtype: Dtype of the elements.
        reader: Which of the readers this process is, None for the owner.

    Attributes:
        elements: The vector, shape (elements,).
        dtype: As given.
    """

    def __init__(self, segment: SharedSegment, dtype: torch.dtype, reader: int | None = None) -> None:
        self._segment = segment
        self.dtype = dtype
        memory = segment.memory
        count = (len(memory) - _DATA) // dtype.itemsize
        self.elements = torch.frombuffer(memory, dtype=dtype, count=count, offset=_DATA) if count else (
            torch.empty(0, dtype=dtype)
        )  # fmt: skip
        self._written: PublishedCount | ReadCount = PublishedCount([])
        self._read: PublishedCount | ReadCount = PublishedCount([])
        if reader is not None:
            self._written, self._read = map(ReadCount, self._semaphores(reader))

    @classmethod
    def create(cls, numel: int, dtype: torch.dtype) -> "SharedVector":
        """Allocate a vector of zeros.

        Raises:
            SharedMemoryUnavailableError: If this platform cannot share memory.
            CenterError: If there is not enough memory.
        """
        size = _DATA + numel * dtype.itemsize
        return cls(SharedSegment.create(size, "lightning_easgd-vector", "SharedVector: a worker's vector"), dtype)

    @classmethod
    def attach(cls, address: str, dtype: torch.dtype, reader: int = 0) -> "SharedVector":
        """Map the vector of another process of this host, which must live.

        Args:
            address: Its :attr:`address`.
            dtype: Dtype of the elements.
            reader: Which of the readers that its owner admitted this is; no two have one number.

        Raises:
            SharedMemoryUnavailableError: If it cannot be reached.
        """
        return cls(SharedSegment.attach(address), dtype, reader)

    def admit(self, readers: int, own: int | None = None) -> None:
        """Publish the counts to so many readers; called by the owner before any of them attaches.

        Args:
            readers: How many there are, the owner among them.
            own: Which of them is the owner, who needs no word from itself; None if none is.

        Raises:
            SharedMemoryUnavailableError: If they are too many, or this platform has no semaphores in shared memory.
        """
        if readers > _MOST_READERS:
            raise SharedMemoryUnavailableError(f"SharedVector: more than {_MOST_READERS} workers on one host.")
        each = [self._semaphores(reader) for reader in range(readers) if reader != own]
        self._written = PublishedCount([written for written, _ in each])
        self._read = PublishedCount([read for _, read in each])

    @property
    def address(self) -> str:
        """Where other processes find it; valid while this one, its owner, keeps it open."""
        return self._segment.address

    @property
    def owner_lives(self) -> bool:
        """Whether the process that created it still has it open."""
        return self._segment.creator_has_it

    def publish_written(self, exchanges: int) -> None:
        """Say that the owner's part of this exchange is there."""
        assert isinstance(self._written, PublishedCount)
        self._written.publish(exchanges)

    def publish_read(self, exchanges: int) -> None:
        """Say that the owner has read everybody's part of this exchange."""
        assert isinstance(self._read, PublishedCount)
        self._read.publish(exchanges)

    @property
    def written(self) -> int:
        """The last exchange of which the owner's part is there."""
        return self._written.value

    @property
    def read(self) -> int:
        """The last exchange that the owner has read everybody's part of."""
        return self._read.value

    def close(self) -> None:
        """Let go of it."""
        self.elements = torch.empty(0)
        self._written = self._read = PublishedCount([])  # nothing reaches into the memory any more
        self._segment.close()

    def _semaphores(self, reader: int) -> tuple[int, int]:
        """Addresses of a reader's semaphores."""
        memory = torch.frombuffer(self._segment.memory, dtype=torch.uint8).data_ptr()
        first = memory + _SEMAPHORES + 2 * SEMAPHORE_BYTES * reader
        return first, first + SEMAPHORE_BYTES


@final
class SharedVectors:
    """What each worker writes for all others to read, exchange after exchange, and who has written and read what.

    Each worker makes one at the same point and calls :meth:`attach`, or leaves that to the first wait.

    Args:
        numel: Elements of each vector.
        dtype: Dtype of the elements.
        rendezvous: Where the workers find each other's memory; the object takes it over.
        user: The name of who exchanges, for errors.
        number: How many vectors there have been before at this rendezvous.

    Raises:
        SharedMemoryUnavailableError: If this platform cannot share memory.
        CenterError: If there is not enough memory.
    """

    def __init__(
        self, numel: int, dtype: torch.dtype, rendezvous: Rendezvous, user: str = "SharedVectors", number: int = 0
    ) -> None:
        self.user = user
        self._own = SharedVector.create(numel, dtype)
        self._rendezvous = rendezvous
        self._number = number
        self._vectors: list[SharedVector] = []  # of all ranks
        try:
            self._own.admit(rendezvous.world_size, own=rendezvous.rank)
            rendezvous.enter(f"vector/{number}", self._own.address)
        except BaseException:
            self._close_vectors()
            raise

    def renewed(self, numel: int) -> "SharedVectors":
        """Vectors of another size in place of these, which are closed; each worker makes them when it gets there."""
        self._close_vectors()
        return SharedVectors(numel, self._own.dtype, self._rendezvous, self.user, self._number + 1)

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
            CenterError: If one cannot be reached, or a worker does not come.
            ExchangeError: If its size is another.
        """
        vectors: list[SharedVector] = []
        own, rank = self._own, self._rendezvous.rank
        try:
            # Known by the time when it matters: the store may be gone then.
            self._rendezvous.liveness.lost(range(self._rendezvous.world_size))
            for other in range(self._rendezvous.world_size):
                if other == rank:
                    vectors.append(own)
                    continue
                (address,) = self._rendezvous.find(f"vector/{self._number}", [other])
                vectors.append(SharedVector.attach(address, own.dtype, rank))
                theirs = vectors[-1].elements.numel()
                if theirs != own.elements.numel():
                    raise ExchangeError(
                        f"{self.user}: rank {other} shares {theirs} numbers and rank {rank} {own.elements.numel()};"
                        " build the same model and optimizer on every rank."
                    )
        except BaseException:
            for vector in vectors:
                if vector is not own:
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
        self._wait(self.all_have_written, lambda vector: vector.written, exchange)

    def wait_until_read(self, exchange: int) -> None:
        """Return when everybody has read an exchange.

        Raises:
            ExchangeError: If a worker is lost.
        """
        self._wait(self.all_have_read, lambda vector: vector.read, exchange)

    def close(self) -> None:
        """Let go of the memory, and of the rendezvous."""
        self._close_vectors()
        self._rendezvous.close()

    def _close_vectors(self) -> None:
        for vector in {id(vector): vector for vector in (*self._vectors, self._own)}.values():
            vector.close()
        self._vectors = []

    def _wait(self, have_all: Callable[[int], bool], counter: Callable[[SharedVector], int], exchange: int) -> None:
        if have_all(exchange):
            return
        if not self.are_attached:
            try:
                self.attach()
            except CenterError as error:
                raise self._failure(0.0, f"a worker is not there any more ({error})") from error

        def look(waited: float) -> None:
            behind = self._to_blame(counter, exchange)
            lost = [rank for rank in behind if not self._vectors[rank].owner_lives]
            # Looked at again, as a worker may leave when it has done its part.
            if lost := [rank for rank in lost if rank in self._to_blame(counter, exchange)]:
                raise self._failure(waited, died(dict.fromkeys(lost, ENDED)))
            if waited > self._rendezvous.timeout:
                raise self._failure(
                    waited,
                    self._rendezvous.liveness.blame(behind),
                    "Look for the first error among the ranks; a longer timeout helps only if they are slow.",
                )

        wait_until(lambda: have_all(exchange), math.inf, look=look)

    def _to_blame(self, counter: Callable[[SharedVector], int], exchange: int) -> list[int]:
        """The other workers that hold an exchange up.

        One that has not read it may itself wait for one that has not written: that one is to blame, and nobody else.
        """
        others = [rank for rank in range(self._rendezvous.world_size) if rank != self._rendezvous.rank]
        silent = [rank for rank in others if self._vectors[rank].written < exchange]
        return silent or [rank for rank in others if counter(self._vectors[rank]) < exchange]

    def _failure(self, waited: float, known: str, *remedy: str) -> ExchangeError:
        who = f"{self.user}(timeout={timedelta(seconds=self._rendezvous.timeout)})"
        return ExchangeError(in_vain(who, "an exchange", waited, known, *remedy))


def shared_vectors(
    numel: int, dtype: torch.dtype, store: Store, control: Channel, timeout: timedelta
) -> SharedVectors | None:
    """A vector of each worker, mapped by all; if one of them cannot, None on all, with a warning where it failed.

    Args:
        numel: Elements of each vector.
        dtype: Dtype of the elements.
        store: The workers' store; it is cloned.
        control: Reduces CPU tensors.
        timeout: How long to wait for another worker.
    """
    seconds = timeout.total_seconds()
    client = StoreClient(store, seconds, server=store_server())
    keys = client.under(f"easgd/shared/{next(_places)}")
    presence = Presence(keys, control.rank)
    rendezvous = Rendezvous(keys, presence, control.rank, control.size, seconds, user=control.user)
    vectors: SharedVectors | None = None
    problem: CenterError | None = None
    with ExitStack() as opened:  # closed again unless all workers have all of it
        opened.callback(client.close)
        try:
            presence.enter()
            vectors = SharedVectors(numel, dtype, rendezvous, control.user)
            opened.callback(vectors.close)
        except CenterError as error:
            problem = error
        if _all_are_well(control, problem):
            assert vectors is not None
            try:
                vectors.attach()
            except CenterError as error:
                problem = error
            if _all_are_well(control, problem):
                opened.pop_all()
                return vectors
    if problem is not None:
        warnings.warn(
            f"{control.user}: rank {control.rank} cannot share memory ({problem}) The workers announce and exchange"
            " through the process group instead, which is slower.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _all_are_well(control: Channel, problem: Exception | None) -> bool:
    problems = torch.tensor([int(problem is not None)])
    control.sum(problems).wait()
    return not problems.item()
