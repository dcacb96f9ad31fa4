"""The cells of a comparison: methods x communication periods x workers x learning rates x seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_easgd.lab.command_errors import UsageError
from lightning_easgd.lab.configuration import option_file, options

__all__ = ["COMMAND", "Cell", "cells", "first_of_each"]

COMMAND = "easgd-compare"
SEQUENTIAL = frozenset(("sgd", "msgd", "asgd", "mvasgd"))
WITHOUT_PERIOD = SEQUENTIAL | {"ddp", "local"}
_OF_A_METHOD = frozenset(("method", "lr", "tau", "workers", "overrides"))


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison.

    Attributes:
        label: Name of the method in the grid.
        method: The option of the configuration group `method`.
        tau: Communication period, None for a method without one.
        workers: Number of workers.
        lr: Learning rate.
        seed: Seed of initial weights, data order and dropout.
        panel_tau: The grid's period that this cell belongs to; None if its method does not follow the grid's, so that
            it is compared with all.
        panel_workers: The same for the number of workers.
        overrides: Overrides of `easgd-train` that make this run.
    """

    label: str
    method: str
    tau: int | None
    workers: int
    lr: float
    seed: int
    panel_tau: int | None
    panel_workers: int | None
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its directory's name."""
        period = "" if self.tau is None else f"-tau{self.tau}"
        return f"{self.label}{period}-p{self.workers}-lr{self.lr:g}-seed{self.seed}"


def cells(grid: DictConfig, common: Sequence[str] = ()) -> list[Cell]:
    """List the runs of a grid, seed by seed, so that an interrupted comparison has whole seeds.

    A method follows the grid's `tau` and `workers` unless it has its own; sequential methods have one worker, methods
    without a period none, MDOWNPOUR the period 1.

    Args:
        grid: The configuration `grid`.
        common: Overrides of every run; those of the grid and of the method come after them.

    Raises:
        UsageError: If the grid is empty, has no budget, or has two, or a method has an unknown key or no rates.
    """
    for key, least in (("seeds", 0), ("workers", 1), ("tau", 1)):
        values = grid[key] if isinstance(grid[key], ListConfig) else [None]
        if not values or not all(_is_whole(value, least) for value in values) or len(set(values)) < len(values):
            raise UsageError(
                f"{COMMAND}(grid.{key}={grid[key]}): give one whole number at least, from {least} on, each once, as [1]"
            )
    for key in ("steps", "validate_every"):
        if grid[key] is not None and not _is_whole(grid[key], 1):
            raise UsageError(f"{COMMAND}(grid.{key}={grid[key]}): give a whole number from 1 on")
    for key in ("seconds", "timeout"):
        if (key, grid[key]) != ("seconds", None) and not _is_positive(grid[key]):
            raise UsageError(f"{COMMAND}(grid.{key}={grid[key]}): give a positive number of seconds")
    if not _is_list(grid.target_errors) or not all(_is_positive(each) and each < 1 for each in grid.target_errors):
        raise UsageError(f"{COMMAND}(grid.target_errors={grid.target_errors}): give errors between 0 and 1, as [0.1]")
    for key in ("overrides", "only"):
        if grid[key] is not None and not _is_list(grid[key]):
            raise UsageError(f"{COMMAND}(grid.{key}={grid[key]}): give a list, as [{grid[key]}]")
    if not isinstance(grid.methods, DictConfig):
        raise UsageError(f"{COMMAND}(grid.methods={grid.methods}): give methods and rates, as {{easgd: {{lr: [0.1]}}}}")
    methods = {str(label): _settings(str(label), settings) for label, settings in grid.methods.items()}
    chosen = list(methods) if grid.only is None else [str(label) for label in grid.only]
    if grid.baseline is not None and str(grid.baseline) not in methods:
        raise UsageError(
            f"{COMMAND}(grid.baseline={grid.baseline}): the grid has no such method; choose one of:"
            f" {', '.join(methods) or '(none)'}"
        )
    unknown = [label for label in chosen if label not in methods]
    if unknown or not chosen:
        raise UsageError(
            f"{COMMAND}(grid.only={chosen}): the grid has no {', '.join(unknown) or 'methods'}; choose an experiment,"
            f" and labels among: {', '.join(methods) or '(none)'}"
        )
    budget = _budget(grid)
    return [
        replace(cell, overrides=(*common, *budget, *_strings(grid.overrides), *cell.overrides))
        for seed in grid.seeds
        for label in chosen
        for cell in _cells_of(label, methods[label], grid, int(seed))
    ]


def first_of_each(every: Sequence[Cell]) -> list[Cell]:
    """Return the first cell of each label, to try whether everything runs."""
    return list({cell.label: cell for cell in reversed(every)}.values())[::-1]


def _budget(grid: DictConfig) -> list[str]:
    if (grid.steps is None) == (grid.seconds is None):
        raise UsageError(
            f"{COMMAND}(grid.steps={grid.steps}, grid.seconds={grid.seconds}): give one budget, in optimizer steps of"
            " each worker or in seconds"
        )
    ends = (
        [f"trainer.max_steps={grid.steps}"]
        if grid.seconds is None
        else ["trainer.max_steps=-1", f"callbacks.learning_curve.max_seconds={grid.seconds}"]
    )
    return [
        *ends,
        "trainer.max_epochs=-1",
        f"trainer.val_check_interval={grid.validate_every}",
        "trainer.check_val_every_n_epoch=null",
    ]


def _settings(label: str, settings: Any) -> Mapping[str, Any]:
    plain = OmegaConf.to_container(settings, resolve=True) if isinstance(settings, DictConfig) else None
    rates = plain.get("lr") if isinstance(plain, dict) else None
    if not isinstance(plain, dict) or not _is_list(rates) or not rates or not all(map(_is_positive, rates)):
        raise UsageError(f"{COMMAND}(grid.methods.{label}={settings}): give it learning rates, as {{lr: [0.1, 0.05]}}")
    unknown = set(plain) - _OF_A_METHOD
    if unknown:
        raise UsageError(
            f"{COMMAND}(grid.methods.{label}.{min(unknown)}=...): there is no such key; choose among:"
            f" {', '.join(sorted(_OF_A_METHOD))}"
        )
    for key in ("tau", "workers"):
        values = plain.get(key) or []
        if not _is_list(values) or not all(_is_whole(value, 1) for value in values):
            raise UsageError(f"{COMMAND}(grid.methods.{label}.{key}={values}): give whole numbers from 1 on, as [4]")
    method = str(plain.get("method", label))
    if option_file("method", method) is None:
        raise UsageError(
            f"{COMMAND}(grid.methods.{label}): there is no method {method!r}; set its method, one of:"
            f" {', '.join(options('method'))}"
        )
    return {str(key): value for key, value in plain.items()}


def _cells_of(label: str, settings: Mapping[str, Any], grid: DictConfig, seed: int) -> Iterator[Cell]:
    method = settings.get("method", label)
    own_taus = settings.get("tau") or ([None] if method in WITHOUT_PERIOD else [1] if method == "mdownpour" else None)
    own_workers = settings.get("workers") or ([1] if method in SEQUENTIAL else None)
    for tau, workers, lr in product(own_taus or grid.tau, own_workers or grid.workers, settings["lr"]):
        yield Cell(
            label=label,
            method=method,
            tau=tau,
            workers=workers,
            lr=lr,
            seed=seed,
            panel_tau=None if own_taus else tau,
            panel_workers=None if own_workers else workers,
            overrides=(
                f"method={method}",
                f"seed={seed}",
                f"optimizer.lr={lr}",
                f"trainer.devices={workers}",
                *([] if tau is None else [f"strategy.tau={tau}"]),
                *_strings(settings.get("overrides") or []),
            ),
        )


def _is_list(value: object) -> bool:
    return isinstance(value, list | ListConfig)


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _strings(overrides: Sequence[Any]) -> list[str]:
    return [str(override) for override in overrides]
