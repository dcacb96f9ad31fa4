"""The messages of an exchange of encoded vectors, of which each worker adds up a part."""

import warnings
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.method.compression import Codec
from lightning_easgd.tensors.flat_tensors import FlatTensors

__all__ = ["ShardMessages", "load_residual", "shard_size"]


def shard_size(codec: Codec, numel: int, workers: int) -> int:
    """Elements of a shard: a p-th of a vector, in whole blocks of the codec; the last shards may be shorter."""
    return max(1, -(-numel // (workers * codec.block))) * codec.block


@final
class ShardMessages:
    r"""The messages of one worker: it owns the r-th p-th of the vector, its shard.

    With :math:`e^i` a vector of worker i, and :math:`Q` the codec, an exchange is

    .. math::
        m^i &= Q(e^i), \quad e^i \leftarrow e^i - m^i && \text{outside of worker i's shard; to the shards' owners} \\
        e^r &\leftarrow e^r + \textstyle\sum_{i \ne r} m^i && \text{in worker r's shard} \\
        M &= Q(e^r), \quad e^r \leftarrow e^r - M && \text{in worker r's shard; to all} \\
        \tilde x &\leftarrow \tilde x + M

    :meth:`encode_` is the first line: ``outgoing`` is to be sent then, and arrives as ``incoming``. :meth:`add_up_` is
    the second and the third: ``own`` is to be sent, and arrives as the rows of ``outgoing``. :meth:`move_` is the
    fourth.

    Args:
        codec: Q.
        flat: A vector like those that are encoded.
        rank: This worker's number, r.
        size: p.

    Attributes:
        outgoing: Shape (p, bytes), uint8.
        incoming: Likewise.
        own: Shape (bytes,), uint8.
    """

    def __init__(self, codec: Codec, flat: Tensor, rank: int, size: int) -> None:
        self._codec = codec
        numel = flat.numel()
        shard = shard_size(codec, numel, size)
        bounds = [min(each * shard, numel) for each in range(size + 1)]
        self._shards = [slice(start, stop) for start, stop in pairwise(bounds)]
        sizes = [codec.nbytes(part.stop - part.start) for part in self._shards]
        # Rows are as long as the longest message, for collectives of equal parts; the last shards may be shorter.
        self.outgoing = torch.zeros(size, codec.nbytes(shard), dtype=torch.uint8, device=flat.device)
        self.incoming = torch.zeros_like(self.outgoing)
        self.own = torch.zeros_like(self.outgoing[0])
        self._move = torch.empty(min(shard, numel), dtype=flat.dtype, device=flat.device)
        self._own_shard = self._shards[rank]
        self._of_shards = [row[:nbytes] for row, nbytes in zip(self.outgoing, sizes, strict=True)]
        self._of_workers = [row[: sizes[rank]] for row in self.incoming]
        self._of_sum = self.own[: sizes[rank]]
        self._others = [each for each in range(size) if each != rank]

    @property
    def nbytes(self) -> int:
        """Bytes that this worker sends, to the others: 2 (p - 1) / p times the encoded vector."""
        return 2 * len(self._others) * self.own.numel()

    def encode_(self, residual: Tensor) -> None:
        """Write the messages to the shards' owners, and leave in ``residual`` what they lack."""
        for rank in self._others:
            self._codec.encode_rest_(residual[self._shards[rank]], self._of_shards[rank])

    def add_up_(self, residual: Tensor) -> None:
        """Add the others' messages to this worker's shard, write its message, and leave there what it lacks."""
        own = residual[self._own_shard]
        for rank in self._others:
            self._codec.add_decoded_(self._of_workers[rank], own)
        self._codec.encode_rest_(own, self._of_sum)

    def move_(self, center: ReplicatedCenter) -> None:
        """Move the center by the messages of all shards."""
        for message, part in zip(self._of_shards, self._shards, strict=True):
            total = self._move[: part.stop - part.start]  # not a wire: a device may still be reading that
            self._codec.decode(message, total)
            center.move_(part, total, 1.0)


def load_residual(residual: FlatTensors, state: dict[str, Any]) -> None:
    """Let a residual be that of a checkpoint; it is unchanged if the checkpoint has none.

    Args:
        residual: Is written to.
        state: With the flat residual by the name "residual".
    """
    saved = state.get("residual")  # none where the checkpoint's run was not compressed
    if saved is None:
        return
    if saved.shape == residual.flat.shape:
        residual.flat.copy_(saved)
        return
    warnings.warn(
        f"wire_dtype: the checkpoint's residual has {saved.numel()} elements, this run's {residual.flat.numel()}; it"
        " starts at zero: what the last messages lacked is not sent.",
        RuntimeWarning,
        stacklevel=3,
    )
