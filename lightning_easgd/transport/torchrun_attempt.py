"""The process group of ranks that torchrun has started again: with a store in which nothing is left of before."""

import atexit
import os
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

__all__ = ["set_up_group"]


def set_up_group(
    backend: str, timeout: timedelta, device: torch.device, environment: Mapping[str, str] = os.environ
) -> None:
    """Set up the default process group if this is a further attempt of torchrun's, and there is none.

    torchrun's store outlives the ranks (pytorch#135712). What they have written there, such as their addresses, those
    that are started again would take for one another's: of some that comes to a connection that is refused.

    Args:
        backend: As for :func:`torch.distributed.init_process_group`.
        timeout: Likewise.
        device: Of this rank.
        environment: What torchrun says.
    """
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    has_old_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or not has_old_store or dist.is_initialized():
        return
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore(f"attempt/{attempt}", store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    if "nccl" in backend:
        atexit.register(_leave)  # as Lightning does where it makes the group


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
