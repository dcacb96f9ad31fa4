"""What the scripts of the clients share: each is one rank's run of a library's own example, and writes what came out.

A script is started as ``script.py STRATEGY FOLDER``; Lightning starts it again for the second rank.
"""

import hashlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lightning_easgd  # noqa: F401  # registers the names

STEPS = 60
warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def arguments() -> tuple[str, Path]:
    """The strategy, and the folder for what comes out."""
    strategy, folder = sys.argv[1:3]
    return strategy, Path(folder)


def trainer_arguments(strategy: str) -> dict[str, Any]:
    """Arguments of the Trainer, the same for every library."""
    return {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": strategy,
        "max_steps": STEPS,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def digest(module: nn.Module) -> str:
    """One text for all that a model holds, bit for bit."""
    state = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            state.update(name.encode())
            state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def report(folder: Path, before: float, after: float, module: nn.Module, save: Callable[[Path], None]) -> None:
    """Write this rank's losses and digest, and on rank 0 whether the library's own way of saving works."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    saved = ""
    if rank == 0:
        try:
            save(folder)
        except Exception as error:  # the table says so
            saved = f"{type(error).__name__}: {error}"
    result = {
        "before": before,
        "after": after,
        "digest": digest(module),
        "saved": saved,
        "finite": math.isfinite(after),
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(result))
