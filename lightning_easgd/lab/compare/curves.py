"""Learning curves and local energies of the chosen learning rates, read from a comparison's CSV files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lightning_easgd.lab.compare.records import (
    CELLS,
    COSTS,
    CURVES,
    ENERGIES,
    SELECTION,
    SETTING,
    chosen_runs,
    read_table,
)  # fmt: skip
from lightning_easgd.lab.report import CENTER

__all__ = ["EnergyCurve", "MeanCurve", "Panel", "energy_curves", "mean_curves", "panels"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _OfASetting:
    """Something of a method with its chosen learning rate.

    Attributes:
        label: Name of the method in the grid.
        tau: Communication period, "" for none.
        workers: Number of workers.
        panel_tau: The grid's period that it belongs to, "" for all.
        panel_workers: The same for the number of workers.
    """

    label: str
    tau: str
    workers: str
    panel_tau: str
    panel_workers: str


@dataclass(frozen=True)
class MeanCurve(_OfASetting):
    """A learning curve, mean of the seeds.

    Attributes:
        costs: Seconds, epochs and bytes_sent at each validation, of shape (validations,).
        error: Mean test error, of shape (validations,).
        low: The smallest error of a seed, of shape (validations,).
        high: The largest.
    """

    costs: Mapping[str, Floats]
    error: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class EnergyCurve(_OfASetting):
    """The local energy at the end of training.

    Attributes:
        weights: "center", or "workers" for the mean of the workers' local energies.
        sigmas: σ, rising, of shape (sigmas,).
        errors: Training error without noise, of shape (seeds,).
        energies: Its increase under noise, of shape (seeds, sigmas).
    """

    weights: str
    sigmas: Floats
    errors: Floats
    energies: Floats

    @property
    def summary(self) -> tuple[Floats, Floats, Floats]:
        """Mean, smallest and largest energy of the seeds, each of shape (sigmas,)."""
        return self.energies.mean(axis=0), self.energies.min(axis=0), self.energies.max(axis=0)


@dataclass(frozen=True)
class Panel:
    """What is drawn into one system of axes: a period and a number of workers, "" where the grid has but one."""

    tau: str
    workers: str

    @property
    def title(self) -> str:
        """Its values in words."""
        return ", ".join(f"{name} = {value}" for name, value in (("τ", self.tau), ("p", self.workers)) if value)

    def holds(self, panel_tau: str, panel_workers: str) -> bool:
        """Say whether a curve with these values of the grid, "" for all, belongs into it."""
        return panel_tau in ("", self.tau) and panel_workers in ("", self.workers)


def panels(taus: Sequence[str], workers: Sequence[str]) -> list[Panel]:
    """List the panels of a figure."""
    return [Panel(tau, worker) for tau in _values(taus) for worker in _values(workers)]


def _values(column: Sequence[str]) -> list[str]:
    return sorted({value for value in column if value}, key=int) or [""]


def mean_curves(directory: Path) -> list[MeanCurve]:
    """Read the learning curves of the chosen learning rates.

    Seeds of one method that were validated less often than others, as their budget of seconds ended, shorten its curve.
    """
    curves = []
    for setting, rows in _chosen(directory, CURVES):
        seeds = rows["cell"].nunique()
        validations = rows.groupby(rows.groupby("cell").cumcount()).filter(lambda same, seeds=seeds: len(same) == seeds)
        by_validation = validations.groupby(validations.groupby("cell").cumcount())
        costs = {name: by_validation[name].mean().to_numpy() for name in COSTS}
        error, low, high = (by_validation["test_error"].agg(how).to_numpy() for how in ("mean", "min", "max"))
        curves.append(MeanCurve(**setting, costs=costs, error=error, low=low, high=high))
    return curves


def energy_curves(directory: Path) -> list[EnergyCurve]:
    """Read the local energies of the chosen learning rates; none where they were not measured."""
    curves = []
    for setting, rows in _chosen(directory, ENERGIES):
        ends = rows[rows["step"] == rows.groupby("cell")["step"].transform("max")]
        for weights, same in ends.groupby(np.where(ends["weights"] == CENTER, CENTER, "workers")):
            if same["cell"].nunique() == rows["cell"].nunique():
                table = same.pivot_table(["error", "energy"], "cell", "sigma")  # means, in the order of σ
                energies = table["energy"]
                sigmas, errors = energies.columns.to_numpy(float), table["error"].iloc[:, 0].to_numpy()
                found = {"sigmas": sigmas, "errors": errors, "energies": energies.to_numpy()}
                curves.append(EnergyCurve(**setting, weights=str(weights), **found))
    return curves


def _chosen(directory: Path, name: str) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Each setting, and the rows of its runs with the chosen rate, if all runs have some."""
    selection, cells, rows = (read_table(directory / each) for each in (SELECTION, CELLS, name))
    if len(selection) and len(rows):
        for setting, runs in chosen_runs(selection, cells).groupby(SETTING, sort=False):
            found = rows[rows["cell"].isin(runs["cell"])]
            if found["cell"].nunique() == len(runs):
                yield dict(zip(SETTING, setting, strict=True)), found
