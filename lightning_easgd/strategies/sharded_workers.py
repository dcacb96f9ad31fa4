"""Workers whose parameters are sharded over their ranks, under a Trainer and under Fabric."""

import math
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.device_mesh as torch_meshes
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.imports import compare_version
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim import Optimizer

from lightning_easgd.strategies.common_start import average_by_sum, broadcast_parts, warn_of_unreduced
from lightning_easgd.strategies.worker_arguments import DEFAULT_TIMEOUT
from lightning_easgd.strategies.worker_process import WorkerProcess
from lightning_easgd.tensors.shards import is_shard, local, sharded_like
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = [
    "DOCUMENTATION",
    "Size",
    "inside",
    "load_parts",
    "make_mesh",
    "of_sharded_workers",
    "parts_of",
    "resolve_sizes",
    "sampler_arguments",
]

Size = int | Literal["auto"]

DOCUMENTATION = """Elastic Averaging SGD whose workers are sharded over several devices, by FSDP2 or tensor parallelism.

    It is to ``ModelParallelStrategy`` what ``EASGDStrategy`` is to ``DDPStrategy``: ``configure_model`` parallelizes
    the module over ``self.device_mesh``, as Lightning's documentation has it, and that is the mesh of one worker.
    Between the workers each rank averages its own shards with the ranks of its coordinate in the others, so that it
    holds, sends and keeps a part of the center as it does of the parameters. Ranks are numbered worker by worker.
    Data-parallel ranks of all workers draw their own data, and the ranks of tensor parallelism the same.

    :attr:`center` has shards (``DTensor``), and all ranks of a worker read it, and ask for :meth:`elastic_distance`,
    together. A checkpoint is one of ``ModelParallelStrategy``'s, whose weights are the center. It cannot be written
    after an error or in a signal handler, where no rank can wait for the others' shards.

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
        outer_momentum: As for ``EASGDStrategy``.
        outer_nesterov: As for ``EASGDStrategy``.
        pull_to: As for ``EASGDStrategy``.
        delay: As for ``EASGDStrategy``.
        center_rule: As for ``EASGDStrategy``.
        wire_dtype: As for ``EASGDStrategy``.
        on_nonfinite: As for ``EASGDStrategy``.
        center_device: As for ``EASGDStrategy``.
        fault_tolerance: As for ``EASGDStrategy``, with a Trainer; all ranks of a launch are one worker then.
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

_METADATA = "meta.pt"  # Lightning's, in the folder of a distributed checkpoint
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
    if compare_version("torch", operator.ge, "2.9.0", use_base_version=True):
        return mesh[_INSIDE]
    # Before, a part of a mesh had no parts. Of one that is no part torch makes further groups (``_flatten``) without
    # the ranks of the other workers, under the same names as theirs.
    groups = [mesh.get_group(name) for name in _INSIDE]
    own = mesh.mesh[mesh.get_local_rank("workers")]
    return DeviceMesh.from_group(groups, mesh.device_type, own, mesh_dim_names=_INSIDE)


def sampler_arguments(mesh: DeviceMesh, layout: WorkerLayout, rank: int) -> dict[str, int]:
    """How data are shared out: data-parallel ranks draw their own, and those of tensor parallelism the same."""
    # Not by way of mesh["data_parallel"]: in torch 2.8 the last slice of a mesh is whose part an equal one is.
    place, size = mesh.get_local_rank("data_parallel"), mesh.size(1)
    return {"num_replicas": layout.workers * size, "rank": layout.worker_of(rank) * size + place}


def parts_of(state: Any) -> Any:
    """A nested state with this rank's parts in place of the shards in it."""
    return apply_to_collection(state, Tensor, local)


def load_parts(strategy: str, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load into an optimizer what :func:`parts_of` has made of its state.

    Args:
        strategy: Name of the strategy, for errors.
        optimizer: The optimizer, which another worker's state has been loaded into: what is a shard there is one here.
        state: The state.

    Raises:
        ValueError: If it is that of other parameter groups.
    """
    saved, here = ([len(group["params"]) for group in each] for each in (state["param_groups"], optimizer.param_groups))
    if saved != here:
        raise ValueError(
            f"{strategy}: where the checkpoint was saved the groups of the {type(optimizer).__name__} had {saved}"
            f" parameters, and here they have {here}: a finetuning callback that has added some is restored too late."
            " Give the optimizer all parameters in configure_optimizers, and freeze by requires_grad_(False)."
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {
            name: _whole(value, optimizer.state.get(parameters[number], {}).get(name), parameters[number])
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def _whole(value: Any, like: Any, parameter: Tensor) -> Any:
    """A value of an optimizer's state with shards in place of parts, where another value has them, or the parameter."""
    if isinstance(value, list):
        others = like[: len(value)] if isinstance(like, list) else []
        return [_whole(each, other, parameter) for each, other in zip_longest(value, others)]
    if not isinstance(value, Tensor):
        return value
    like = like if isinstance(like, Tensor) else parameter
    part = is_shard(like) and value.shape == local(like).shape
    return sharded_like(value.to(parameter.device), like) if part else value


def of_sharded_workers(cls: type) -> type:
    """Decorate a strategy of sharded workers: give it what a Trainer's and Fabric's have in common.

    It has ``_given_sizes``, data-parallel and tensor-parallel.
    """
    for name, member in vars(_ShardedRanks).items():
        if not name.startswith("__"):
            setattr(cls, name, member)
    return cls


class _ShardedRanks(WorkerProcess):
    """The ranks of sharded workers: their arrangement, their mesh, and the checkpoint that worker 0 writes."""

    _given_sizes: tuple[Size, Size]
    _mesh: DeviceMesh | None = None
    _device_mesh: DeviceMesh | None

    @property
    def worker_shape(self) -> tuple[int, ...]:
        """One worker's data-parallel and tensor-parallel sizes."""
        name = type(self).__name__
        return tuple(resolve_sizes(name, *self._given_sizes, nodes=self.num_nodes, devices=self.num_processes))

    @property
    def layout(self) -> WorkerLayout:
        """Which ranks make up which worker; known once Trainer or Fabric has this strategy."""
        return WorkerLayout(self.num_nodes * self.num_processes, math.prod(self.worker_shape))

    @property
    def _as_one(self) -> str:
        """The argument that makes all ranks one worker, for errors."""
        return f"data_parallel_size={self.layout.ranks // self.worker_shape[1]}"

    @property
    def is_sharded(self) -> bool:
        """Whether each rank of a worker has its own part of the parameters."""
        return True

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh of all ranks: "workers", "data_parallel", "tensor_parallel"; ``device_mesh`` is the worker's.

        Raises:
            RuntimeError: If the processes have not been initialized.
        """
        if self._mesh is None:
            raise RuntimeError(f"{type(self).__name__}.mesh: it is there when the processes have been initialized.")
        return self._mesh

    @property
    def _ranks_shares(self) -> dict[str, Any]:
        """Each data-parallel rank of each worker draws its own."""
        return sampler_arguments(self.mesh, self.layout, self.global_rank)

    def _check_interactive(self) -> None:
        """Leave it to Lightning: it has no ranks that are forked."""

    def _leave_inside(self) -> None:
        """Keep it, as the mesh: a checkpoint may be saved after the fit."""
        if self._inside is not None:
            self._inside.take_back()

    def _set_up_mesh(self) -> None:
        if self._mesh is None:
            timeout = self._timeout or DEFAULT_TIMEOUT
            self._mesh = make_mesh(self.root_device, self.layout, self.worker_shape, timeout)
            self._open_inside("gloo")
        self._device_mesh = inside(self._mesh)

    @contextmanager
    def _parallelizing(self) -> Iterator[None]:
        """Context in which a module is parallelized: a mesh that is made there is of this worker's ranks.

        FSDP2 makes one for a ``reshard_after_forward`` that is a number, and a module may for replicas of shards. Torch
        has all ranks of a job take part in each group of a mesh, in the same order, and those of other workers make
        groups of other ranks there: all would wait for each other.
        """
        meshes: Any = torch_meshes
        make = meshes.new_group
        own = {"use_local_synchronization": True, "timeout": self._timeout or DEFAULT_TIMEOUT}
        meshes.new_group = lambda *arguments, **keywords: make(*arguments, **{**keywords, **own})
        try:
            yield
        finally:
            meshes.new_group = make

    def _share_parts(self, module: nn.Module, trained: Collection[Tensor] = ()) -> None:
        """Give the ranks of each coordinate what the one in worker 0 has; let BatchNorm be synchronized inside."""
        group = self.mesh.get_group("data_parallel")
        warn_of_unreduced(type(self).__name__, module, group)
        average_by_sum(module, group)
        assert self._inside is not None
        self._inside.synchronize(module, group)  # the ranks of tensor parallelism draw the same data
        if self.layout.workers > 1:
            broadcast_parts(module, self.mesh.get_group("workers"), trained)

    def _write_shards(self, path: Path, state: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Write a distributed checkpoint as Lightning does, but of worker 0 alone.

        In one save with another worker's, equal names would count as replicas, and what is written would be partly the
        one's and partly the other's.
        """
        from torch.distributed import checkpoint  # noqa: PLC0415 - it takes its time

        assert self._inside is not None
        if self.layout.worker_of(self.global_rank) == 0:
            if self.global_rank == 0:
                if path.is_file():
                    path.unlink()
                path.mkdir(parents=True, exist_ok=True)
            dist.barrier(self._inside.group)
            checkpoint.save(  # type: ignore[attr-defined]
                state, checkpoint_id=path, process_group=self._inside.group
            )
        if self.global_rank == 0:
            torch.save(metadata, path / _METADATA)
