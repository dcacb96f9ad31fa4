"""Run a function as the ranks of one job: forked processes, a hard timeout, and each rank's result."""

import faulthandler
import fcntl
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import random
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import lightning.fabric.utilities.registry as lightning_registry
import torch
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks
from huge_pages import use_huge_pages
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_easgd.strategies.worker_state import random_state, set_random_state

_CONTEXT = multiprocessing.get_context("fork")
_PORTS = random.SystemRandom()  # tests seed the other one
_HELD: list[IO[str]] = []
_TELL = signal.SIGRTMAX  # a rank that hangs tells where


@dataclass
class Outcome:
    """How one rank ended: its exit code, and what its function returned or raised."""

    exitcode: int
    value: Any = None
    error: str | None = None


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 90) -> list[Any]:
    """Return what ``function(*arguments)`` returns on each rank; fail if one of them fails."""
    outcomes = end_ranks(function, ranks, *arguments, timeout=timeout)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exitcode == 0, f"rank {rank} ended with {outcome.exitcode}:\n{outcome.error}"
    return [outcome.value for outcome in outcomes]


def end_ranks(
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    timeout: float = 60,
    interfere: Callable[[list[int]], None] | None = None,
) -> list[Outcome]:
    """Run ``function(*arguments)`` on each rank and return how each ended; all must end within the timeout.

    ``interfere`` is called with the process ids while they run.
    """
    assert not torch.distributed.is_initialized(), "forked ranks would take this process's group for theirs; fit in one"
    warm_up()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        processes = [
            _CONTEXT.Process(target=_rank, args=(rank, ranks, port, folder, function, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            if interfere is not None:
                interfere([process.pid for process in processes])
            deadline = time.monotonic() + timeout
            for process in processes:
                process.join(max(0.1, deadline - time.monotonic()))
            hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
            assert not hanging, (
                f"ranks {hanging} hang: still running after {timeout} s\n{_errors(folder)}\n"
                + "\n".join(f"rank {rank} is here:\n{_stacks(folder, rank, processes[rank].pid)}" for rank in hanging)
            )
        finally:
            for process in processes:
                process.kill()
                process.join()
        outcomes = []
        for rank, process in enumerate(processes):
            outcome = Outcome(process.exitcode)
            result = Path(folder, str(rank))
            if result.exists():
                outcome.value, outcome.error = pickle.loads(result.read_bytes())
            outcomes.append(outcome)
        return outcomes


@functools.cache
def warm_up() -> None:
    """Do once, in the parent, what each rank of Lightning's would do at first: half of a short rank's processor time.

    It imports and caches (also which packages are installed), and leaves the generators as they were.
    """
    if torch.cuda.is_available():  # a fit would start CUDA, which no forked rank could use then
        return
    lightning_registry.entry_points = functools.cache(lightning_registry.entry_points)

    class Logs(BoringModel):  # the first log looks through the metadata of torch
        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("loss", self.loss(self.layer(batch)), sync_dist=True)

    generators = random_state(torch.device("cpu"))
    logging.disable()
    with warnings.catch_warnings(action="ignore"):
        Trainer(
            accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(Logs())  # fmt: skip
    logging.disable(logging.NOTSET)
    set_random_state(generators, torch.device("cpu"))
    gc.collect()
    use_huge_pages()


def _errors(folder: str) -> str:
    """What the ranks that have ended raised."""
    results = [pickle.loads(path.read_bytes()) for path in Path(folder).iterdir() if not path.suffix]
    return "\n".join(error for _, error in results if error)


def _stacks(folder: str, rank: int, pid: int | None) -> str:
    """Where the threads of a rank are, and whether its function has returned."""
    assert pid is not None
    os.kill(pid, _TELL)
    time.sleep(1)
    stacks = Path(folder, f"{rank}.stacks")
    told = stacks.read_text() if stacks.exists() else ""
    return f"(its function has returned)\n{told}" if Path(folder, str(rank)).exists() else told


def free_port() -> int:
    """A port that is free, and stays so until a rank listens on it.

    The kernel gives ports above 32768 to connections of whatever runs beside; other processes of tests, of this session
    or another, look at the same time, so each holds the lock of a file for the ports that it was given last.
    """
    folder = Path(tempfile.gettempdir(), f"easgd-test-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    for _ in range(1000):
        port = _PORTS.randrange(10048, 32448)
        lock = (folder / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as listener:
                listener.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _HELD.append(lock)
        if len(_HELD) > 16:
            _HELD.pop(0).close()
        return port
    raise OSError("no free port")


def _rank(
    rank: int, ranks: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    gc.freeze()  # else a collection writes to, and so copies, all memory that this process shares with its parent
    # What torchrun sets, so that a Trainer in the function becomes this rank.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    torch.set_num_threads(1)
    faulthandler.register(_TELL, os.open(Path(folder, f"{rank}.stacks"), os.O_CREAT | os.O_WRONLY))
    value, error, code = None, None, 0
    try:
        value = function(*arguments)
    except SystemExit as exit_:
        code = exit_.code or 0
        error = repr(exit_)
    except BaseException:
        error, code = traceback.format_exc(), 1
    target = Path(folder, str(rank))
    target.with_suffix(".tmp").write_bytes(pickle.dumps((value, error)))
    target.with_suffix(".tmp").rename(target)
    raise SystemExit(code)
