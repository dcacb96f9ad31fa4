"""What moves bytes between the workers: the interface, and its implementation on a process group."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

__all__ = [
    "Channel",
    "ExchangeError",
    "Failure",
    "OwnGroup",
    "ProcessGroupChannel",
    "Transfer",
    "WorkTransfer",
    "is_queued",
]

_WATCHDOG_DELAY = timedelta(seconds=60)
_PAUSE = 5e-5  # seconds between two looks at an operation on a device


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
    """

    rank: int
    size: int

    @abstractmethod
    def sum(self, buffer: Tensor) -> Transfer:
        """Start to replace ``buffer`` on every worker by the sum over all workers, and return at once.

        The result is bitwise the same on all workers.
        """

    def bytes_sent(self, nbytes: int) -> int:
        """Bytes that this worker hands over for a sum of so many: as a ring all-reduce does, 2 (p - 1) / p of them."""
        return round(2 * (self.size - 1) / self.size * nbytes)

    def close(self) -> None:  # noqa: B027 - most channels own nothing
        """Give back what the channel holds. No reduction may be under way."""


def is_queued(backend: str, device: torch.device) -> bool:
    """Whether a process group queues its work on the device, so that waiting for it is an order to the device alone."""
    return device.type == "cuda" and "nccl" in backend


class OwnGroup:
    """A process group for one kind of operation, so that nothing else queues on it.

    Creating one is a collective operation on the default group: every rank creates it at the same point.

    Args:
        backend: ``"gloo"``, ``"nccl"``, … as for :func:`torch.distributed.new_group`.
        failure: What the error of an operation says.
    """

    def __init__(self, backend: str, failure: "Failure") -> None:
        # NCCL's own watchdog ends the process without an error of ours; it must not come first.
        timeout = failure.timeout + _WATCHDOG_DELAY if "nccl" in backend else failure.timeout
        self.group = dist.new_group(backend=backend, timeout=timeout)
        self._backend = backend
        self._failure = failure
        self._last: WorkTransfer | None = None

    def transfer(self, work: dist.Work | None, buffer: Tensor) -> "WorkTransfer":
        """The transfer of an operation on this buffer."""
        assert work is not None
        self._last = WorkTransfer(work, self._failure, is_queued=is_queued(self._backend, buffer.device))
        return self._last

    def close(self) -> None:
        """Give the group back; abort it where its work will never end, as NCCL would wait for it."""
        if not dist.is_initialized():  # it went with the default group
            return
        if self._last is not None and self._last.is_queued and not self._last.has_ended:
            self.group.abort()
        else:
            dist.destroy_process_group(self.group)


@final
class ProcessGroupChannel(Channel):
    """A :class:`Channel` on a process group of its own, so that nothing else queues on it.

    Creating one is a collective operation on the default group: every rank creates it at the same point.

    Args:
        backend: ``"gloo"``, ``"nccl"``, … as for :func:`torch.distributed.new_group`.
        timeout: How long a reduction may wait for the slowest worker.
        strategy: The strategy's name, for errors.
        who_is_missing: Finds a sentence on who is to blame, when a reduction has failed.
    """

    def __init__(
        self,
        backend: str,
        timeout: timedelta,
        strategy: str = "EASGDStrategy",
        who_is_missing: Callable[[], str] = str,
    ) -> None:
        self._group = OwnGroup(backend, Failure(timeout, strategy, who_is_missing))
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @override
    def sum(self, buffer: Tensor) -> Transfer:
        return self._group.transfer(dist.all_reduce(buffer, group=self._group.group, async_op=True), buffer)

    @override
    def close(self) -> None:
        self._group.close()


@final
@dataclass(frozen=True)
class Failure:
    """What the error of an operation that failed says.

    Attributes:
        timeout: How long the operation could wait for the slowest worker.
        strategy: The strategy's name.
        who_is_missing: Finds a sentence on who is to blame; empty if it is not known.
    """

    timeout: timedelta
    strategy: str = "EASGDStrategy"
    who_is_missing: Callable[[], str] = str

    def of(self, error: Exception, seconds: float) -> ExchangeError:
        """The error in place of the process group's own, after the worker has waited for so many seconds."""
        missing = self.who_is_missing()
        return ExchangeError(
            f"{self.strategy}(timeout={self.timeout}): an exchange failed after this worker had waited {seconds:.1f} s;"
            " another worker died, raised an error or hangs. Look for the first error among the ranks; a longer timeout"
            f" helps only if a worker was just slow. {f'{missing} ' if missing else ''}Cause: {error}"
        )


@final
class WorkTransfer(Transfer):
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
    def has_ended(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        return self._work.is_completed()

    @override
    def wait(self) -> None:
        started = time.monotonic()
        try:
            while self.is_queued and not self.has_ended:
                if time.monotonic() - started > self._failure.timeout.total_seconds():
                    raise TimeoutError("the operation has not ended on the device.")
                time.sleep(_PAUSE)
            self._work.wait()
        except (RuntimeError, TimeoutError) as error:
            raise self._failure.of(error, time.monotonic() - started) from error

    def follow(self) -> None:
        """Let what is queued on the device from here on come after the operation; the thread does not wait."""
        self._work.wait()
