"""The workers' common order of exchanges: what rides ahead of each exchange, and how all come to a meeting point.

Workers run freely between exchanges, but the reductions of one group must pair up. So each exchange is announced by
a header of a few integers, reduced next to the payload and never waited for on its own. It carries the stop flag and
checks that all workers mean the same exchange. A worker that has nothing to do (it has come to a validation, or to
the end of its data) announces that instead, and keeps answering the others' exchanges until all have come to the
same meeting point: workers with different numbers of batches meet instead of hanging.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, final

import torch

from lightning_easgd.averagers.astray import AstrayPolicy, FailIfAstray
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.transport.channel import Channel, ExchangeError, Transfer

__all__ = ["READ_AT", "ExchangeLine", "Header", "Meeting", "Statistics", "WorkersStoppedError"]

_MARK_BITS = 16
_CENTER_BITS = 24
_ONE_ASTRAY = 1 << 32


class WorkersStoppedError(Exception):
    """All workers stop here, as one of them asked: the meeting does not take place."""


class Meeting(IntEnum):
    """A point of the run at which all workers meet; the value travels in the header."""

    VALIDATION = 1
    CHECKPOINT = 2
    EPOCH_END = 3
    TRAINING_END = 4
    CENTER_WEIGHTS = 5
    TEARDOWN = 6
    BATCH_END = 7


READ_AT = (Meeting.VALIDATION, Meeting.CHECKPOINT, Meeting.TRAINING_END, Meeting.CENTER_WEIGHTS)
"""The meetings after which the center is read: there all workers compare theirs."""


class Exchanger(Protocol):
    """What the line needs of an averager: to take part in an exchange that other workers began."""

    clock: int

    def complete(self) -> None:
        """Wait for the exchange under way and apply it."""

    def join(self) -> None:
        """Take part in an exchange without a gradient step of its own."""

    def is_finite(self) -> bool:
        """Whether the worker is at a finite point."""

    def center_checksum(self) -> int:
        """A checksum of the center."""


@dataclass
class Statistics:
    """What this worker has spent on communication, cumulative.

    Attributes:
        exchanges: Exchanges begun.
        bytes_sent: Bytes that this worker handed over for them: by the count of a ring all-reduce 2 (p - 1) / p times
            the size of what was reduced; what others read from shared memory once; with a served center the message and
            its answer.
        seconds_waited: Seconds in which this worker stood still for a transfer to arrive.
        staleness: With a served center, the exchanges of other workers that came between two of this worker's;
            divided by ``exchanges`` it is their mean number.
    """

    exchanges: int = 0
    bytes_sent: int = 0
    seconds_waited: float = 0.0
    staleness: int = 0


@final
class Header:
    """The announcement of one exchange or meeting: nine integers, summed over the workers.

    A value that all announcing workers must share travels as (count, Σ v, Σ v²): it is shared by all exactly if
    count · Σ v² = (Σ v)².

    Args:
        channel: What sums it up.
        mark: What all workers at one exchange must share; 0 at a meeting.
        meeting: The meeting; 0 at an exchange.
        center: What all workers at one meeting must share of their centers, below 2^24; 0 for nothing.
        stop: Whether this worker asks all to stop.
        finite: Whether this worker is at a finite point.
        strategy: Name of the strategy, for errors.
    """

    def __init__(
        self,
        channel: Channel,
        *,
        mark: int = 0,
        meeting: int = 0,
        center: int = 0,
        stop: bool = False,
        finite: bool = True,
        strategy: str = "EASGDStrategy",
    ) -> None:
        self._strategy = strategy
        astray = 0 if finite else _ONE_ASTRAY + channel.rank
        # By this worker, then by all.
        self._said = [int(mark > 0), mark, mark**2, meeting, meeting**2, center, center**2, int(stop), astray]
        self._sums = torch.tensor(self._said)
        self._workers = channel.size
        self._transfer: Transfer | None = channel.sum(self._sums)

    @property
    def nbytes(self) -> int:
        """Size of the header in bytes."""
        return self._sums.nbytes

    def wait(self) -> None:
        """Wait until all workers have announced themselves.

        Raises:
            ExchangeError: If they announced different things.
        """
        if self._transfer is None:
            return
        self._transfer.wait()
        self._transfer = None
        self._said = self._sums.tolist()
        exchanging, mark, marks, meeting, meetings, center, centers, *_ = self._said
        if exchanging * marks != mark**2:
            raise ExchangeError(
                f"{self._strategy}: the workers began different exchanges. Their optimizers are not stepped in the same"
                " order, or they do not have the same parameters, learning rates, moving rates or center_rule; make"
                " what decides on optimizer steps (also a gradient scaler of your own, which skips them) and learning"
                " rates the same on every rank."
            )
        waiting = self._workers - exchanging
        if exchanging == 0 and waiting * meetings != meeting**2:
            raise ExchangeError(
                f"{self._strategy}: some workers are at a validation, checkpoint or end of training where others are"
                " not. The ranks have different numbers of batches and a trigger inside the epoch, such as a"
                " validation, a checkpoint, max_steps or max_time; set limit_train_batches to a number that every rank"
                " has, or validate and save at the end of the epoch."
            )
        if exchanging == 0 and self._workers * centers != center**2:
            raise ExchangeError(
                f"{self._strategy}: the workers' copies of the center differ, so that something else than the exchanges"
                " has written to them on some rank. Nothing that this run saves from here on can be trusted: go on from"
                " the last checkpoint, and leave the tensors of strategy.center as they are."
            )

    @property
    def exchange(self) -> int | None:
        """Number of the averager whose exchange was announced, None if all workers have come to the meeting."""
        exchanging, mark, *_ = self._said
        return (mark // exchanging >> _MARK_BITS) - 1 if exchanging else None

    @property
    def stop(self) -> bool:
        """Whether any worker asks all to stop."""
        return bool(self._said[7])

    @property
    def astray(self) -> str | None:
        """The ranks of the workers that are not at a finite point, None if all are."""
        count, rank = divmod(self._said[8], _ONE_ASTRAY)
        return None if count == 0 else f"rank {rank}" if count == 1 else f"{count} ranks"


@dataclass
class ExchangeLine:
    """The order of exchanges that all workers share.

    Attributes:
        control: The channel of the headers, of all ranks; it reduces CPU tensors.
        strategy: Name of the strategy, for errors.
        worker: This worker's ranks; None where each rank is a worker.
        stop_requested: Set it to ask all workers to stop; it rides on the next header.
        stop_agreed: True once all workers know of a request; it changes at the same exchange or meeting on all.
        statistics: What this worker has spent.
        on_astray: What a worker at a non-finite point means to the run.
        under_way: The averagers whose exchanges this worker has begun and not completed, in the order of their
            beginning, which is the same on all workers. They are completed in this order: an exchange may need the
            further steps of its own optimizer to go on, or somebody who waits for it, on every worker.
    """

    control: Channel
    strategy: str = "EASGDStrategy"
    worker: WorkerRanks = None  # type: ignore[assignment]  # set below
    stop_requested: bool = False
    stop_agreed: bool = False
    statistics: Statistics = field(default_factory=Statistics)
    on_astray: AstrayPolicy = field(default_factory=FailIfAstray)
    under_way: list[Exchanger] = field(default_factory=list)
    _stop_heard: bool = False

    def __post_init__(self) -> None:
        self.worker = self.worker or WorkerRanks.one(self.control)

    def announce(self, averager: int, agreement: object, finite: bool = True) -> Header:
        """Announce an exchange of the averager of this number; returns at once.

        Args:
            averager: The averager's place in the list given to :meth:`meet`.
            agreement: What all workers must have in common for the exchange to make sense; compared by its ``repr``.
            finite: Whether this worker's difference is.
        """
        checksum = zlib.crc32(repr(agreement).encode()) >> (32 - _MARK_BITS)
        mark = (averager + 1 << _MARK_BITS) + checksum
        return self._header(mark=mark, finite=finite)

    def _header(self, **said: Any) -> Header:
        return Header(self.control, strategy=self.strategy, **{"stop": self.stop_requested, **said})

    def accept(self, header: Header, clock: int) -> None:
        """Wait for a header, and hear what it carries.

        Args:
            header: The header.
            clock: This worker's clock t, for the error's text.

        Raises:
            ExchangeError: See :meth:`Header.wait`; or if the run cannot go on with a worker that has gone astray.
        """
        header.wait()
        self._stop_heard |= header.stop
        if header.astray is not None and header.exchange is not None:
            self.on_astray.hear(header.astray, clock)

    def hear_stop(self) -> None:
        """Hear whether a worker asks all to stop, where all are and no exchange is announced."""
        if self.control.size > 1:
            self.accept(self._header(), clock=0)
            self.agree()

    def agree(self) -> bool:
        """Whether to stop here; called only at points that all workers come to after the same header."""
        self.stop_agreed = self._stop_heard
        return self.stop_agreed

    def meet(self, meeting: Meeting, averagers: Sequence[Exchanger]) -> None:
        """Return when all workers have come to this meeting, with no exchange under way.

        Until then this worker takes part in the exchanges of those that still train: its own parameters are pulled
        and count in the center's mean, but take no gradient step.

        Raises:
            WorkersStoppedError: If all stop before.
            ExchangeError: If a worker came to another meeting, or is lost, or if the workers' centers differ.
        """
        for averager in averagers:
            averager.complete()
        clock = max((averager.clock for averager in averagers), default=0)
        finite = all(averager.is_finite() for averager in averagers)
        while not self.agree():  # after a header that carries a request nobody announces another
            header = self._header(meeting=meeting, finite=finite)
            self.accept(header, clock)
            if header.exchange is None:
                if meeting in READ_AT:  # once all have come: not a pass over the center for each exchange until then
                    self.accept(self._header(meeting=meeting, center=self._center_of(averagers), stop=False), clock)
                self.agree()
                return
            averagers[header.exchange].join()
            finite = finite or all(averager.is_finite() for averager in averagers)
        raise WorkersStoppedError

    def count(self, nbytes: int, header: Header | None) -> None:
        """Add one exchange to the statistics.

        Args:
            nbytes: What this worker sends of its difference.
            header: The announcement; None if there was none.
        """
        self.statistics.exchanges += 1
        self.statistics.bytes_sent += nbytes
        if header is not None:
            self.statistics.bytes_sent += self.control.bytes_sent(header.nbytes)

    def _center_of(self, averagers: Sequence[Exchanger]) -> int:
        """What all workers must share of their centers: of all of this worker's ranks, which may hold parts of it."""
        checksums = [averager.center_checksum() for averager in averagers]
        own = zlib.crc32(repr(checksums).encode()) >> (32 - _CENTER_BITS)
        return self.worker.total(own) % (1 << _CENTER_BITS)
