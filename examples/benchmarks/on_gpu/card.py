"""Which card this is, and what runs on it; asked for in a rank, as the process that forks ranks must not start CUDA."""

import argparse
from pathlib import Path
from typing import Any

import torch
from harness.ranks import Place, Send

from on_gpu.training import Setting

__all__ = ["describe"]


def describe(rank: int, place: Place, send: Send, setting: Setting, options: argparse.Namespace) -> None:
    """Send what is known of the first GPU and its software; an empty dictionary if there is no GPU."""
    send(_card() if torch.cuda.is_available() else {})


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": torch.cuda.get_device_name(0),
        "count": torch.cuda.device_count(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "memory_GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl(),
        "driver": _driver(),
    }


def _nccl() -> str | None:
    try:
        version: Any = torch.cuda.nccl.version()
    except (AttributeError, RuntimeError):  # a build without it
        return None
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _driver() -> str | None:
    """The kernel's module, also where there is no nvidia-smi."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
