"""Over which channel the workers of a fit announce exchanges, and by which sum they make them."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_easgd.averagers.sync.all_reduced_sum import AllReducedSum
from lightning_easgd.averagers.sync.compressed_sum import CompressedSum
from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.sync.shared_sum import SharedSum
from lightning_easgd.averagers.sync.slice_join import ChannelJoin, MemoryJoin, SliceJoin
from lightning_easgd.averagers.sync.sliced_sum import SlicedSum
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.method.compression import Codec, WireDtype, make_codec
from lightning_easgd.transport.channel import (
    Channel,
    Failure,
    LoneChannel,
    MessageChannel,
    ProcessGroupChannel,
    ProcessGroupMessageChannel,
)
from lightning_easgd.transport.direct_channel import DirectChannel, DirectMessageChannel
from lightning_easgd.transport.mesh_opening import open_mesh
from lightning_easgd.transport.shared_channel import SharedChannel, shared_channel
from lightning_easgd.transport.shared_vectors import shared_vectors
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = [
    "Choice",
    "MakeJoin",
    "MakeSum",
    "Setting",
    "all_reduced_sums",
    "channel_joins",
    "choose",
    "compressed_sums",
    "make_channel",
    "memory_joins",
    "shared_sums",
    "sliced_sums",
]

MakeJoin = Callable[[ReplicatedCenter], SliceJoin]
"""From the center to what joins its slices; all ranks of a worker call it at the same point."""

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


def sliced_sums(make_join: MakeJoin, make_sum: MakeSum) -> MakeSum:
    """Sums of which each rank of a worker makes a slice, for workers whose ranks all hold all of the center.

    Args:
        make_join: Makes what joins the slices; all ranks call it at the same point.
        make_sum: Makes the sum of a slice.
    """
    return lambda center: SlicedSum(center, make_sum, make_join(center))


def channel_joins(make_channel: Callable[[], Channel]) -> MakeJoin:
    """Joins of slices through a channel of the worker's ranks.

    Args:
        make_channel: Makes a channel; all ranks call it at the same point.
    """
    return lambda _: ChannelJoin(make_channel())


def memory_joins(store: Store, inside: Channel, everyone: Channel, timeout: timedelta, otherwise: MakeJoin) -> MakeJoin:
    """Joins of slices in memory that each worker's ranks share; if one rank of all cannot, otherwise, with a warning.

    Args:
        store: The part of the ranks' store that this worker has for itself.
        inside: The worker's ranks; it reduces CPU tensors.
        everyone: The ranks of all workers, likewise.
        timeout: How long to wait for another rank.
        otherwise: Makes the other kind; all ranks call it together.
    """

    def make(center: ReplicatedCenter) -> SliceJoin:
        room = MemoryJoin.room(center, inside.size)
        vectors = shared_vectors(room, center.flat.dtype, store, inside, timeout)
        without = torch.tensor([int(vectors is None)])
        everyone.sum(without).wait()
        if vectors is not None and int(without) == 0:
            return MemoryJoin(inside.rank, inside.size, vectors)
        if vectors is not None:
            vectors.close()
        return otherwise(center)

    return make


@dataclass(frozen=True)
class Setting:
    """What the choice depends on; the same on all ranks.

    Attributes:
        device: Where the parameters are.
        backend: The process group's.
        tau: τ.
        optimizers: How many optimizers the fit has.
        is_one_host: Whether all workers are on one host.
        is_worker_on_host: Whether the ranks of each worker are on one host.
        has_chosen_backend: Whether the user has named the backend, which keeps workers from sharing memory.
        wire_dtype: What differences are rounded to on their way; None for nothing.
        center_device: "cpu" for a center in host memory; None for one where the parameters are.
    """

    device: torch.device
    backend: str
    tau: int
    optimizers: int
    is_one_host: bool = False
    is_worker_on_host: bool = False
    has_chosen_backend: bool = False
    wire_dtype: WireDtype | None = None
    center_device: str | None = None


@dataclass(frozen=True)
class Choice:
    """What has been chosen.

    Attributes:
        sum: How differences are added up; "shared" where all workers can share memory, else "all-reduced".
        backend: The backend of what goes through process groups; "direct" for connections of our own.
        spread: Over how many steps the buckets of an all-reduce are spread.
        announces_in_memory: Whether exchanges are announced in shared memory, where that is possible.
        joins_in_memory: Whether the ranks of a worker give each other their slices of the center in shared memory,
            where that is possible.
    """

    sum: Literal["shared", "all-reduced", "compressed"]
    backend: str
    spread: int
    announces_in_memory: bool
    joins_in_memory: bool = False


def choose(setting: Setting) -> Choice:
    """Choose; nothing is opened, and no process needs to be there."""
    on_host = setting.center_device == "cpu"
    on_cpu = setting.device.type == "cpu"
    in_memory = setting.is_one_host and not setting.has_chosen_backend
    # Beside a GPU a bucket that is reduced on the host must not overtake the copies of others; and the groups of
    # several optimizers must not start their work in another order on each rank, as buckets would.
    spread = setting.tau if on_cpu or (not on_host and setting.optimizers == 1) else 1
    kind: Literal["shared", "all-reduced", "compressed"] = "shared" if on_cpu and in_memory else "all-reduced"
    if setting.wire_dtype is not None:
        kind = "compressed"
    backend = "direct" if on_cpu and not setting.has_chosen_backend else "gloo" if on_host else setting.backend
    joins_in_memory = setting.is_worker_on_host and not setting.has_chosen_backend and (on_cpu or on_host)
    return Choice(kind, backend, spread, in_memory, joins_in_memory)


def make_channel(
    setting: Setting,
    store: Store,
    timeout: timedelta,
    strategy: str,
    who_is_missing: Callable[[], str] = str,
    *,
    layout: WorkerLayout,
    rank: int,
    is_sharded: bool = False,
    judges_together: bool = False,
) -> tuple[Channel, MakeSum, WorkerRanks]:
    """Open the channels on which all ranks announce, and those of equal coordinate exchange.

    All ranks call it at the same point.

    Args:
        setting: What the choice depends on.
        store: The ranks' store.
        timeout: How long to wait for another rank.
        strategy: Name of the strategy, for errors.
        who_is_missing: Finds a sentence on who is to blame, when an operation has failed.
        layout: Which ranks make up which worker.
        rank: This one.
        is_sharded: As for :class:`WorkerRanks`.
        judges_together: As for :class:`WorkerRanks`.

    Returns:
        The channel of the announcements, what makes the sum of an optimizer, and this worker's ranks:
        ``SynchronousAveraging`` takes them.
    """
    choice = choose(setting)
    failure = Failure(timeout, strategy, who_is_missing)
    control: Channel
    if choice.backend == "direct" and not choice.announces_in_memory and dist.get_world_size() > 1:
        control = DirectChannel(open_mesh(rank, dist.get_world_size(), store, failure), strategy)
    else:
        control = ProcessGroupChannel("gloo", timeout, strategy, who_is_missing)
    if choice.announces_in_memory:
        # One of each optimizer, and one at a meeting, is under way at a worker; another may be as far behind again.
        control = shared_channel(store, control, timeout, 2 * (setting.optimizers + 1))
    alone = layout.per_worker == 1
    columns = None if alone else layout.across
    worker = WorkerRanks.one(control)
    whole = store
    if not alone:
        store = PrefixStore(f"easgd/coordinate/{layout.coordinate_of(rank)}", store)
        across, inside = (
            ProcessGroupChannel("gloo", timeout, strategy, who_is_missing, ranks)
            for ranks in (layout.across, layout.inside)
        )
        worker = WorkerRanks(across, inside, is_sharded, judges_together)
    workers = worker.across

    backend = choice.backend if choice.backend != "direct" else "gloo"  # of what is not direct
    is_direct = choice.backend == "direct" and workers.size > 1
    connect = partial(open_mesh, workers.rank, workers.size, store, failure)

    def reduced() -> Channel:
        if workers.size == 1 and choice.sum == "shared":
            return LoneChannel()  # in place of what a rank that cannot share memory would be alone in making
        if is_direct:
            return DirectChannel(connect(), strategy)
        return ProcessGroupChannel(backend, timeout, strategy, who_is_missing, columns)

    def messages() -> MessageChannel:
        if is_direct:
            return DirectMessageChannel(connect())
        return ProcessGroupMessageChannel(backend, timeout, strategy, who_is_missing, columns)

    if choice.sum == "compressed":
        assert setting.wire_dtype is not None
        make_sum = compressed_sums(messages, partial(make_codec, setting.wire_dtype))
    else:
        make_sum = all_reduced_sums(reduced, choice.spread)
        if choice.sum == "shared" and isinstance(control, SharedChannel):  # where they can share memory at all
            make_sum = shared_sums(store, workers, timeout, otherwise=make_sum)
    if not (alone or is_sharded):
        within = partial(ProcessGroupChannel, backend, timeout, strategy, who_is_missing, ranks=layout.inside)
        make_join = channel_joins(within)
        if choice.joins_in_memory:
            own = PrefixStore(f"easgd/worker/{layout.worker_of(rank)}", whole)
            make_join = memory_joins(own, worker.inside, control, timeout, otherwise=make_join)
        make_sum = sliced_sums(make_join, make_sum)
    return control, make_sum, worker
