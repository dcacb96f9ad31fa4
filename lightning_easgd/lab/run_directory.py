"""The directory of a run: which of its files are the run's, and that no other run takes their place."""

import csv
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_easgd.callbacks import (
    ACCURACY_FILE,
    COMMUNICATION_FILE,
    ELASTIC_DIRECTORY,
    LOCAL_ENERGY_FILE,
    TIME_FILE,
)
from lightning_easgd.lab.command_errors import UsageError
from lightning_easgd.lab.recorders import CURVE_FILE
from lightning_easgd.lab.report import CONFIG_FILE, EARLIER, METRICS_FILE
from lightning_easgd.strategies.worker_state import remove_sidecar

__all__ = [
    "ERROR_FILE",
    "VERSIONS_FILE",
    "SweepDirectory",
    "check_free",
    "check_places",
    "clear",
    "saved_run",
    "take_over",
]

ERROR_FILE = "error.txt"
VERSIONS_FILE = "versions.txt"
_CHECKPOINTS = "checkpoints"
_FIGURE_FILE = "figure.png"
_GRID_FILE = "grid.yaml"  # of an easgd-compare
_SWEEP_FILE = "multirun.yaml"
_HYPERPARAMETERS = "hparams.yaml"

_FOLDERS = (_CHECKPOINTS, EARLIER, ELASTIC_DIRECTORY, "tensorboard")
_PLACES = {"dirpath", "directory", "save_dir"}  # of callbacks and loggers
_OF_A_RUN = {"data", "model", "optimizer", "strategy", "trainer"}  # in its configuration

# What a later run reads of one that it goes on from.
_RECORDS = (CONFIG_FILE, VERSIONS_FILE, ACCURACY_FILE, TIME_FILE, COMMUNICATION_FILE, CURVE_FILE, LOCAL_ENERGY_FILE,
            METRICS_FILE, f"{ELASTIC_DIRECTORY}/rank_*.csv")  # fmt: skip
_PATTERNS = (*_RECORDS, *(f"{EARLIER}/[0-9]*/{each}" for each in _RECORDS), _HYPERPARAMETERS, ERROR_FILE, _FIGURE_FILE,
             "tensorboard/events.out.tfevents.*", f"tensorboard/{_HYPERPARAMETERS}")  # fmt: skip

_taken: set[Path] = set()  # by runs of this process


def saved_run(checkpoint: Path) -> tuple[Path, DictConfig] | None:
    """Find the run that wrote a checkpoint, in its folder or the one above, and its configuration.

    Raises:
        UsageError: If the configuration cannot be read.
    """
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        path = folder / CONFIG_FILE
        config = _configuration(path)
        if config is None and path.is_file() and path.stat().st_size:
            raise UsageError(f"{path}: this configuration of a run cannot be read; correct it, or move it away")
        if config is not None and set(config) >= _OF_A_RUN:
            return folder, config
    return None


class SweepDirectory(Callback):
    """Refuses a sweep in the directory of another, whose record Hydra would replace before the first job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Look before Hydra writes."""
        directory = Path(config.hydra.sweep.dir)
        if (directory / _SWEEP_FILE).exists() and not config.overwrite:
            sys.exit(
                f"easgd-train(hydra.sweep.dir={directory}): this directory holds a sweep; choose another one, or"
                " replace its runs with overwrite=true"
            )


def check_free(command: str, run: Path, *, overwrite: bool, resumed: Path | None, in_sweep: bool) -> None:
    """Refuse a directory that holds what this run would destroy.

    Args:
        command: The command's name, for errors.
        run: The run's directory.
        overwrite: Whether an earlier run's own files may be removed.
        resumed: The checkpoint that the run goes on from; None if it begins anew.
        in_sweep: Whether other runs of this process are to stay.

    Raises:
        UsageError: If it holds a run, a comparison, or another run of this process.
    """
    place = f"{command}(paths.run={run})"
    if in_sweep and run.resolve() in _taken:
        raise UsageError(f"{place}: another run of this sweep has this directory; leave paths.run as it is")
    if (run / _GRID_FILE).exists():
        raise UsageError(f"{place}: this directory holds a comparison; choose another paths.run")
    folders = (run.absolute(), *run.absolute().parents)
    if holder := next((each for each in folders if each.name in _FOLDERS and _holds_run(each.parent)), None):
        raise UsageError(f"{place}: {holder} belongs to the run in {holder.parent}; choose another paths.run")
    goes_on = resumed is not None and run.resolve() in resumed.resolve().parents
    if overwrite and goes_on:
        raise UsageError(
            f"{command}(overwrite=true, ckpt_path={resumed}): it would remove the run that it goes on from; leave"
            " overwrite=true out, or choose another paths.run"
        )
    if overwrite or not any(_own_files(run)):
        return
    if not goes_on:
        last = run / _CHECKPOINTS / "last.ckpt"
        resume = f"go on with ckpt_path={last}" if last.exists() else "choose another paths.run"
        other = ", choose another paths.run," if last.exists() else ""
        raise UsageError(f"{place}: this directory holds a run; {resume}{other} or remove it with overwrite=true")
    assert resumed is not None
    if later := [path.name for path in resumed.parent.glob("*.ckpt") if _step(path) > _step(resumed)]:
        raise UsageError(
            f"{place}: this run has gone on after {resumed.name} ({', '.join(sorted(later))}); go on from its last"
            " checkpoint, or choose another paths.run"
        )


def check_places(command: str, config: DictConfig, resumed: Path | None) -> None:
    """Refuse directories that callbacks and loggers are given outside of the run's, if they hold another's results.

    Args:
        command: The command's name, for errors.
        config: Its settings.
        resumed: The checkpoint that the run goes on from, whose own directory it may be.

    Raises:
        UsageError: If one of them does.
    """
    run = Path(config.paths.run).resolve()
    chosen = {f"{group}.{name}": each for group in ("callbacks", "logger") for name, each in config[group].items()}
    for name, each in chosen.items():
        for key in _PLACES & set(each if isinstance(each, DictConfig) else ()):
            place = Path(each[key] or run)
            if run in (place.resolve(), *place.resolve().parents):
                continue
            if resumed is not None and place.resolve() == resumed.resolve().parent:
                continue
            names = _checkpoint_names(config) if key == "dirpath" else []
            own = (path for path in place.glob("*.ckpt") if any(known.fullmatch(path.stem) for known in names))
            if any(_own_files(place)) or _holds_run(place.absolute()) or any(own):
                raise UsageError(
                    f"{command}({name}.{key}={place}): another run's results lie there, which this one would"
                    " replace; choose another directory"
                )


def clear(run: Path) -> None:
    """Remove the files of an earlier run, and no others; the directory is then this process's run's."""
    for path in list(_own_files(run)):
        remove_sidecar(str(path))
        path.unlink(missing_ok=True)
    _remove_empty(run)
    _take(run)


def take_over(old: Path, run: Path, step: int) -> None:
    """Keep the records of a run up to a step below `earlier` of the run that goes on from there.

    Args:
        old: Directory of the run that is gone on from, perhaps `run` itself; its records then move.
        run: Directory of the new run.
        step: Where it goes on.
    """
    legs = sorted((int(leg.name), leg) for leg in (old / EARLIER).glob("[0-9]*"))
    if old.resolve() != run.resolve():
        clear(run)
    start = 0
    # What a run recorded after its checkpoint is not of the one that goes on, perhaps of no other: it may have crashed.
    for end, leg in (*((min(end, step), leg) for end, leg in legs), (step, old)):
        kept = run / EARLIER / str(end)
        if leg.resolve() != kept.resolve() and start < max(step, 1):
            for path in _matching(leg, _RECORDS):
                copy = kept / path.relative_to(leg)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy_until(path, copy, step)
        start = max(end, 1)
    if old.resolve() == run.resolve():
        for folder in (run, *(leg for end, leg in legs if end > step)):
            for path in _matching(folder, (*_RECORDS, _HYPERPARAMETERS, ERROR_FILE)):
                path.unlink()
        _remove_empty(run)
    _take(run)


def _step(path: Path) -> int:
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return int(checkpoint.get("global_step", 0))


def _take(run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    _taken.add(run.resolve())


def _matching(run: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in run.glob(pattern) if path.is_file()]


def _holds_run(folder: Path) -> bool:
    return saved_run(folder / "any") is not None


def _own_files(run: Path) -> Iterator[Path]:
    yield from _matching(run, _PATTERNS)
    names = _checkpoint_names(_configuration(run / CONFIG_FILE))
    yield from (
        path for path in (run / _CHECKPOINTS).glob("*.ckpt") if any(name.fullmatch(path.stem) for name in names)
    )


def _configuration(path: Path) -> DictConfig | None:
    """Read a configuration; None if there is none that can be read."""
    try:
        config = OmegaConf.load(path)
    except (OSError, YAMLError, UnicodeDecodeError):
        return None
    return config if isinstance(config, DictConfig) else None


def _checkpoint_names(config: DictConfig | None) -> list[re.Pattern[str]]:
    """What a run's configuration calls its checkpoints; a name that a user gave a copy is none of these."""
    names = {"best", "last"}
    callbacks = None if config is None else config.get("callbacks")
    for callback in (callbacks or {}).values():
        if isinstance(callback, DictConfig) and "filename" in callback:
            names.add(str(callback.filename or "{epoch}-{step}"))
    # {epoch} becomes epoch=3; Lightning adds -v1 where a name is taken.
    return [re.compile(re.sub(r"\\\{.*?\\\}", ".*", re.escape(name)) + r"(-v\d+)?") for name in names]


def _copy_until(path: Path, copy: Path, step: int) -> None:
    """Copy a file; of a table with a column `step` the rows until then."""
    if path.suffix != ".csv":
        shutil.copyfile(path, copy)
        return
    with path.open(newline="", encoding="utf-8") as file, copy.open("w", newline="", encoding="utf-8") as kept:
        table = csv.DictReader(file)
        writer = csv.DictWriter(kept, table.fieldnames or ())
        writer.writeheader()
        writer.writerows(row for row in table if not row.get("step") or float(row["step"]) <= step)


def _remove_empty(run: Path) -> None:
    for folder, _, _ in os.walk(run, topdown=False):
        relative = Path(folder).relative_to(run).parts
        if relative and relative[0] in _FOLDERS and not os.listdir(folder):
            os.rmdir(folder)
