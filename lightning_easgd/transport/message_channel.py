"""What moves encoded messages between the workers: the interface, and its implementation on process groups."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_easgd.transport.channel import Failure, OwnGroup, Transfer, WorkTransfer, is_queued

__all__ = ["MessageChannel", "MessageTransfer", "ProcessGroupMessageChannel"]


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

    def are_queued(self, device: torch.device) -> bool:  # noqa: ARG002
        """Whether the operations are queued on this device.

        All workers must then start all of them in one order, those of other channels and of the user included: each
        holds a part of the device until it has met its counterparts.
        """
        return False

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
        failure = Failure(timeout, strategy, who_is_missing)
        self._backend = backend
        self._all_to_all = OwnGroup(backend, failure)
        self._all_gather = OwnGroup(backend, failure)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    @override
    def all_to_all(self, outgoing: Tensor, incoming: Tensor) -> MessageTransfer:
        work = dist.all_to_all_single(incoming, outgoing, group=self._all_to_all.group, async_op=True)
        return _WorkMessages(self._all_to_all.transfer(work, outgoing))

    @override
    def all_gather(self, message: Tensor, messages: Tensor) -> MessageTransfer:
        # Into a list: the operation on one tensor has another name in every other release of torch.
        work = dist.all_gather(list(messages), message, group=self._all_gather.group, async_op=True)
        return _WorkMessages(self._all_gather.transfer(work, message))

    @override
    def are_queued(self, device: torch.device) -> bool:
        return is_queued(self._backend, device)

    @override
    def close(self) -> None:
        self._all_to_all.close()
        self._all_gather.close()


@final
class _WorkMessages(MessageTransfer):
    def __init__(self, transfer: WorkTransfer) -> None:
        self._transfer = transfer

    @property
    @override
    def arrived(self) -> bool:
        return self._transfer.has_ended

    @override
    def wait(self) -> None:
        self._transfer.wait()

    @override
    def follow(self) -> None:
        self._transfer.follow()
