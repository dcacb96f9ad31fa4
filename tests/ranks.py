"""Run a function as the ranks of one job: forked processes, a hard timeout, and each rank's result."""

import ctypes
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
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import FunctionType
from typing import IO, Any

import lightning.fabric.utilities.registry as lightning_registry
import torch
import torch.distributed.algorithms.ddp_comm_hooks.default_hooks
from huge_pages import use_huge_pages
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_easgd.strategies.worker_state import random_state, set_random_state

_PR_SET_PDEATHSIG = 1  # of Linux
_CONTEXT = multiprocessing.get_context("fork")
_PORTS = random.SystemRandom()  # tests seed the other one
_HELD: list[IO[str]] = []


@dataclass
class Outcome:
    """How one rank ended: its exit code, and what its function returned or raised."""

    exitcode: int
    value: Any = None
    error: str | None = None


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 60) -> list[Any]:
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
    _warm_up()
    given = kept.packed(function, arguments) if interfere is None else None
    job = kept.take(ranks) if given is not None else None
    if job is None:
        job = Ranks(ranks, function, arguments, stay=given is not None)
    else:
        job.go_on(given)
    try:
        if interfere is not None:
            interfere([process.pid for process in job.processes])
        outcomes = job.outcomes(time.monotonic() + timeout)
    except BaseException:
        job.kill()
        raise
    if job.stay:
        kept.keep(job)
    return outcomes


class Kept:
    """Ranks that have run what a test gave them, and run what the file's next test gives them.

    A rank that is forked copies thousands of pages before it has made a step, which takes as long as a short training.
    Of what has changed in the tests' own process since, ranks that are there already hear what :meth:`Ranks.go_on`
    tells: a test that changes more, as with `monkeypatch`, has new ones.
    """

    def __init__(self) -> None:
        self._file: str | None = None
        self._keeps = False
        self._calls = 0
        self._jobs: dict[tuple[int, int], Ranks] = {}

    def begin(self, file: str | None, keeps: bool) -> None:
        """A test of this file begins, whose ranks may be kept or may not."""
        if file != self._file:
            for job in self._jobs.values():
                job.end()
            self._jobs.clear()
        self._file, self._keeps, self._calls = file, keeps, 0

    def packed(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes | None:
        """What kept ranks can be given; None for what can only be inherited, or if none are kept."""
        if self._keeps and not torch.cuda.is_available():  # a rank that stays would keep its part of the GPU
            import cloudpickle  # a machine with a GPU may lack it

            with suppress(Exception):  # of anything that is pickled
                return bytes(cloudpickle.dumps((function, arguments)))
        return None

    def take(self, ranks: int) -> "Ranks | None":
        """So many ranks, if there are; for each call of a test others, as the second is mostly to go on elsewhere."""
        self._calls += 1
        job = self._jobs.pop((self._calls, ranks), None)
        if job is not None and not _is_as_in(job.package):
            job = job.end()
        return job

    def keep(self, job: "Ranks") -> None:
        self._jobs[self._calls, len(job.processes)] = job


kept = Kept()


class Ranks:
    """The forked processes of one job, or of several, one after the other.

    Attributes:
        stay: Whether all of them wait for a further one.
        package: What this package was when they were forked.
    """

    def __init__(self, ranks: int, function: Callable[..., Any], arguments: tuple[Any, ...], *, stay: bool) -> None:
        self.stay = stay
        self.package = _package()
        self.processes: list[Any] = []
        self._pipes: list[Any] = []
        port = free_port()
        for rank in range(ranks):
            pipe, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_rank, args=(rank, ranks, port, theirs, function, arguments, stay))
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(pipe)

    def go_on(self, given: bytes) -> None:
        """Run a further function, which with its arguments is given as bytes."""
        state = os.environ.copy(), os.getcwd(), warnings.filters, random_state(torch.device("cpu"))
        message = pickle.dumps((free_port(), given, state))
        for pipe in self._pipes:
            with suppress(OSError):  # it has ended
                pipe.send_bytes(message)

    def outcomes(self, deadline: float) -> list[Outcome]:
        """How each has ended, or how its function has, if all stay."""
        outcomes = [Outcome(0) for _ in self.processes]
        running = dict(zip(self.processes, zip(self._pipes, outcomes, strict=True), strict=True))
        while running and time.monotonic() < deadline:
            wait([each for process, (pipe, _) in running.items() for each in (pipe, process.sentinel)], 0.1)
            for process, (pipe, outcome) in tuple(running.items()):
                if not pipe.poll() and process.is_alive():
                    continue
                del running[process]
                stays = False
                with suppress(EOFError, OSError):  # it has ended without a word
                    value, outcome.error, stays = pickle.loads(pipe.recv_bytes())
                    outcome.value = pickle.loads(value)
                self.stay &= stays
        self._not_hanging(outcomes, [process in running for process in self.processes])
        if not self.stay:
            self.end(deadline, outcomes)
            for outcome, process in zip(outcomes, self.processes, strict=True):
                outcome.exitcode = process.exitcode
        return outcomes

    def end(self, deadline: float | None = None, outcomes: Sequence[Outcome] = ()) -> None:
        """Let those that wait end, as they would have without."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send_bytes(b"")
        for process in self.processes:
            process.join(10 if deadline is None else max(0.1, deadline - time.monotonic()))
        hang = [process.is_alive() for process in self.processes]
        self.kill()
        self._not_hanging(outcomes, hang)

    def _not_hanging(self, outcomes: Sequence[Outcome], hang: Sequence[bool]) -> None:
        errors = "\n".join(outcome.error for outcome in outcomes if outcome.error)
        hanging = [rank for rank, hangs in enumerate(hang) if hangs]
        assert not hanging, f"ranks {hanging} hang: still running at the timeout\n{errors}"

    def kill(self) -> None:
        for process, pipe in zip(self.processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


@functools.cache
def _warm_up() -> None:
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
    rank: int,
    ranks: int,
    port: int,
    pipe: Any,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    stay: bool,
) -> None:
    gc.freeze()  # else a collection writes to, and so copies, all memory that this process shares with its parent
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    before, package = _settings(), _package()
    while True:
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
        value, error, code = None, None, 0
        try:
            value = function(*arguments)
        except SystemExit as exit_:
            code = exit_.code or 0
            error = repr(exit_)
        except BaseException:
            error, code = traceback.format_exc(), 1
        value = pickle.dumps(value)
        del function, arguments
        stays = stay and error is None
        if stays:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            gc.collect()
            stays = _settings() == before and _is_as_in(package)
        pipe.send_bytes(pickle.dumps((value, error, stays)))
        job = pipe.recv_bytes() if stays else b""
        if not job:
            raise SystemExit(code)
        port, given, (environment, folder, filters, generators) = pickle.loads(job)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        warnings.filters[:] = filters
        warnings._filters_mutated()
        set_random_state(generators, torch.device("cpu"))
        function, arguments = pickle.loads(given)
        if isinstance(function, FunctionType):  # its classes' bodies name more than is seen to be needed
            for name, value in vars(sys.modules[function.__module__]).items():
                function.__globals__.setdefault(name, value)


def _settings() -> tuple[object, ...]:
    """What a function may leave behind, so that its process must end."""
    return (
        threading.active_count(),
        multiprocessing.active_children(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_anomaly_enabled(),
        torch.is_grad_enabled(),
    )


def _package() -> dict[tuple[str, ...], object]:
    """What the package's modules and classes hold, but for numbers, which only count."""
    held: dict[tuple[str, ...], object] = {}
    for name, module in tuple(sys.modules.items()):
        if name.partition(".")[0] == "lightning_easgd":
            for key, value in tuple(vars(module).items()):
                held[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    held |= {(name, key, attribute): each for attribute, each in vars(value).items()}
    return {place: value for place, value in held.items() if not isinstance(value, int)}


def _is_as_in(package: dict[tuple[str, ...], object]) -> bool:
    now = _package()
    return all(now.get(place) is value for place, value in package.items())
