"""The mean learning curves of the chosen learning rates, read from a comparison's CSV files."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_easgd.lab.compare.records import CELLS, CURVES, SELECTION
from lightning_easgd.lab.report import read_rows

__all__ = ["MeanCurve", "Panel", "mean_curves", "panels"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MeanCurve:
    """A method with its chosen learning rate, mean of its seeds.

    Attributes:
        label: Name of the method in the grid.
        tau: Communication period, "" for none.
        workers: Number of workers.
        panel_tau: The grid's period that it belongs to, "" for all.
        panel_workers: The same for the number of workers.
        costs: Seconds, epochs and bytes_sent at each validation, of shape (validations,).
        error: Mean test error, of shape (validations,).
        low: The smallest error of a seed, of shape (validations,).
        high: The largest.
    """

    label: str
    tau: str
    workers: str
    panel_tau: str
    panel_workers: str
    costs: Mapping[str, Floats]
    error: Floats
    low: Floats
    high: Floats


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
        """Says whether a curve belongs into it.

        Args:
            panel_tau: The curve's period in the grid, "" for all.
            panel_workers: The same for the number of workers.
        """
        return panel_tau in ("", self.tau) and panel_workers in ("", self.workers)


def mean_curves(directory: Path) -> list[MeanCurve]:
    """Reads the curves of the chosen learning rates.

    Seeds of one method that were validated less often than others, as their budget of seconds ended, shorten its curve.

    Args:
        directory: The comparison's directory.
    """
    rows_of: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read_rows(directory / CURVES):
        rows_of[row["cell"]].append(row)
    cells = read_rows(directory / CELLS)
    names = ("label", "tau", "workers", "panel_tau", "panel_workers")
    curves = []
    for choice in read_rows(directory / SELECTION):
        if choice["chosen"] == "yes":
            same = [cell for cell in cells if all(cell[name] == choice[name] for name in (*names, "lr"))]
            curves.append(_mean([choice[name] for name in names], [rows_of[cell["cell"]] for cell in same]))
    return curves


def panels(taus: Sequence[str], workers: Sequence[str]) -> Iterator[Panel]:
    """Lists the panels of a figure.

    Args:
        taus: The curves' `panel_tau`.
        workers: The curves' `panel_workers`.
    """
    for tau in _values(taus):
        for worker in _values(workers):
            yield Panel(tau, worker)


def _values(column: Sequence[str]) -> list[str]:
    return sorted({value for value in column if value}, key=int) or [""]


def _mean(setting: Sequence[str], seeds: Sequence[Sequence[Mapping[str, str]]]) -> MeanCurve:
    length = min(len(rows) for rows in seeds)

    def column(name: str) -> Floats:
        return np.array([[float(row[name]) for row in rows[:length]] for rows in seeds])

    errors = column("test_error")
    label, tau, workers, panel_tau, panel_workers = setting
    return MeanCurve(
        label,
        tau,
        workers,
        panel_tau,
        panel_workers,
        costs={name: column(name).mean(axis=0) for name in ("seconds", "epochs", "bytes_sent")},
        error=errors.mean(axis=0),
        low=errors.min(axis=0),
        high=errors.max(axis=0),
    )
