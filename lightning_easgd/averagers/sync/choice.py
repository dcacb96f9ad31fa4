"""Which sum the workers of a fit use: made at the same point on all of them."""

from collections.abc import Callable
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from lightning_easgd.averagers.sync.all_reduced_sum import AllReducedSum
from lightning_easgd.averagers.sync.compressed_sum import CompressedSum
from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.sync.shared_sum import SharedSum
from lightning_easgd.method.compression import Codec
from lightning_easgd.transport.channel import Channel, MessageChannel
from lightning_easgd.transport.shared_vectors import shared_vectors

__all__ = ["MakeSum", "all_reduced_sums", "compressed_sums", "shared_sums"]

MakeSum = Callable[[ReplicatedCenter], DifferenceSum]
"""From the center to what sums up the differences from it; all workers call it at the same point."""


def all_reduced_sums(make_channel: Callable[[], Channel], tau: int) -> MakeSum:
    """Sums by an all-reduce over τ steps, each on a channel of its own.

    Args:
        make_channel: Makes a channel; all workers call it at the same point.
        tau: τ.
    """
    return lambda center: AllReducedSum(center, make_channel(), tau)


def compressed_sums(make_channel: Callable[[], MessageChannel], make_codec: Callable[[], Codec]) -> MakeSum:
    """Sums of encoded differences, each on a channel of its own.

    Args:
        make_channel: Makes a channel; all workers call it at the same point.
        make_codec: Makes the codec of a sum.
    """
    return lambda center: CompressedSum(center, make_channel(), make_codec())


def shared_sums(store: Store, control: Channel, timeout: timedelta, otherwise: MakeSum) -> MakeSum:
    """Sums in memory that all workers share; if one of them cannot, all use another kind, with a warning.

    Args:
        store: The workers' store.
        control: Reduces CPU tensors.
        timeout: How long to wait for another worker.
        otherwise: Makes the other kind.
    """

    def make(center: ReplicatedCenter) -> DifferenceSum:
        vectors = shared_vectors(center.flat.numel(), center.flat.dtype, store, control, timeout)
        return otherwise(center) if vectors is None else SharedSum(center, vectors)

    return make
