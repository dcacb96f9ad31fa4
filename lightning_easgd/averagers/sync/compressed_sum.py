"""The sum over the workers in compressed messages, with what the compression drops kept for later."""

from collections.abc import Sequence
from typing import Any, final

from typing_extensions import override

from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.sync.shard_messages import ShardMessages, load_residual
from lightning_easgd.method.compression import Codec
from lightning_easgd.transport.channel import MessageChannel, MessageTransfer
from lightning_easgd.transport.device_queue import HostQueue, SideQueue, make_queue

__all__ = ["CompressedSum"]


@final
class CompressedSum(DifferenceSum):
    r"""A sum of encoded differences.

    With :math:`e^i` the residual of worker i, zero at first, an exchange is :math:`e^i \leftarrow e^i + s \Delta^i`,
    then the four lines of :class:`ShardMessages`.

    So the center moves by what all workers decode from the same bytes: bitwise the same everywhere. Nothing is lost:
    :math:`\tilde x + \sum_i e^i` is, to the rounding of the dtype, where the exact sums would have brought the center;
    the residuals stay as small as one rounding. The center itself is never rounded, nor is the worker's own pull, which
    uses the exact difference.

    The first messages are encoded and leave in :meth:`start`. When they are there the second leave: at once, where the
    channel has a thread of its own, else at the next :meth:`advance`. The center moves at the one after they are there,
    or in :meth:`finish`. Where messages are queued on the device, both are put there in :meth:`start`, beside what it
    computes, and the center moves in :meth:`finish`: when messages are there differs from worker to worker, and so
    would the order of what they start.
    A worker sends 2 (p - 1) / p times the encoded vector, an all-reduce 2 (p - 1) / p times the vector.

    The memory beside the wire is one residual, the messages, twice the encoded vector, and one decoded shard.

    Args:
        center: As for :class:`DifferenceSum`.
        channel: A channel for this sum alone: different sums come to their second messages in different orders.
        codec: Q; for this sum alone.
        queue: The side queue of the center's device; None for one of its own.
    """

    def __init__(
        self, center: ReplicatedCenter, channel: MessageChannel, codec: Codec, queue: SideQueue | None = None
    ) -> None:
        super().__init__(center, center.values.like())
        self._is_queued = channel.are_queued(center.flat.device)
        self._queue = queue or (make_queue(center.flat.device) if self._is_queued else HostQueue())
        self._channel = channel
        self._codec = codec
        self._residual = center.values.like()
        self._messages = ShardMessages(codec, center.flat, channel.rank, channel.size)
        self._transfer: MessageTransfer | None = None  # of both messages

    @override
    def renewed(self, center: ReplicatedCenter, origins: Sequence[int | None]) -> "CompressedSum":
        renewed = CompressedSum(center, self._channel, self._codec)
        residuals = self._residual.views
        for view, origin in zip(renewed._residual.views, origins, strict=True):
            if origin is not None:
                view.copy_(residuals[origin])
        return renewed

    @property
    @override
    def nbytes(self) -> int:
        return self._messages.nbytes

    @override
    def start(self, shares: Sequence[float]) -> None:
        self._queue.follow()
        with self._queue.beside():
            for residual, difference, share in zip(self._residual.segments, self.wire.segments, shares, strict=True):
                residual.add_(difference, alpha=share)
            self._messages.encode_(self._residual.flat)
            if self._is_queued:
                self._channel.all_to_all(self._messages.outgoing, self._messages.incoming).follow()
                self._transfer = self._send_sum()
            else:
                self._transfer = self._channel.all_to_all(
                    self._messages.outgoing, self._messages.incoming, self._send_sum
                )

    @override
    def advance(self) -> None:
        if self._transfer is not None and not self._is_queued and self._transfer.arrived:
            self.finish()

    @override
    def finish(self) -> None:
        if self._transfer is not None:
            self._transfer.wait()  # the side queue holds nothing that comes after it
            self._transfer = None
            self._move_center()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"residual": self._residual.flat}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_residual(self._residual, state)

    @override
    def close(self) -> None:
        self._channel.close()

    def _send_sum(self) -> MessageTransfer:
        """The first messages are there: send the sum of this worker's shard."""
        self._messages.add_up_(self._residual.flat)
        return self._channel.all_gather(self._messages.own, self._messages.outgoing)

    def _move_center(self) -> None:
        """The second messages are there: they are the center's move."""
        self._messages.move_(self.center)
        self.center.end_exchange()
