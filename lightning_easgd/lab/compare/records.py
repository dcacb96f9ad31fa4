"""From the runs of a comparison to its tables: everything that is drawn or printed is read from these CSV files.

========================  =============================================================================================
``cells.csv``             one row per run: settings, state, final errors, bytes, time split
``curves.csv``            every row of every run's learning curve
``selection.csv``         the learning rates of each method, and the one that is chosen
``times.csv``             what it took the chosen rate to reach each target error
``local_energy.csv``      every row of every run's local energy, where it was measured
``failures.csv``          runs that have failed, and why
========================  =============================================================================================
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from lightning_easgd.callbacks import LOCAL_ENERGY_FILE, TIME_FILE, write_csv
from lightning_easgd.lab.compare.runs import CELL_FILE, RUNS
from lightning_easgd.lab.recorders import CURVE_FILE
from lightning_easgd.lab.report import read_rows

__all__ = ["CELLS", "CURVES", "ENERGIES", "FAILURES", "SELECTION", "TIMES", "collect"]

CELLS, CURVES, SELECTION, TIMES, ENERGIES, FAILURES = (
    f"{name}.csv" for name in ("cells", "curves", "selection", "times", "local_energy", "failures")
)
_SPLIT = ("compute", "data", "communication", "rest")
_SETTING = ("label", "tau", "workers", "panel_tau", "panel_workers")

Row = dict[str, Any]


def collect(
    directory: Path,
    labels: Sequence[str],
    targets: Sequence[float],
    baseline: str | None,
    failures: Mapping[str, str],
) -> None:
    """Writes the tables of a comparison.

    The learning rate of each method (and period, and number of workers) is the one with the lowest mean over the seeds
    of the last validation error within the budget, where a run that has diverged counts as an error of 1; of equal
    ones the largest. Test errors play no part.

    Args:
        directory: The comparison's directory.
        labels: Names of the methods, in the order of the tables.
        targets: Test errors in (0, 1) whose first times are wanted.
        baseline: Label of the method that speed-ups are relative to.
        failures: Names of failed cells, and what went wrong.
    """
    runs = sorted(path.parent for path in (directory / RUNS).glob(f"*/{CELL_FILE}"))
    curves = {run.name: read_rows(run / CURVE_FILE) for run in runs}
    place = {label: number for number, label in enumerate(labels)}
    cells = sorted(
        (_cell(run, curves[run.name]) for run in runs),
        key=lambda cell: (place.get(cell["label"], len(place)), cell["tau"] or 0, cell["workers"], -cell["lr"]),
    )
    selection = _select(cells)
    _write(directory / CELLS, cells)
    _write(directory / CURVES, [{"cell": name, **row} for name, rows in curves.items() for row in rows])
    _write(directory / SELECTION, selection)
    _write(directory / TIMES, _times(_chosen(cells, selection), curves, targets, baseline))
    energies = [{"cell": run.name, **row} for run in runs for row in read_rows(run / LOCAL_ENERGY_FILE)]
    if energies:
        _write(directory / ENERGIES, energies)
    write_csv(directory / FAILURES, ["cell", "failure"], list(failures.items()))


def _cell(run: Path, curve: Sequence[Mapping[str, str]]) -> Row:
    cell = json.loads((run / CELL_FILE).read_text(encoding="utf-8"))
    last = curve[-1]
    diverged = not math.isfinite(float(last["val_loss"]))
    ranks = read_rows(run / TIME_FILE)
    split = {name: fmean(float(row[name]) for row in ranks) if ranks else "" for name in _SPLIT}
    if cell["method"] == "ddp":  # nobody can tell from outside how long DDP waits inside a batch
        split["communication"] = ""
    return {
        "cell": run.name,
        **{name: "" if cell[name] is None else cell[name] for name in _SETTING},
        "lr": cell["lr"],
        "seed": cell["seed"],
        "state": "diverged" if diverged else "finished",
        **{name: last[name] for name in ("step", "epochs", "seconds", "bytes_sent", "val_error", "test_error")},
        **split,
    }


def _select(cells: Sequence[Row]) -> list[Row]:
    by_setting: dict[tuple[Any, ...], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        by_setting[tuple(cell[name] for name in _SETTING)][cell["lr"]].append(cell)
    rows = []
    for setting, rates in by_setting.items():
        scores = {rate: fmean(_criterion(cell) for cell in runs) for rate, runs in rates.items()}
        # Where a seed is missing, as its run failed, the others are no fair sample.
        most = max(len(runs) for runs in rates.values())
        chosen = min((rate for rate in rates if len(rates[rate]) == most), key=lambda rate: (scores[rate], -rate))
        for rate, runs in sorted(rates.items(), reverse=True):
            errors = [float(cell["test_error"]) for cell in runs]
            rows.append(
                {
                    **dict(zip(_SETTING, setting, strict=True)),
                    "lr": rate,
                    "seeds": len(runs),
                    "diverged": sum(cell["state"] == "diverged" for cell in runs),
                    "val_error": scores[rate],
                    "test_error": fmean(errors),
                    "test_error_deviation": pstdev(errors),
                    "chosen": "yes" if rate == chosen else "no",
                }
            )
    return rows


def _criterion(cell: Row) -> float:
    return 1.0 if cell["state"] == "diverged" else float(cell["val_error"])


def _chosen(cells: Sequence[Row], selection: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The runs with the chosen rate, by setting."""
    return {
        tuple(row[name] for name in _SETTING): [
            cell for cell in cells if all(cell[name] == row[name] for name in (*_SETTING, "lr"))
        ]
        for row in selection
        if row["chosen"] == "yes"
    }


def _times(
    chosen: Mapping[tuple[Any, ...], Sequence[Row]],
    curves: Mapping[str, Sequence[Mapping[str, str]]],
    targets: Sequence[float],
    baseline: str | None,
) -> list[Row]:
    rows = []
    for target in targets:
        reached = {setting: _first([curves[cell["cell"]] for cell in runs], target) for setting, runs in chosen.items()}
        reference = [first for setting, first in reached.items() if setting[0] == baseline and first]
        # Of a baseline with several settings the fastest is what a user would take.
        seconds = min((first["seconds"] for first in reference), default=None)
        for setting, first in reached.items():
            row = dict(zip(_SETTING, setting, strict=True)) | {"target_error": target}
            costs = first or {"seconds": "", "epochs": "", "bytes_sent": ""}
            speedup = seconds / first["seconds"] if first and seconds is not None else ""
            rows.append({**row, **costs, "speedup": speedup})
    return rows


def _first(curves: Sequence[Sequence[Mapping[str, str]]], target: float) -> Row | None:
    """Mean over the seeds of what it took to reach a test error; None if a seed has not reached it."""
    firsts = [next((row for row in curve if float(row["test_error"]) <= target), None) for curve in curves]
    if None in firsts:
        return None
    names = ("seconds", "epochs", "bytes_sent")
    return {name: fmean(float(row[name]) for row in firsts if row is not None) for name in names}


def _write(path: Path, rows: Sequence[Row]) -> None:
    header = list(rows[0]) if rows else []
    write_csv(path, header, [list(row.values()) for row in rows])
