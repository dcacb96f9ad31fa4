"""One run of a comparison: a process tree with a hard time limit, and a directory that is whole or not there.

A run works in `unfinished/NAME`. When it has ended well the directory is renamed to `runs/NAME`, when it has failed to
`failed/NAME`: whatever interrupts a comparison, what lies in `runs` is complete.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple

from lightning_easgd.lab.command_errors import UsageError
from lightning_easgd.lab.compare.grid import COMMAND, Cell
from lightning_easgd.lab.recorders import CURVE_FILE

__all__ = ["CELL_FILE", "FAILED", "OUTPUT_FILE", "RUNS", "check_same_comparison", "is_finished", "only_one", "run"]

RUNS, FAILED = "runs", "failed"
_UNFINISHED = "unfinished"
CELL_FILE = "cell.json"
OUTPUT_FILE = "output.txt"
_LOCK_FILE = ".lock"
# What every run of a comparison has in common, whatever the experiment says.
_RECORDING = ("callbacks=compare", "logger=csv", "on_divergence=report", "report=false", "plot=false",
              "trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false",
              "trainer.limit_val_batches=1")  # fmt: skip
_SECONDS_TO_END = 5.0


class Ending(NamedTuple):
    """What went wrong, None if nothing did, and the wall-clock seconds of the process tree, start-up included."""

    failure: str | None
    seconds: float


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[IO[str]]:
    """Context in which no other comparison, and no run that one has left behind, works in a directory.

    Yields:
        The locked file. A run inherits it, so that the lock lasts as long as the run.

    Raises:
        UsageError: If something is at work there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{COMMAND}(directory={directory}): another comparison, or a run that one has left behind, is at work"
                " there; wait for it or choose another directory"
            ) from error
        yield lock


def is_finished(directory: Path, cell: Cell) -> bool:
    """Say whether a cell has been run.

    Raises:
        UsageError: If it has been run with other settings.
    """
    record = directory / RUNS / cell.name / CELL_FILE
    if not record.exists():
        return False
    earlier = json.loads(record.read_text(encoding="utf-8"))["overrides"]
    different = sorted(set(earlier) ^ set(cell.overrides))
    if different:
        raise UsageError(
            f"{COMMAND}(directory={directory}): {cell.name} has been run there with other settings"
            f" ({', '.join(different)}); choose another directory"
        )
    return True


def check_same_comparison(directory: Path, labels: Collection[str]) -> None:
    """Refuse a directory with runs of methods that a comparison does not have: they would leave its tables.

    Raises:
        UsageError: If there are some.
    """
    records = (directory / RUNS).glob(f"*/{CELL_FILE}")
    there = {json.loads(record.read_text(encoding="utf-8"))["label"] for record in records}
    if others := sorted(there - set(labels)):
        raise UsageError(
            f"{COMMAND}(directory={directory}): it holds runs of another comparison ({', '.join(others)}); choose"
            " another directory"
        )


def run(directory: Path, cell: Cell, timeout: float, lock: IO[str]) -> Ending:
    """Run a cell for `timeout` seconds at the most; afterwards none of its processes is left."""
    work = directory / _UNFINISHED / cell.name
    for old in (work, directory / FAILED / cell.name):
        shutil.rmtree(old, ignore_errors=True)
    work.mkdir(parents=True)
    # Overrides later in the line win; a group may be chosen once only.
    places = (f"paths.run={_quoted(work)}", f"hydra.run.dir={_quoted(work)}")
    command = [sys.executable, "-m", "lightning_easgd.lab.train", *cell.overrides, *_RECORDING, *places]
    started = time.monotonic()
    failure = _supervise(command, work / OUTPUT_FILE, timeout, lock)
    seconds = time.monotonic() - started
    if failure is None and not (work / CURVE_FILE).exists():
        failure = f"it ended well but wrote no {CURVE_FILE}"
    record: dict[str, Any] = asdict(cell) | {"seconds": seconds}
    (work / CELL_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    end = directory / (RUNS if failure is None else FAILED) / cell.name
    end.parent.mkdir(exist_ok=True)
    work.rename(end)
    with contextlib.suppress(OSError):  # not empty after an interruption
        work.parent.rmdir()
    return Ending(failure, seconds)


def _supervise(command: list[str], output: Path, timeout: float, lock: IO[str]) -> str | None:
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # more threads in each worker only fight over the cores
    environment.pop("HYDRA_FULL_ERROR", None)  # set around this command; a run would answer errors with a traceback
    with output.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, pass_fds=(lock.fileno(),),
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return f"killed: it was still running after {timeout:g} s"
        finally:
            _end(process)
    if code == 0:
        return None
    return f"{_last_line(output)} (exit code {code})"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the whole process group: first with a request, where something is left after it by force."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _last_line(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "no output")


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
