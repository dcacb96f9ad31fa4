"""The arguments that every worker's process takes, and what is wrong with them before any process starts."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Literal

import torch

__all__ = [
    "DEFAULT_TIMEOUT",
    "DevicesPerWorker",
    "StartMethod",
    "check_devices_per_worker",
    "check_parallel_devices",
    "check_ranks",
    "check_timeout",
]

DevicesPerWorker = int | Literal["node"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""Of ``torch.distributed`` and so of DDPStrategy."""


def check_devices_per_worker(strategy: str, devices: object) -> None:
    """Refuse what is no number of ranks; whether it divides theirs is known later."""
    if devices == "node":
        return
    if not isinstance(devices, int) or isinstance(devices, bool):
        raise TypeError(
            f"{strategy}(devices_per_worker={devices!r}): give the number of ranks of a worker, or 'node' for those of"
            " a node."
        )
    if devices < 1:
        raise ValueError(f"{strategy}(devices_per_worker={devices}): a worker has at least 1 rank.")


def check_timeout(strategy: str, timeout: object) -> None:
    """Refuse what is no time to wait for others."""
    if not isinstance(timeout, timedelta):
        seconds = timeout if isinstance(timeout, int | float) else 60
        raise TypeError(f"{strategy}(timeout={timeout!r}): give a datetime.timedelta, such as timedelta({seconds=}).")
    if timeout <= timedelta(0):
        raise ValueError(f"{strategy}(timeout={timeout}): the time to wait for the slowest rank is positive.")


def check_parallel_devices(strategy: str, devices: Iterable[object]) -> None:
    """Refuse devices on which this package has not been shown to work."""
    for device in devices:
        # A third party's accelerator may have any objects for devices.
        if isinstance(device, torch.device) and device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"{strategy}(parallel_devices=[{device}]): workers are CPUs or CUDA devices (ROCm's too); elsewhere the"
                " order of the copies beside the gradient has not been shown to hold. Use Trainer(accelerator='cpu')."
            )


def check_ranks(strategy: str, nodes: int, devices: int, started: int) -> None:
    """Refuse another number of ranks than the rates, the workers and Lightning's shares of the data are reckoned with.

    Lightning compares them under torchrun and SLURM only.

    Args:
        strategy: The strategy's name.
        nodes: As the user has them.
        devices: Of each node.
        started: How many ranks the cluster environment has.
    """
    if nodes * devices != started:
        raise ValueError(
            f"{strategy}: the cluster environment has started {started} rank{'s' if started > 1 else ''}, and devices="
            f"{devices} and num_nodes={nodes} make {nodes * devices}; give numbers whose product is {started}."
        )
