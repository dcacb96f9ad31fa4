"""The point from which all workers start: rank 0's; and what all must have been told alike."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.utils import _sync_params_and_buffers

from lightning_easgd.strategies.outside_values import ignored_names, listed
from lightning_easgd.tensors.buffers import can_be_written
from lightning_easgd.tensors.shards import is_shard, local

__all__ = [
    "average_by_sum",
    "broadcast_parts",
    "broadcast_states",
    "check_alike",
    "check_whole",
    "warn_of_unreduced",
]

_BROADCAST_BYTES = 250 * 1024 * 1024


def check_alike(strategy: str, arguments: Mapping[str, object]) -> None:
    """Refuse arguments that differ between the ranks; all ranks call it.

    Ranks that had been told different things would wait for each other for nothing, or average what does not belong
    together.

    Args:
        strategy: Name of the strategy.
        arguments: This rank's, by name; compared by what they show.

    Raises:
        ValueError: On all ranks; it names the first argument that differs.
    """
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, {name: repr(value) for name, value in arguments.items()})
    first = everyones[0]
    for rank, theirs in enumerate(everyones):
        for name in sorted(first.keys() | theirs.keys()):
            here, there = (each.get(name, "nothing") for each in (first, theirs))
            if here != there:
                raise ValueError(
                    f"{strategy}({name}=...): rank 0 has {here} and rank {rank} has {there}; give all ranks the same."
                )


def broadcast_states(module: nn.Module, *, with_buffers: bool, strategy: str, trained: Collection[Tensor] = ()) -> None:
    """Give all ranks rank 0's parameters and buffers, as DDP's constructor does; all ranks call it.

    A buffer that has another shape or dtype on some rank, is not there, or cannot be written to stays each rank's own;
    so does what the module's author keeps out of DDP.

    Args:
        module: The module.
        with_buffers: Whether buffers are given, too.
        strategy: Name of the strategy, for errors.
        trained: What of it is each rank's own already, as training has begun with it.

    Raises:
        RuntimeError: If the parameters differ between the ranks in name, shape or dtype.
    """
    if dist.get_world_size() == 1:
        return
    ignored = ignored_names(module) | _names_of(trained, module)
    parameters = {name: p.detach() for name, p in module.named_parameters() if name not in ignored}
    buffers = {name: b.detach() for name, b in module.named_buffers() if name not in ignored} if with_buffers else {}
    own = _described(parameters), _described(buffers)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    for rank, (theirs, _) in enumerate(everyones):
        unlike = sorted(name for name, _ in set(theirs.items()) ^ set(own[0].items()))
        if unlike:
            raise RuntimeError(
                f"{strategy}: the parameter {unlike[0]} is {own[0].get(unlike[0], 'not there')} on rank"
                f" {dist.get_rank()} and {theirs.get(unlike[0], 'not there')} on rank {rank}; build the same model on"
                " every rank."
            )
    common = [
        buffer
        for name, buffer in buffers.items()
        if all(each.get(name) == own[1][name] for _, each in everyones) and can_be_written(buffer)
    ]
    _sync_params_and_buffers(_get_default_group(), _as_real([*parameters.values(), *common]), _BROADCAST_BYTES, 0)


def check_whole(strategy: str, module: nn.Module) -> None:
    """Refuse a module of which a rank has only a part.

    Raises:
        TypeError: If it is sharded.
    """
    remedy = "in configure_model (with Fabric: in parallelize_fn), with EASGDModelParallelStrategy."
    if any(cls.__name__ == "FullyShardedDataParallel" for part in module.modules() for cls in type(part).__mro__):
        raise TypeError(
            f"{strategy}: the module is wrapped in FullyShardedDataParallel (FSDP1), so that a rank has no parameters"
            f" of its own; use torch.distributed.fsdp.fully_shard {remedy}"
        )
    sharded = next((name for name, parameter in module.named_parameters() if is_shard(parameter)), None)
    if sharded is not None:
        raise TypeError(
            f"{strategy}: the parameter {sharded} is a shard (DTensor), and here every rank of a worker has all of the"
            f" parameters; shard {remedy}"
        )


def warn_of_unreduced(strategy: str, module: nn.Module, group: dist.ProcessGroup) -> None:
    """Warn of parameters that FSDP2 has not taken in: each data-parallel rank would train its own.

    Args:
        strategy: Name of the strategy.
        module: The module, parallelized.
        group: This worker's data-parallel ranks that this one is of.
    """
    ranks = set(dist.get_process_group_ranks(group))
    if len(ranks) == 1:
        return
    names = [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and not (is_shard(parameter) and ranks <= _ranks_of(parameter))
    ]
    if names:
        rank_zero_warn(
            f"{strategy}: {listed(names)} are not sharded over the {len(ranks)} data-parallel ranks of a worker:"
            " nothing reduces their gradients, so that these ranks train each its own. Have"
            " fully_shard(..., mesh=self.device_mesh['data_parallel']) take in the module that has them, unless they"
            " are reduced by other means."
        )


def average_by_sum(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Let FSDP2 divide the sum of the gradients itself where the process group gives a sum for their mean.

    gloo does in torch 2.8, in silence (pytorch#162338); asked is the group, as nobody says where it has been mended.
    All data-parallel ranks call it.

    Args:
        module: The module, parallelized.
        group: This worker's data-parallel ranks that this one is of.
    """
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - it takes its time

    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not sharded or "gloo" not in dist.get_backend(group):
        return
    mean, ones = torch.zeros(1), torch.ones(dist.get_world_size(group))
    options = dist.ReduceScatterOptions()
    options.reduceOp = dist.ReduceOp(dist.ReduceOp.AVG)
    group._reduce_scatter_base(mean, ones, options).wait()
    if float(mean) != 1.0:
        for part in sharded:
            part.set_force_sum_reduction_for_comms(True)


def _ranks_of(parameter: Any) -> set[int]:
    return set(parameter.device_mesh.mesh.flatten().tolist())


@torch.no_grad()
def broadcast_parts(module: nn.Module, group: dist.ProcessGroup, trained: Collection[Tensor] = ()) -> None:
    """Give ranks of equal coordinate the parts that the one in worker 0 has of the parameters, and its buffers.

    What the module's author keeps out of DDP stays each rank's own.

    Args:
        module: The module.
        group: The ranks of this coordinate, the one of worker 0 first.
        trained: As for :func:`broadcast_states`.
    """
    ignored = ignored_names(module) | _names_of(trained, module)
    named = (*module.named_parameters(), *module.named_buffers())
    tensors = [local(tensor).detach() for name, tensor in named if name not in ignored]
    tensors = [tensor for tensor in tensors if tensor.numel() and can_be_written(tensor)]
    _sync_params_and_buffers(group, _as_real(tensors), _BROADCAST_BYTES, 0)


def _names_of(tensors: Collection[Tensor], module: nn.Module) -> frozenset[str]:
    known = {id(tensor) for tensor in tensors}
    return frozenset(
        name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if id(tensor) in known
    )


def _as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory without complex numbers, which gloo does not take in torch 2.8."""
    whole = (tensor.conj() if tensor.is_conj() else tensor for tensor in tensors)
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in whole]


def _described(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} of shape {tuple(tensor.shape)}" for name, tensor in tensors.items()}
