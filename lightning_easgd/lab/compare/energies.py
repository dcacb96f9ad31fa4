"""Local energies of the chosen learning rates, read from a comparison's CSV files."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from lightning_easgd.lab.compare.records import CELLS, ENERGIES, SELECTION
from lightning_easgd.lab.report import CENTER, read_rows

__all__ = ["EnergyCurve", "energy_curves"]

Floats = NDArray[np.float64]
Row = dict[str, str]

_SETTING = ("label", "tau", "workers", "panel_tau", "panel_workers")


@dataclass(frozen=True)
class EnergyCurve:
    """The local energy at the end of a method's training with its chosen learning rate.

    Attributes:
        label: Name of the method in the grid.
        tau: Communication period, "" for none.
        workers: Number of workers.
        panel_tau: The grid's period that it belongs to, "" for all.
        panel_workers: The same for the number of workers.
        weights: "center", or "workers" for the mean of the workers' local energies.
        sigmas: σ, rising, of shape (sigmas,).
        errors: Training error without noise, of shape (seeds,).
        energies: Its increase under noise, of shape (seeds, sigmas).
    """

    label: str
    tau: str
    workers: str
    panel_tau: str
    panel_workers: str
    weights: str
    sigmas: Floats
    errors: Floats
    energies: Floats

    @property
    def summary(self) -> tuple[Floats, Floats, Floats]:
        """Mean, smallest and largest energy of the seeds, each of shape (sigmas,)."""
        return self.energies.mean(axis=0), self.energies.min(axis=0), self.energies.max(axis=0)


def energy_curves(directory: Path) -> list[EnergyCurve]:
    """Reads the local energies of the chosen learning rates; none where they were not measured.

    Args:
        directory: The comparison's directory.
    """
    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows(directory / ENERGIES):
        rows_of[row["cell"]].append(row)
    cells = read_rows(directory / CELLS)
    curves = []
    for choice in read_rows(directory / SELECTION):
        same = [cell["cell"] for cell in cells if all(cell[name] == choice[name] for name in (*_SETTING, "lr"))]
        if choice["chosen"] != "yes" or not all(rows_of[name] for name in same):
            continue
        lasts = [_at_the_end(rows_of[name]) for name in same]
        for weights in (CENTER, "workers"):
            seeds = [[row for row in last if (row["weights"] == CENTER) == (weights == CENTER)] for last in lasts]
            if all(seeds):
                curves.append(_curve([choice[name] for name in _SETTING], weights, seeds))
    return curves


def _at_the_end(rows: Sequence[Row]) -> list[Row]:
    last = max(int(row["step"]) for row in rows)
    return [row for row in rows if int(row["step"]) == last]


def _curve(setting: Sequence[str], weights: str, seeds: Sequence[Sequence[Row]]) -> EnergyCurve:
    sigmas = sorted({float(row["sigma"]) for row in seeds[0]})

    def mean(rows: Sequence[Row], column: str, sigma: float) -> float:
        return fmean(float(row[column]) for row in rows if float(row["sigma"]) == sigma)

    label, tau, workers, panel_tau, panel_workers = setting
    return EnergyCurve(
        label,
        tau,
        workers,
        panel_tau,
        panel_workers,
        weights,
        sigmas=np.array(sigmas),
        errors=np.array([mean(rows, "error", sigmas[0]) for rows in seeds]),
        energies=np.array([[mean(rows, "energy", sigma) for sigma in sigmas] for rows in seeds]),
    )
