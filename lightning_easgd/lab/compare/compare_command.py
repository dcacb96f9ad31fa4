"""`easgd-compare experiment=...`: runs a grid of training methods with equal budgets, and draws what came out."""

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_easgd.lab.command_errors import UsageError, before_training, run_command, usage_errors
from lightning_easgd.lab.compare import runs
from lightning_easgd.lab.compare.grid import COMMAND, Cell, cells, first_of_each
from lightning_easgd.lab.configuration import SEARCH_PATH
from lightning_easgd.lab.data.images import SplitDataModule
from lightning_easgd.lab.demo_extra import MissingExtraError, demo_extra
from lightning_easgd.lab.run_directory import saved_run
from lightning_easgd.lab.train import machine

__all__ = ["main", "planned"]

_GRID_FILE = "grid.yaml"
_MACHINE_FILE = "machine.txt"
_OWN_KEYS = ("directory", "fast_dev_run", "grid", "hydra")
_OF_THE_CELLS = ("callbacks", "logger", "method", "seed", "strategy")
_TRIAL_DIRECTORY = "fast_dev_run"


def main() -> None:
    """Run the command."""
    run_command(COMMAND, _hydra_main)


@hydra.main(config_path=SEARCH_PATH, config_name="compare", version_base="1.3")
def _hydra_main(config: DictConfig) -> None:
    with _ending_at_sigterm():
        _compare(config)


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """Context in which SIGTERM ends the run under way, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _compare(config: DictConfig) -> None:
    _give_jobs_directories_of_their_own(config)
    with usage_errors(COMMAND):
        if not isinstance(config.fast_dev_run, bool):
            raise UsageError(f"{COMMAND}(fast_dev_run={config.fast_dev_run}): give true or false")
        failures = compare(config, planned(config, HydraConfig.get().overrides.task))
    if failures:
        for name, failure in failures.items():
            print(f"  failed: {name}: {failure}")
        sys.exit(f"{COMMAND}: {len(failures)} run(s) failed; their output lies in {_directory(config) / runs.FAILED}")


def _give_jobs_directories_of_their_own(config: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and "directory" not in map(_key, hydra_config.overrides.task):
        config.directory = hydra_config.runtime.output_dir


def planned(config: DictConfig, overrides: Sequence[str]) -> list[Cell]:
    """List the runs of a comparison; with `fast_dev_run` one of each method, with at most two workers.

    Of the command line's overrides those that are not the comparison's own go to every run.

    Raises:
        UsageError: If an override sets what the grid sets.
    """
    passed_on = [override for override in overrides if _key(override) not in _OWN_KEYS]
    for override in passed_on:
        if override.split("=")[0] in _OF_THE_CELLS:
            raise UsageError(
                f"{COMMAND}({override}): every run has its own; see grid.methods, grid.seeds and grid.only"
            )
    every = cells(config.grid, passed_on)
    if not config.fast_dev_run:
        return every
    small = OmegaConf.merge(config.grid, {"workers": [min(2, int(config.grid.workers[0]))]})
    assert isinstance(small, DictConfig)
    return first_of_each(cells(small, [*passed_on, "trainer.fast_dev_run=true"]))


def compare(config: DictConfig, every: Sequence[Cell]) -> dict[str, str]:
    """Run the cells that have not been run, write tables and figures of all, and return what went wrong by run."""
    with demo_extra():  # before anything runs; not at the top, as pandas takes half a second
        from lightning_easgd.lab.compare.compare_figures import draw  # noqa: PLC0415
        from lightning_easgd.lab.compare.records import collect  # noqa: PLC0415
        from lightning_easgd.lab.compare.tables import write_tables  # noqa: PLC0415
    directory = _directory(config)
    if saved_run(directory / "any") is not None:
        raise UsageError(f"{COMMAND}(directory={directory}): this directory holds a run; choose another one")
    with before_training(COMMAND):  # what each of the runs would say
        data = instantiate(config.data)
        if isinstance(data, SplitDataModule):
            data.check_files()
    with runs.only_one(directory) as lock:
        runs.check_same_comparison(directory, [str(label) for label in config.grid.methods])
        left = [cell for cell in every if not runs.is_finished(directory, cell)]
        (directory / _GRID_FILE).write_text(OmegaConf.to_yaml(config.grid, resolve=True), encoding="utf-8")
        (directory / _MACHINE_FILE).write_text("\n".join(machine()) + "\n", encoding="utf-8")
        failures = {}
        progress = _Progress(len(every), len(every) - len(left))
        for cell in left:
            progress.begin(cell.name)
            ending = runs.run(directory, cell, config.grid.timeout, lock)
            if ending.failure is not None:
                failures[cell.name] = ending.failure
            progress.end(ending.failure or f"{ending.seconds:.0f} s")
        grid = config.grid
        collect(directory, list(grid.methods), grid.target_errors, grid.baseline, failures)
        print(write_tables(directory))
        try:
            files: list[Any] = draw(directory)
        except MissingExtraError as error:
            files = [f"no figures: {error}"]
        for path in files:
            print(f"  {path}")
    return failures


def _directory(config: DictConfig) -> Path:
    directory = Path(config.directory)
    return directory / _TRIAL_DIRECTORY if config.fast_dev_run else directory


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0].split(".")[0].split("/")[0]


class _Progress:
    """Says how far the grid is, and how long the rest will take if its runs are like those so far."""

    def __init__(self, total: int, finished: int) -> None:
        self._total, self._finished = total, finished
        self._run = 0
        self._started = time.monotonic()
        if finished:
            print(f"{finished} of {total} runs are finished and skipped")

    def begin(self, name: str) -> None:
        """Announce a run."""
        print(f"[{self._finished + self._run + 1}/{self._total}] {name} ...", end=" ", flush=True)

    def end(self, result: str) -> None:
        """Say how it ended."""
        self._run += 1
        elapsed = time.monotonic() - self._started
        rest = (self._total - self._finished - self._run) * elapsed / self._run
        so_far, to_come = (timedelta(seconds=round(seconds)) for seconds in (elapsed, rest))
        print(f"{result}; {so_far} elapsed, about {to_come} left", flush=True)


if __name__ == "__main__":
    main()
