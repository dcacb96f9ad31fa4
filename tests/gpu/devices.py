"""Where the GPU tests run: on ranks that share the first GPU, on one GPU for each rank, or in a dry run on the CPU."""

import multiprocessing
import os
from functools import cache
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from toys import quiet_trainer

from lightning_easgd import EASGDStrategy


def on_gpu() -> bool:
    """Whether this is a run on a GPU, not a dry run."""
    return os.environ["EASGD_GPU_TESTS"] == "cuda"


@cache
def count_cuda_devices() -> int:
    """Counted in a child: this process forks ranks, and must not touch CUDA."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(torch.cuda.device_count()))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # it died of whatever CUDA has
        return 0
    finally:
        child.join()


def device() -> torch.device:
    return torch.device("cuda", 0) if on_gpu() else torch.device("cpu")


def shared(cls=EASGDStrategy, *, ranks: int = 2, where: torch.device | None = None, **arguments: Any):
    """A strategy whose ranks all use one device; NCCL refuses to share, gloo does not."""
    return cls(parallel_devices=[where or device()] * ranks, process_group_backend="gloo", **arguments)


def own_devices(cls=EASGDStrategy, *, ranks: int = 1, **arguments: Any):
    """A strategy whose ranks have a GPU each, over NCCL."""
    return cls(parallel_devices=[torch.device("cuda", rank) for rank in range(ranks)], **arguments)


def fit(module: Any, strategy: Any, **trainer: Any) -> Any:
    """Fit on the devices that the strategy names, in a process that :func:`ranks.run_ranks` made."""
    accelerator = {"accelerator": "auto", "devices": "auto"}
    quiet_trainer(strategy=strategy, **accelerator, **trainer).fit(module)
    return module


def in_precision(name: str, where: torch.device | None = None, **scaler: Any) -> dict[str, Any]:
    """The Trainer's arguments for a precision; Lightning would replace "16-mixed" on the CPU by "bf16-mixed"."""
    if name != "16-mixed":
        return {"precision": name}
    kind = (where or device()).type
    return {"plugins": [MixedPrecision(name, kind, scaler=torch.amp.GradScaler(kind, **scaler))]}
