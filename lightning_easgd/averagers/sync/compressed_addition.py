"""Workers that come and go add up their differences in compressed messages, and keep what the compression drops."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.addition import Addition
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.sync.shard_messages import ShardMessages, load_residual, shard_size
from lightning_easgd.method.compression import WireDtype, make_codec
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.membership import Membership

__all__ = ["CompressedAddition"]


@final
class CompressedAddition(Addition):
    r"""A sum of encoded differences, by the equations of :class:`ShardMessages`, of other shards in each exchange.

    A worker's residual :math:`e^i` begins at zero, and goes with it. Those of the workers that live make up for what
    has been rounded, whatever shards they had: :math:`\tilde x + \sum_i e^i` is where the exact sums would have brought
    the center. An exchange works on a copy of the residual, which takes its place when the exchange counts: one that is
    lost leaves it as it was, bit for bit.

    The memory beside the wire is twice the residual, the messages, twice the encoded vector, and one decoded shard.

    Args:
        center: As for :class:`Addition`.
        wire: Likewise.
        members: Likewise.
        wire_dtype: What differences are rounded to on their way.
    """

    def __init__(self, center: ReplicatedCenter, wire: FlatTensors, members: Membership, wire_dtype: WireDtype) -> None:
        super().__init__(center, wire, members)
        self.wire_dtype = wire_dtype
        self._codec = make_codec(wire_dtype)
        self._residual, self._next = wire.like(), wire.like()
        self._place = (0, 0)
        self._messages: ShardMessages | None = None

    @property
    @override
    def given(self) -> list[list[Tensor]]:
        return self._wire.groups

    @property
    @override
    def nbytes(self) -> int:
        size = self._members.size
        return 2 * (size - 1) * self._codec.nbytes(shard_size(self._codec, self._wire.flat.numel(), size))

    @override
    def start(self, shares: Sequence[float]) -> None:
        vectors = (self._next.segments, self._residual.segments, self._wire.segments)
        for following, residual, difference, share in zip(*vectors, shares, strict=True):
            torch.add(residual, difference, alpha=share, out=following)

    @override
    def add_up(self) -> None:
        place = self._members.rank, self._members.size
        if self._messages is None or place != self._place:
            self._place, self._messages = place, ShardMessages(self._codec, self._wire.flat, *place)
        messages, residual = self._messages, self._next.flat
        messages.encode_(residual)
        self._members.all_to_all(messages.outgoing, messages.incoming)
        messages.add_up_(residual)
        self._members.all_gather(messages.own, messages.outgoing)

    @override
    def move(self) -> None:
        assert self._messages is not None
        self._messages.move_(self._center)
        self._residual, self._next = self._next, self._residual

    @override
    def forget(self) -> None:
        self._residual.flat.zero_()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"residual": self._residual.flat}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        load_residual(self._residual, state)
