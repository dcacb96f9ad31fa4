"""Runs a function on the ranks of one job, each a forked process in which a Lightning Trainer becomes that rank."""

import logging
import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run_ranks"]


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float) -> Any:
    """Call ``function(ranks, *arguments)`` on each rank, and return what it returns on rank 0.

    Args:
        function: Has to train with a Trainer, which makes the process group.
        ranks: How many.
        *arguments: For the function.
        timeout: Seconds until the ranks are given up.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_be, args=(rank, ranks, port, results, function, arguments)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        value = results.get(timeout=timeout)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return value


def _be(
    rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # What torchrun sets.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmark",
    }
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    value = function(ranks, *arguments)
    if rank == 0:
        results.put(value)
    dist.barrier()
