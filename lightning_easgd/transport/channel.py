"""What moves bytes between the workers, as sums or as messages: interfaces, and implementations on process groups."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_easgd.transport.waiting import in_vain, wait_until

__all__ = [
    "ChainedTransfer",
    "Channel",
    "ExchangeError",
    "Failure",
    "LoneChannel",
    "MessageChannel",
    "MessageTransfer",
    "OwnGroup",
    "ProcessGroupChannel",
    "ProcessGroupMessageChannel",
    "Transfer",
    "WorkTransfer",
]

_WATCHDOG_DELAY = timedelta(seconds=60)
_LONGEST_PAUSE = 5e-5  # seconds between two looks at an operation on a device


class ExchangeError(RuntimeError):
    """An exchange between the workers failed: one of them died, raised, hung, or left the common order."""


class Transfer(ABC):
    """A reduction under way. Its buffer belongs to the channel until :meth:`wait` has returned."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the buffer holds the sum over all workers; raise :class:`ExchangeError` if it never will.

        The calling thread waits, also for a buffer on a device: so that an error comes before anything uses the sum,
        and the seconds that were waited are those of a clock.
        """


class Channel(ABC):
    """The workers' common line.

    All workers start the same reductions in the same order; each worker starts them when it gets there.

    Attributes:
        rank: This worker's number, 0 ≤ rank < size.
        size: How many workers there are (p).
        user: The name of who exchanges on it, for errors.
    """

    rank: int
    size: int
    user = "Channel"

    @abstractmethod
    def sum(self, buffer: Tensor) -> Transfer:
        """Start to replace ``buffer`` on every worker by the sum over all workers, and return at once.

        The result is bitwise the same on all workers.
        """

    def share(self, buffer: Tensor, source: int) -> Transfer:
        """Start to replace ``buffer`` on every worker by that of one of them, and return at once.

        Args:
            buffer: Of one shape and dtype on all.
            source: The worker's number.
        """
        if source != self.rank:
            buffer.zero_()
        return self.sum(buffer)

    def bytes_sent(self, nbytes: int) -> int:
        """Bytes that this worker hands over for a sum of so many: as a ring all-reduce does, 2 (p - 1) / p of them."""
        return round(2 * (self.size - 1) / self.size * nbytes)

    def close(self) -> None:  # noqa: B027 - most channels own nothing
        """Give back what the channel holds. No reduction may be under way."""


@final
class LoneChannel(Channel):
    """The line of a worker that is alone."""

    rank, size = 0, 1

    @override
    def sum(self, buffer: Tensor) -> Transfer:
        return _Done()


@final
class _Done(Transfer):
    @override
    def wait(self) -> None:
        pass


class MessageTransfer(Transfer):
    """Messages under way. Their tensors belong to the channel until :meth:`wait` has returned."""

    @property
    @abstractmethod
    def arrived(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""

    def follow(self) -> None:
        """Let what is queued on the messages' device from here on come after the transfer, where that is queued."""


class MessageChannel(ABC):
    """The workers' common line for bytes that nobody may add up on the way.

    Both operations return at once. All workers call each in the same order, but may be at different calls of the one
    when they make a call of the other; not so where they :meth:`are_queued`.

    Attributes:
        rank: This worker's number, 0 ≤ rank < size.
        size: How many workers there are (p).
    """

    rank: int
    size: int

    @abstractmethod
    def all_to_all(
        self, outgoing: Tensor, incoming: Tensor, then: Callable[[], MessageTransfer] | None = None
    ) -> MessageTransfer:
        """Start to send row r of ``outgoing`` to worker r, and to receive what it sends as row r of ``incoming``.

        Args:
            outgoing: Shape (p, bytes), uint8.
            incoming: Likewise; what this worker sends to itself may or may not be there.
            then: Called once they are there: at once, on another thread, or else when somebody asks for or waits for
                the transfer. The transfer that it starts belongs to this one, which has arrived when that has.
        """

    @abstractmethod
    def all_gather(self, message: Tensor, messages: Tensor) -> MessageTransfer:
        """Start to send ``message`` to all, and to receive that of worker r as row r of ``messages``.

        Args:
            message: Shape (bytes,), uint8.
            messages: Shape (p, bytes), uint8.
        """

    def are_queued(self, device: torch.device) -> bool:  # noqa: ARG002
        """Whether the operations are queued on this device.

        All workers must then start all of them in one order, those of other channels and of the user included: each
        holds a part of the device until it has met its counterparts.
        """
        return False

    def close(self) -> None:  # noqa: B027 - most channels own nothing
        """Give back what the channel holds. Nothing may be under way."""


@final
@dataclass(frozen=True)
class Failure:
    """What the error of an operation that failed says.

    Attributes:
        timeout: How long the operation could wait for the slowest worker.
        user: The name of who asked for it.
        who_is_missing: Finds a sentence on who is to blame; empty if it is not known.
    """

    timeout: timedelta
    user: str
    who_is_missing: Callable[[], str] = str

    def of(self, error: Exception, seconds: float) -> ExchangeError:
        """The error in place of the process group's own, after the worker has waited for so many seconds."""
        missing = self.who_is_missing()
        return ExchangeError(
            in_vain(
                f"{self.user}(timeout={self.timeout})",
                "an exchange",
                seconds,
                "another worker died, raised an error or hangs",
                "Look for the first error among the ranks; a longer timeout helps only if a worker was just slow."
                f" {f'{missing} ' if missing else ''}Cause: {error}",
            )
        )


@final
class WorkTransfer(MessageTransfer):
    """A collective operation under way.

    Args:
        work: The operation.
        failure: What its error says.
        is_queued: Whether it is queued on a device, where ``work.wait()`` holds up the device and not the thread.
    """

    def __init__(self, work: dist.Work, failure: Failure, *, is_queued: bool = False) -> None:
        self._work = work
        self._failure = failure
        self.is_queued = is_queued

    @property
    @override
    def arrived(self) -> bool:
        return self._work.is_completed()

    @override
    def wait(self) -> None:
        started = time.monotonic()
        timeout = self._failure.timeout.total_seconds()
        try:
            if self.is_queued and not wait_until(self._work.is_completed, timeout, longest_pause=_LONGEST_PAUSE):
                raise TimeoutError("the operation has not ended on the device.")
            self._work.wait()
        except (RuntimeError, TimeoutError) as error:
            raise self._failure.of(error, time.monotonic() - started) from error

    @override
    def follow(self) -> None:
        self._work.wait()


@final
class ChainedTransfer(MessageTransfer):
    """A transfer, and the one that is started by whoever finds that it has arrived."""

    def __init__(self, first: MessageTransfer, then: Callable[[], MessageTransfer]) -> None:
        self._first = first
        self._then = then
        self._second: MessageTransfer | None = None

    @property
    @override
    def arrived(self) -> bool:
        return (self._second is not None or self._first.arrived) and self._following().arrived

    @override
    def wait(self) -> None:
        self._following().wait()

    def _following(self) -> MessageTransfer:
        if self._second is None:
            self._first.wait()
            self._second = self._then()
        return self._second


@final
class OwnGroup:
    """A process group for one kind of operation, so that nothing else queues on it.

    Creating one is a collective operation on the default group: every rank creates it at the same point.

    Args:
        backend: ``"gloo"``, ``"nccl"``, … as for :func:`torch.distributed.new_group`.
        failure: What the error of an operation says.
        ranks: The ranks of each of the groups, of which this is the one that has this process; None for all in one.
    """

    def __init__(self, backend: str, failure: Failure, ranks: Sequence[Sequence[int]] | None = None) -> None:
        # NCCL's own watchdog ends the process without an error of ours; it must not come first.
        timeout = failure.timeout + _WATCHDOG_DELAY if "nccl" in backend else failure.timeout
        self.group: dist.ProcessGroup
        if ranks is None:
            self.group = dist.new_group(backend=backend, timeout=timeout)
        else:
            self.group = _own_of([*map(list, ranks)], backend, timeout)
        self._backend = backend
        self._failure = failure
        self._last: WorkTransfer | None = None

    def is_queued(self, device: torch.device) -> bool:
        """Whether its work is queued on the device, so that waiting for it is an order to the device alone."""
        return device.type == "cuda" and "nccl" in self._backend

    def transfer(self, work: dist.Work | None, buffer: Tensor) -> WorkTransfer:
        """The transfer of an operation on this buffer."""
        assert work is not None
        self._last = WorkTransfer(work, self._failure, is_queued=self.is_queued(buffer.device))
        return self._last

    def close(self) -> None:
        """Give the group back; abort it where its work will never end, as NCCL would wait for it."""
        if not dist.is_initialized():  # it went with the default group
            return
        if self._last is not None and self._last.is_queued and not self._last.arrived:
            self.group.abort()
        else:
            dist.destroy_process_group(self.group)


def _own_of(ranks: list[list[int]], backend: str, timeout: timedelta) -> Any:
    own, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout, backend=backend)  # type: ignore[no-untyped-call]
    return own


class _OnProcessGroups:
    """A channel on process groups of its own, so that nothing else queues on them.

    Creating one is a collective operation on the default group: every rank creates it at the same point.

    Args:
        backend: ``"gloo"``, ``"nccl"``, … as for :func:`torch.distributed.new_group`.
        timeout: How long an operation may wait for the slowest worker.
        user: The name of who exchanges on it, for errors; the channel's own if None.
        who_is_missing: Finds a sentence on who is to blame, when an operation has failed.
        ranks: The ranks of each of several such channels, of which this is the one that has this process; None for all
            in one.
    """

    _GROUPS: ClassVar[int]

    def __init__(
        self,
        backend: str,
        timeout: timedelta,
        user: str | None = None,
        who_is_missing: Callable[[], str] = str,
        ranks: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.user = user or type(self).__name__
        failure = Failure(timeout, self.user, who_is_missing)
        self._groups = [OwnGroup(backend, failure, ranks) for _ in range(self._GROUPS)]
        self.rank = dist.get_rank(self._groups[0].group)
        self.size = dist.get_world_size(self._groups[0].group)

    def close(self) -> None:
        """Give the groups back. Nothing may be under way."""
        for group in self._groups:
            group.close()


@final
class ProcessGroupChannel(_OnProcessGroups, Channel):
    """A :class:`Channel` on a process group of its own."""

    _GROUPS = 1

    @override
    def sum(self, buffer: Tensor) -> Transfer:
        (group,) = self._groups
        return group.transfer(dist.all_reduce(buffer, group=group.group, async_op=True), buffer)

    @override
    def share(self, buffer: Tensor, source: int) -> Transfer:
        (group,) = self._groups
        rank = dist.get_global_rank(group.group, source)
        return group.transfer(dist.broadcast(buffer, rank, group=group.group, async_op=True), buffer)


@final
class ProcessGroupMessageChannel(_OnProcessGroups, MessageChannel):
    """A :class:`MessageChannel` on two process groups of its own, one for each operation.

    A group runs its collectives in the order in which they were started. A worker that is ahead starts its next
    all-to-all before one that is behind has started its all-gather: on one group the orders would differ.
    """

    _GROUPS = 2

    @override
    def all_to_all(
        self, outgoing: Tensor, incoming: Tensor, then: Callable[[], MessageTransfer] | None = None
    ) -> MessageTransfer:
        group, _ = self._groups
        work = dist.all_to_all_single(incoming, outgoing, group=group.group, async_op=True)
        transfer = group.transfer(work, outgoing)
        return transfer if then is None else ChainedTransfer(transfer, then)

    @override
    def all_gather(self, message: Tensor, messages: Tensor) -> MessageTransfer:
        _, group = self._groups
        # Into a list: the operation on one tensor has another name in every other release of torch.
        work = dist.all_gather(list(messages), message, group=group.group, async_op=True)
        return group.transfer(work, message)

    @override
    def are_queued(self, device: torch.device) -> bool:
        return self._groups[0].is_queued(device)
