"""The process group of ranks that torchrun may have started again: with a store in which nothing is left of before."""

import atexit
import os
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

__all__ = ["set_up_group"]

_PAUSE = 2e-3  # seconds


def set_up_group(
    backend: str, timeout: timedelta, device: torch.device, environment: Mapping[str, str] = os.environ
) -> None:
    """Set up the default process group on torchrun's store, if that is to be used, and there is none.

    torchrun's store outlives the ranks (pytorch#135712). What they have written there, such as their addresses, those
    that are started again would take for one another's: of some that comes to a connection that is refused.

    Args:
        backend: As for :func:`torch.distributed.init_process_group`.
        timeout: Likewise.
        device: Of this rank.
        environment: What torchrun says.

    Raises:
        TimeoutError: If the ranks do not find each other in time.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore(_name_of_attempt(store, rank, size, timeout), store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if device.type != "cpu" and "nccl" in backend else None,
    )
    if "nccl" in backend:
        atexit.register(_leave)  # as Lightning does where it makes the group


def _name_of_attempt(store: Store, rank: int, size: int, timeout: timedelta) -> str:
    """A name that the ranks which are there now have in common, and none of those before had.

    The ranks count their attempts differently where they are started by several agents. So each asks rank 0 by a name
    of its own, which rank 0 answers as often as it finds another one there.
    """
    own = uuid.uuid4().hex
    if rank != 0:
        store.set(f"easgd/asks/{rank}", own)
        name = store.get(f"easgd/answer/{own}").decode()
        store.set(f"easgd/knows/{name}/{rank}", "")
        return name
    deadline = time.monotonic() + timeout.total_seconds()
    answered = dict.fromkeys(range(1, size), b"")
    while not all(store.check([f"easgd/knows/{own}/{other}"]) for other in answered):
        for other, before in answered.items():
            if store.check([f"easgd/asks/{other}"]) and (asking := store.get(f"easgd/asks/{other}")) != before:
                store.set(f"easgd/answer/{asking.decode()}", own)
                answered[other] = asking
        if time.monotonic() > deadline:
            missing = [other for other in answered if not store.check([f"easgd/knows/{own}/{other}"])]
            raise TimeoutError(f"ranks {missing} of torchrun's have not come within {timeout}")
        time.sleep(_PAUSE)
    return own


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
