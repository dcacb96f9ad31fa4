"""What the workers of one host have in shared memory: made at the same point on all of them, or on none."""

import warnings
from datetime import timedelta
from itertools import count

import torch
from torch.distributed.distributed_c10d import Store

from lightning_easgd.transport.channel import Channel
from lightning_easgd.transport.errors import CenterError
from lightning_easgd.transport.meeting_place import MeetingPlace
from lightning_easgd.transport.shared_channel import ROW, SharedChannel
from lightning_easgd.transport.shared_vectors import SharedVectors
from lightning_easgd.transport.store_client import StoreClient, store_server

__all__ = ["shared_channel", "shared_vectors"]

_places = count()  # keys of those of before are still in the store


def shared_channel(store: Store, channel: Channel, timeout: timedelta, sums: int) -> Channel:
    """A channel that sums up a few integers in shared memory and all else on another; or that one, with a warning.

    Args:
        store: The workers' store.
        channel: Reduces CPU tensors.
        timeout: How long to wait for another worker.
        sums: How many sums of integers a worker may be ahead of another.
    """
    vectors = shared_vectors(ROW * sums, torch.int64, store, channel, timeout)
    return channel if vectors is None else SharedChannel(vectors, channel)


def shared_vectors(
    numel: int, dtype: torch.dtype, store: Store, control: Channel, timeout: timedelta
) -> SharedVectors | None:
    """A vector of each worker, mapped by all; if one of them cannot, None on all, with a warning where it failed.

    Args:
        numel: Elements of each vector.
        dtype: Dtype of the elements.
        store: The workers' store; it is cloned.
        control: Reduces CPU tensors.
        timeout: How long to wait for another worker.
    """
    client = StoreClient(store, timeout.total_seconds(), server=store_server())
    keys = client.under(f"easgd/shared/{next(_places)}")
    place = MeetingPlace(keys, rank=control.rank, size=control.size, let_go=client.close)
    problem: Exception | None = None
    vectors: SharedVectors | None = None
    try:
        vectors = SharedVectors(numel, dtype, place, timeout)
    except CenterError as error:
        problem = error
    try:
        if _all_well(control, problem):
            assert vectors is not None
            try:
                vectors.attach()
            except CenterError as error:
                problem = error
            if _all_well(control, problem):
                return vectors
    except BaseException:
        _close(vectors, place)
        raise
    _close(vectors, place)
    if problem is not None:
        warnings.warn(
            f"EASGDStrategy: rank {control.rank} cannot share memory ({problem}) The workers announce and"
            " exchange through the process group instead, which is slower.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def _close(vectors: SharedVectors | None, place: MeetingPlace) -> None:
    if vectors is not None:
        vectors.close()
    place.close()


def _all_well(control: Channel, problem: Exception | None) -> bool:
    problems = torch.tensor([int(problem is not None)])
    control.sum(problems).wait()
    return not problems.item()
