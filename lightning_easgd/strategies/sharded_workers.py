"""Workers whose parameters are sharded over their ranks, under a Trainer and under Fabric."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim import Optimizer

from lightning_easgd.tensors.shards import is_shard, local, sharded_like
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = [
    "DOCUMENTATION",
    "Size",
    "inside",
    "load_parts",
    "make_mesh",
    "parts_of",
    "resolve_sizes",
    "sampler_arguments",
    "save_of_first_worker",
]

Size = int | Literal["auto"]

DOCUMENTATION = """Elastic Averaging SGD whose workers are sharded over several devices, by FSDP2 or tensor parallelism.

    It is to ``ModelParallelStrategy`` what ``EASGDStrategy`` is to ``DDPStrategy``: ``configure_model`` parallelizes
    the module over ``self.device_mesh``, as Lightning's documentation has it, and that is the mesh of one worker.
    Between the workers each rank averages its own shards with the ranks of its coordinate in the others, so that it
    holds, sends and keeps a part of the center as it does of the parameters. Ranks are numbered worker by worker.
    Data-parallel ranks of all workers draw their own data, and the ranks of tensor parallelism the same.

    :attr:`center` has shards (``DTensor``), and all ranks of a worker ask for :meth:`elastic_distance` together. A
    checkpoint is one of ``ModelParallelStrategy``'s, whose weights are the center. It cannot be written after an error
    or in a signal handler, where no rank can wait for the others' shards.

    Args:
        data_parallel_size: Ranks of *one worker* over which data and parameters are sharded; "auto" for as many as make
            a node a worker.
        tensor_parallel_size: Ranks of one worker among which each layer's work is divided; "auto" for 1.
        save_distributed_checkpoint: True for a folder, to which each rank of worker 0 writes its shards; False for one
            file.
        tau: As for ``EASGDStrategy``.
        beta: As for ``EASGDStrategy``.
        alpha: As for ``EASGDStrategy``; p is the number of workers.
        rho: As for ``EASGDStrategy``.
        momentum: As for ``EASGDStrategy``.
        center_rule: As for ``EASGDStrategy``.
        wire_dtype: As for ``EASGDStrategy``.
        on_nonfinite: As for ``EASGDStrategy``.
        center_device: As for ``EASGDStrategy``.
        evaluate: As for ``EASGDStrategy``.
        recalibrate_batchnorm: As for ``EASGDStrategy``.
        worker_state: As for ``EASGDStrategy``: each rank's part, by default in files beside the checkpoint.
        process_group_backend: As for ``ModelParallelStrategy``; else as for ``EASGDStrategy``.
        timeout: As for ``EASGDStrategy``.

    Raises:
        TypeError: If a size or ``tau`` is not an int, or a rate neither number nor schedule.
        ValueError: If a value is out of its range.
    """
"""What the class of each tree says of itself."""

_INSIDE = ("data_parallel", "tensor_parallel")


def resolve_sizes(strategy: str, data_parallel: Size, tensor_parallel: Size, nodes: int, devices: int) -> list[int]:
    """One worker's data-parallel and tensor-parallel sizes.

    Args:
        strategy: Name of the strategy, for errors.
        data_parallel: As given; "auto" for as many as make a node a worker.
        tensor_parallel: As given; "auto" for 1.
        nodes: Number of nodes.
        devices: Number of devices of a node.

    Raises:
        TypeError: If a size is no number.
        ValueError: If the ranks cannot be cut into such workers.
    """
    for name, size in (("data_parallel_size", data_parallel), ("tensor_parallel_size", tensor_parallel)):
        if size != "auto" and (not isinstance(size, int) or isinstance(size, bool)):
            raise TypeError(f"{strategy}({name}={size!r}): give a number of ranks, or 'auto'.")
        if size != "auto" and size < 1:
            raise ValueError(f"{strategy}({name}={size}): a worker has at least 1 rank.")
    tensor = 1 if tensor_parallel == "auto" else tensor_parallel
    data = max(1, devices // tensor) if data_parallel == "auto" else data_parallel
    if devices and (nodes * devices) % (data * tensor):
        raise ValueError(
            f"{strategy}(data_parallel_size={data}, tensor_parallel_size={tensor}): these are the sizes of one worker,"
            f" and {nodes * devices} ranks ({nodes} nodes of {devices} devices) cannot be cut into workers of"
            f" {data * tensor}; give sizes whose product divides {nodes * devices}."
        )
    return [data, tensor]


def make_mesh(device: torch.device, layout: WorkerLayout, shape: Sequence[int], timeout: timedelta) -> DeviceMesh:
    """The mesh of all ranks, with the dimensions "workers", "data_parallel" and "tensor_parallel".

    Args:
        device: Of this rank.
        layout: Which ranks make up which worker.
        shape: The shape of a worker.
        timeout: How long a collective operation on it may wait for the slowest rank.
    """
    mesh = init_device_mesh(device.type, (layout.workers, *shape), mesh_dim_names=("workers", *_INSIDE))
    for group in mesh.get_all_groups():
        _set_pg_timeout(timeout, group)  # a new group has torch's own
    return mesh


def inside(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh of this rank's worker."""
    return mesh[_INSIDE]


def sampler_arguments(mesh: DeviceMesh, layout: WorkerLayout, rank: int) -> dict[str, int]:
    """How data are shared out: data-parallel ranks draw their own, and those of tensor parallelism the same."""
    data = mesh["data_parallel"]
    return {
        "num_replicas": layout.workers * data.size(),
        "rank": layout.worker_of(rank) * data.size() + data.get_local_rank(),
    }


def parts_of(state: Any) -> Any:
    """A nested state with this rank's parts in place of the shards in it."""
    return apply_to_collection(state, Tensor, local)


def load_parts(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load into an optimizer what :func:`parts_of` has made of its state."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def whole(number: int, value: Any) -> Any:
        parameter = parameters[number]
        part = isinstance(value, Tensor) and is_shard(parameter) and value.shape == local(parameter).shape
        return sharded_like(value.to(parameter.device), parameter) if part else value

    states = {
        number: {name: whole(number, value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def save_of_first_worker(state: dict[str, Any], path: Path, group: dist.ProcessGroup) -> None:
    """Write worker 0's shards; called on its ranks alone.

    In one save with those of another worker, equal names would count as replicas, and what is written would be partly
    the one's and partly the other's.
    """
    from torch.distributed import checkpoint  # noqa: PLC0415 - it takes its time

    checkpoint.save(state, checkpoint_id=path, process_group=group)  # type: ignore[attr-defined]
