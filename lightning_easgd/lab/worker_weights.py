"""Each worker's own weights, from a checkpoint."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_easgd.strategies.worker_state import read_worker_state
from lightning_easgd.strategies.worker_state.keeper import KEY, named_tensors

__all__ = ["kept_workers", "loaded_workers"]


def kept_workers(checkpoint: Mapping[str, Any]) -> int:
    """Say of how many workers a checkpoint keeps the own weights, in it or beside it."""
    saved = checkpoint.get(KEY, {})
    size = math.prod(_shape(saved))
    if "workers" in saved:
        return len(saved["workers"]) // size
    return int(saved["world_size"]) // size if "generation" in saved else 0


def loaded_workers(path: Path, checkpoint: Mapping[str, Any], module: nn.Module) -> Iterator[tuple[int, bool]]:
    """Load the workers' own weights into a module, one worker after the other.

    Of sharded workers the ranks' parts are put together. Where both FSDP2 and tensor parallelism have cut, what a rank
    keeps does not say how, and a warning says that.

    Args:
        path: Where the checkpoint was read.
        checkpoint: What it holds.
        module: For its weights; what no worker has of its own is as at the center.

    Yields:
        The worker, and whether its weights are in the module now; they are not if they are missing or cannot be read.
    """
    shape = _shape(checkpoint.get(KEY, {}))
    cut_twice = sum(size > 1 for size in shape) > 1
    if cut_twice:
        rank_zero_warn(
            f"{path}: the workers' own weights are cut by FSDP2 and by tensor parallelism"
            f" ({' x '.join(map(str, shape))} devices), and cannot be put together here; a run of such workers that"
            " goes on from the checkpoint has them."
        )
    is_sharded = len(shape) > 1
    for worker in range(kept_workers(checkpoint)):
        first = worker * math.prod(shape)
        # With DDP inside, the ranks of a worker have the same.
        ranks = range(first, first + (math.prod(shape) if is_sharded else 1))
        states = [] if cut_twice else [read_worker_state(checkpoint[KEY], str(path), rank) for rank in ranks]
        parts = [state["tensors"] for state in states if state is not None]
        found = len(parts) == len(ranks)
        module.load_state_dict(checkpoint["state_dict"])
        if found:
            with torch.no_grad():
                for name, tensor in named_tensors(module).items():
                    if name in parts[0]:
                        tensor.copy_(_whole([part[name] for part in parts], tensor.shape))
        yield worker, found


def _shape(saved: Mapping[str, Any]) -> Sequence[int]:
    """How the ranks of a worker were arranged: their number with DDP inside, two sizes where they are sharded."""
    shape: Sequence[int] = saved.get("worker_shape", [1])
    return shape


def _whole(parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """A tensor of which each rank of a worker has a part, cut in one dimension; a plain one all have whole."""
    if parts[0].shape == shape:
        return parts[0]
    held = [part for part in parts if part.numel()]  # of few rows some ranks have none
    (dimension,) = (number for number, size in enumerate(shape) if held[0].shape[number] != size)
    return torch.cat(held, dimension)
