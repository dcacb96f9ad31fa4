"""Parameters of which each rank holds a part (``DTensor``, as FSDP2 and tensor parallelism make them): that part."""

import math
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["copies", "is_shard", "local", "place", "reshard", "sharded_like"]


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which this rank holds a part."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, in the same memory; of a plain tensor the tensor itself."""
    if not is_shard(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def copies(tensor: Tensor, ranks: int) -> int:
    """How many of the ranks of one worker hold the part of a tensor that this one holds; all of a plain tensor."""
    if not is_shard(tensor):
        return ranks
    whole: Any = tensor
    parts: int = math.prod(whole.device_mesh.size(n) for n, at in enumerate(whole.placements) if not at.is_replicate())
    return ranks // parts


def place(tensor: Tensor) -> list[int]:
    """Where in the whole the part of a tensor lies that this rank holds: ranks of one place hold the same part."""
    if not is_shard(tensor):
        return []
    whole: Any = tensor
    coordinates = zip(whole.device_mesh.get_coordinate(), whole.placements, strict=True)
    return [coordinate for coordinate, at in coordinates if not at.is_replicate()]


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A value of this rank's part of a tensor, as such a part; of a plain tensor the value itself."""
    if not is_shard(tensor):
        return value
    whole: Any = tensor.detach()
    shard: Tensor = type(whole).from_local(
        value, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return shard


def reshard(module: nn.Module) -> nn.Module:
    """Let FSDP2's modules hold shards, the optimizer's parameters; what is written to them is then what they compute.

    After a forward pass without a backward pass they may still hold whole parameters, made of the shards of before.

    Returns:
        The module.
    """
    for part in module.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(part).__mro__):
            part.reshard()  # type: ignore[operator]
    return module
