"""Where the GPU tests run: ranks share the first GPU over gloo or NCCL, in a dry run the CPU over gloo."""

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
    """A strategy whose ranks all use one device, over gloo."""
    return _on([where or device()] * ranks, cls, process_group_backend="gloo", **arguments)


def over_nccl(cls=EASGDStrategy, *, ranks: int = 1, **arguments: Any):
    """A strategy over NCCL, made in a rank's process: a GPU for each rank, or several ranks on one if there are fewer.

    NCCL refuses two ranks of one host on one GPU, so each is told that it is a host of its own; sockets join them.
    """
    devices = count_cuda_devices()
    if devices < ranks:
        os.environ |= {
            "NCCL_HOSTID": f"easgd-test-{os.environ['RANK']}",
            "NCCL_NET": "Socket",
            "NCCL_IB_DISABLE": "1",
            "NCCL_SOCKET_IFNAME": "lo",
        }
    return _on([torch.device("cuda", rank % devices) for rank in range(ranks)], cls, **arguments)


def _on(devices: list[torch.device], cls: Any, **arguments: Any):
    strategy = cls(**arguments)
    strategy.parallel_devices = devices  # no argument of EASGDModelParallelStrategy's
    return strategy


def fit(module: Any, strategy: Any, ckpt_path: Any = None, **trainer: Any) -> Any:
    """Fit on the devices that the strategy names, in a process that :func:`ranks.run_ranks` made."""
    accelerator = {"accelerator": "auto", "devices": "auto"}
    quiet_trainer(strategy=strategy, **accelerator, **trainer).fit(module, ckpt_path=ckpt_path)
    return module


def in_precision(name: str, where: torch.device | None = None, **scaler: Any) -> dict[str, Any]:
    """The Trainer's arguments for a precision; Lightning would replace "16-mixed" on the CPU by "bf16-mixed"."""
    if name != "16-mixed":
        return {"precision": name}
    kind = (where or device()).type
    return {"plugins": [MixedPrecision(name, kind, scaler=torch.amp.GradScaler(kind, **scaler))]}
