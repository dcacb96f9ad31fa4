"""Which sum the workers of a fit use: made at the same point on all of them."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import count

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_easgd.averagers.all_reduced_sum import AllReducedSum
from lightning_easgd.averagers.channel import Channel
from lightning_easgd.averagers.compressed_sum import CompressedSum
from lightning_easgd.averagers.difference_sum import DifferenceSum
from lightning_easgd.averagers.meeting_place import MeetingPlace
from lightning_easgd.averagers.message_channel import MessageChannel
from lightning_easgd.averagers.shared_sum import SharedSum
from lightning_easgd.center import FlatTensors
from lightning_easgd.compression import Codec
from lightning_easgd.service.errors import CenterError
from lightning_easgd.service.stores import own_client

__all__ = ["MakeSum", "all_reduced_sums", "compressed_sums", "shared_sums"]

MakeSum = Callable[[FlatTensors], DifferenceSum]
"""From the center to what sums up the differences from it; all workers call it at the same point."""

_sums = count()  # keys of the sums of before are still in the store


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
        store: The workers' store; it is cloned.
        control: Reduces CPU tensors.
        timeout: How long to wait for another worker.
        otherwise: Makes the other kind.
    """

    def make(center: FlatTensors) -> DifferenceSum:
        own_store = PrefixStore(f"easgd/sum/{next(_sums)}", own_client(store))
        place = MeetingPlace(own_store, rank=control.rank, size=control.size)
        problem: Exception | None = None
        shared: SharedSum | None = None
        try:
            shared = SharedSum(center, place, timeout)
        except CenterError as error:
            problem = error
        if _all_well(control, problem):
            assert shared is not None
            try:
                shared.attach()
            except CenterError as error:
                problem = error
            if _all_well(control, problem):
                return shared
        if shared is not None:
            shared.close()
        if problem is not None:
            warnings.warn(
                f"EASGDStrategy: rank {control.rank} cannot share memory ({problem}) The workers exchange through the"
                " process group instead, which is slower.",
                RuntimeWarning,
                stacklevel=2,
            )
        return otherwise(center)

    return make


def _all_well(control: Channel, problem: Exception | None) -> bool:
    problems = torch.tensor([int(problem is not None)])
    control.sum(problems).wait()
    return not problems.item()
