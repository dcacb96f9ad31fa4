"""Each worker's own weights, from a checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_easgd.strategies.worker_state import read_worker_state
from lightning_easgd.strategies.worker_state.keeper import KEY, named_tensors

__all__ = ["kept_workers", "loaded_workers"]


def kept_workers(checkpoint: Mapping[str, Any]) -> int:
    """Say of how many workers a checkpoint keeps the own weights, in it or beside it."""
    saved = checkpoint.get(KEY, {})
    if "workers" in saved:
        return len(saved["workers"])
    return int(saved["world_size"]) if "generation" in saved else 0


def loaded_workers(path: Path, checkpoint: Mapping[str, Any], module: nn.Module) -> Iterator[tuple[int, bool]]:
    """Load the workers' own weights into a module, one worker after the other.

    Args:
        path: Where the checkpoint was read.
        checkpoint: What it holds.
        module: For its weights; what no worker has of its own is as at the center.

    Yields:
        The worker, and whether its weights are in the module now; they are not if they are missing or cannot be read.
    """
    for worker in range(kept_workers(checkpoint)):
        state = read_worker_state(checkpoint[KEY], str(path), worker)
        module.load_state_dict(checkpoint["state_dict"])
        if state is not None:
            with torch.no_grad():
                for name, tensor in named_tensors(module).items():
                    if name in state["tensors"]:
                        tensor.copy_(state["tensors"][name])
        yield worker, state is not None
