"""What moves encoded messages between the workers: the interface, and its implementation on process groups."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import final

import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.channel import Failure, Transfer, WorkTransfer

__all__ = ["MessageChannel", "MessageTransfer", "ProcessGroupMessageChannel"]


class MessageTransfer(Transfer):
    """Messages under way. Their tensors belong to the channel until :meth:`wait` has returned."""

    @property
    @abstractmethod
    def arrived(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""


class MessageChannel(ABC):
    """The workers' common line for bytes that nobody may add up on the way.

    Both operations return at once. All workers call each in the same order, but may be at different calls of the one
    when they make a call of the other.

    Attributes:
        rank: This worker's number, 0 ≤ rank < size.
        size: How many workers there are (p).
    """

    rank: int
    size: int

    @abstractmethod
    def all_to_all(self, outgoing: Tensor, incoming: Tensor) -> MessageTransfer:
        """Start to send row r of ``outgoing`` to worker r, and to receive what it sends as row r of ``incoming``.

        Args:
            outgoing: Shape (p, bytes), uint8.
            incoming: Likewise; what this worker sends to itself may or may not be there.
        """

    @abstractmethod
    def all_gather(self, message: Tensor, messages: Tensor) -> MessageTransfer:
        """Start to send ``message`` to all, and to receive that of worker r as row r of ``messages``.

        Args:
            message: Shape (bytes,), uint8.
            messages: Shape (p, bytes), uint8.
        """

    def close(self) -> None:  # noqa: B027 - most channels own nothing
        """Give back what the channel holds. Nothing may be under way."""


@final
class ProcessGroupMessageChannel(MessageChannel):
    """A :class:`MessageChannel` on two process groups of its own, one for each operation.

    A group runs its collectives in the order in which they were started. A worker that is ahead starts its next
    all-to-all before one that is behind has started its all-gather: on one group the orders would differ.

    Creating one is a collective operation on the default group: every rank creates it at the same point.

    Args:
        backend: ``"gloo"``, ``"nccl"``, … as for :func:`torch.distributed.new_group`.
        timeout: How long an operation may wait for the slowest worker.
        strategy: The strategy's name, for errors.
        who_is_missing: Finds a sentence on who is to blame, when an operation has failed.
    """

    def __init__(
        self,
        backend: str,
        timeout: timedelta,
        strategy: str = "EASGDStrategy",
        who_is_missing: Callable[[], str] = str,
    ) -> None:
        self._all_to_all = dist.new_group(backend=backend, timeout=timeout)
        self._all_gather = dist.new_group(backend=backend, timeout=timeout)
        self._failure = Failure(timeout, strategy, who_is_missing)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @override
    def all_to_all(self, outgoing: Tensor, incoming: Tensor) -> MessageTransfer:
        work = dist.all_to_all_single(incoming, outgoing, group=self._all_to_all, async_op=True)
        return self._transfer(work)

    @override
    def all_gather(self, message: Tensor, messages: Tensor) -> MessageTransfer:
        # Into a list: the operation on one tensor has another name in every other release of torch.
        work = dist.all_gather(list(messages), message, group=self._all_gather, async_op=True)
        return self._transfer(work)

    @override
    def close(self) -> None:
        if dist.is_initialized():  # else they went with the default group
            dist.destroy_process_group(self._all_to_all)
            dist.destroy_process_group(self._all_gather)

    def _transfer(self, work: dist.Work | None) -> MessageTransfer:
        assert work is not None
        return _WorkMessages(work, self._failure)


@final
class _WorkMessages(MessageTransfer):
    def __init__(self, work: dist.Work, failure: Failure) -> None:
        self._work = work
        self._transfer = WorkTransfer(work, failure)

    @property
    @override
    def arrived(self) -> bool:
        return self._work.is_completed()

    @override
    def wait(self) -> None:
        self._transfer.wait()
