"""The sum over the workers in compressed messages, with what the compression drops kept for later."""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, final

import torch
from typing_extensions import override

from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.method.compression import Codec
from lightning_easgd.transport.channel import MessageChannel, MessageTransfer
from lightning_easgd.transport.device_queue import HostQueue, SideQueue, make_queue

__all__ = ["CompressedSum"]


@final
class CompressedSum(DifferenceSum):
    r"""A sum of encoded differences: worker r owns the r-th p-th of the vector, its shard.

    With :math:`e^i` the residual of worker i, zero at first, and :math:`Q` the codec, an exchange is

    .. math::
        e^i &\leftarrow e^i + s \Delta^i \\
        m^i &= Q(e^i), \quad e^i \leftarrow e^i - m^i && \text{outside of worker i's shard; to the shards' owners} \\
        e^r &\leftarrow e^r + \textstyle\sum_{i \ne r} m^i && \text{in worker r's shard} \\
        M &= Q(e^r), \quad e^r \leftarrow e^r - M && \text{in worker r's shard; to all} \\
        \tilde x &\leftarrow \tilde x + M

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
        numel, size = center.flat.numel(), channel.size
        shard = max(1, -(-numel // (size * codec.block))) * codec.block
        bounds = [min(rank * shard, numel) for rank in range(size + 1)]
        self._shards = [slice(start, stop) for start, stop in pairwise(bounds)]
        sizes = [codec.nbytes(part.stop - part.start) for part in self._shards]
        own = sizes[channel.rank]
        # Rows are as long as the longest message, for collectives of equal parts; the last shards may be shorter.
        self._outgoing = torch.zeros(size, codec.nbytes(shard), dtype=torch.uint8, device=center.flat.device)
        self._incoming = torch.zeros_like(self._outgoing)
        self._own = torch.zeros_like(self._outgoing[0])
        self._move = torch.empty(min(shard, numel), dtype=center.flat.dtype, device=center.flat.device)
        self._of_shards = [row[:nbytes] for row, nbytes in zip(self._outgoing, sizes, strict=True)]
        self._of_workers = [row[:own] for row in self._incoming]
        self._of_sum = self._own[:own]
        self._others = [rank for rank in range(size) if rank != channel.rank]
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
        return 2 * (self._channel.size - 1) * self._own.numel()

    @override
    def start(self, shares: Sequence[float]) -> None:
        self._queue.follow()
        with self._queue.beside():
            for residual, difference, share in zip(self._residual.segments, self.wire.segments, shares, strict=True):
                residual.add_(difference, alpha=share)
            for rank in self._others:
                self._codec.encode_rest_(self._residual.flat[self._shards[rank]], self._of_shards[rank])
            if self._is_queued:
                self._channel.all_to_all(self._outgoing, self._incoming).follow()
                self._transfer = self._send_sum()
            else:
                self._transfer = self._channel.all_to_all(self._outgoing, self._incoming, self._send_sum)

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
        residual = state.get("residual")  # none where the checkpoint's run was not compressed
        if residual is None:
            return
        if residual.shape == self._residual.flat.shape:
            self._residual.flat.copy_(residual)
        else:
            warnings.warn(
                f"wire_dtype: the checkpoint's residual has {residual.numel()} elements, this run's"
                f" {self._residual.flat.numel()}; it starts at zero: what the last messages lacked is not sent.",
                RuntimeWarning,
                stacklevel=2,
            )

    @override
    def close(self) -> None:
        self._channel.close()

    def _send_sum(self) -> MessageTransfer:
        """The first messages are there: send the sum of this worker's shard."""
        own = self._residual.flat[self._shards[self._channel.rank]]
        for rank in self._others:
            self._codec.add_decoded_(self._of_workers[rank], own)
        self._codec.encode_rest_(own, self._of_sum)
        return self._channel.all_gather(self._own, self._outgoing)

    def _move_center(self) -> None:
        """The second messages are there: they are the center's move."""
        for message, part in zip(self._of_shards, self._shards, strict=True):
            total = self._move[: part.stop - part.start]  # not the wire: a device may still be reading that
            self._codec.decode(message, total)
            self.center.move_(part, total, 1.0)
        self.center.end_exchange()
