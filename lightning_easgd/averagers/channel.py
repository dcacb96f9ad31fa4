"""What moves bytes between the workers: the interface, and its implementation on a process group."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import final

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

__all__ = ["Channel", "ExchangeError", "Failure", "ProcessGroupChannel", "Transfer", "WorkTransfer"]


class ExchangeError(RuntimeError):
    """An exchange between the workers failed: one of them died, raised, hung, or left the common order."""


class Transfer(ABC):
    """A reduction under way. Its buffer belongs to the channel until :meth:`wait` has returned."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the buffer holds the sum over all workers; raise :class:`ExchangeError` if it never will."""


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
        self._group = dist.new_group(backend=backend, timeout=timeout)
        self._failure = Failure(timeout, strategy, who_is_missing)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @override
    def sum(self, buffer: Tensor) -> Transfer:
        work = dist.all_reduce(buffer, group=self._group, async_op=True)
        assert work is not None
        return WorkTransfer(work, self._failure)

    @override
    def close(self) -> None:
        if dist.is_initialized():  # else it went with the default group
            dist.destroy_process_group(self._group)


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
    """

    def __init__(self, work: dist.Work, failure: Failure) -> None:
        self._work = work
        self._failure = failure

    @override
    def wait(self) -> None:
        started = time.monotonic()
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._failure.of(error, time.monotonic() - started) from error
