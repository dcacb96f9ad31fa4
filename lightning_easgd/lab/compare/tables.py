"""The tables of a comparison in Markdown, made from its CSV files only."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from lightning_easgd.lab.compare.energies import energy_curves
from lightning_easgd.lab.compare.records import CELLS, FAILURES, SELECTION, TIMES
from lightning_easgd.lab.report import read_rows

__all__ = ["TABLES_FILE", "write_tables"]

TABLES_FILE = "tables.md"
_MINI_BATCHES = 400  # as in the paper's table of times
_SETTING = ("label", "tau", "workers")

Row = dict[str, str]


def write_tables(directory: Path) -> str:
    """Writes `tables.md`: final errors, costs to target errors, time split, local energies, learning rates, failures.

    Args:
        directory: The comparison's directory.

    Returns:
        What has been written.
    """
    selection, cells = read_rows(directory / SELECTION), read_rows(directory / CELLS)
    chosen = [row for row in selection if row["chosen"] == "yes"]
    text = "\n".join(
        [
            *_errors(chosen, cells),
            *_costs(read_rows(directory / TIMES)),
            *_split(chosen, cells),
            *_energies(directory),
            *_rates(selection),
            *_failures(read_rows(directory / FAILURES)),
        ]
    )
    (directory / TABLES_FILE).write_text(text, encoding="utf-8")
    return text


def _errors(chosen: Sequence[Row], cells: Sequence[Row]) -> list[str]:
    rows = []
    for row in chosen:
        runs = _runs(row, cells)
        costs = [f"{_mean(runs, name):.1f}" for name in ("epochs", "seconds")]
        sent = f"{_mean(runs, 'bytes_sent') / 1e6:.2f}"
        error = f"{float(row['test_error']):.2%} ± {float(row['test_error_deviation']):.2%}"
        rows.append([*_setting(row), row["lr"], row["seeds"], row["diverged"], error, *costs, sent])
    header = [*_SETTING, "lr", "seeds", "diverged", "test error", "epochs", "seconds", "MB sent by a worker"]
    return _table("Test error at the end, mean and standard deviation of the seeds", header, rows)


def _costs(times: Sequence[Row]) -> list[str]:
    rows = []
    for row in times:
        if not row["seconds"]:
            costs = ["not reached", "", "", ""]
        else:
            speedup = f"{float(row['speedup']):.2f}" if row["speedup"] else ""
            sent = f"{float(row['bytes_sent']) / 1e6:.2f}"
            costs = [f"{float(row['seconds']):.1f}", speedup, f"{float(row['epochs']):.1f}", sent]
        rows.append([f"{float(row['target_error']):.4g}", *_setting(row), *costs])
    header = ["test error", *_SETTING, "seconds", "speed-up", "epochs", "MB sent by a worker"]
    return _table("What it took all seeds to reach a test error, mean of the seeds", header, rows)


def _split(chosen: Sequence[Row], cells: Sequence[Row]) -> list[str]:
    rows = []
    for row in chosen:
        runs = [run for run in _runs(row, cells) if run["compute"] and float(run["step"])]
        if not runs:
            continue
        parts = []
        for name in ("compute", "data", "communication"):
            known = [_MINI_BATCHES * float(run[name]) / float(run["step"]) for run in runs if run[name]]
            parts.append(f"{fmean(known):.2f}" if known else "in compute")
        rows.append([*_setting(row), *parts])
    header = [*_SETTING, "compute", "data", "communication"]
    return _table(f"Seconds per {_MINI_BATCHES} mini-batches of a worker", header, rows)


def _energies(directory: Path) -> list[str]:
    """One table for each grid of σ; a comparison has one unless its methods override it."""
    curves = energy_curves(directory)
    lines = []
    for sigmas in dict.fromkeys(tuple(curve.sigmas.tolist()) for curve in curves):
        same = [curve for curve in curves if tuple(curve.sigmas.tolist()) == sigmas]
        rows = [
            [curve.label, curve.tau, curve.workers, curve.weights, f"{curve.errors.mean():.2%}",
             *(f"{100 * mean:.2f} ± {100 * deviation:.2f}"
               for mean, deviation in zip(curve.energies.mean(axis=0), curve.energies.std(axis=0), strict=True))]
            for curve in same
        ]  # fmt: skip
        header = [*_SETTING, "weights", "training error", *(f"σ = {sigma:g}" for sigma in sigmas)]
        title = "Increase of the training error under noise σ of the weights, in percentage points: mean and standard"
        lines += _table(f"{title} deviation of the seeds", header, rows)
    return lines


def _rates(selection: Sequence[Row]) -> list[str]:
    rows = [
        [*_setting(row), row["lr"], row["seeds"], row["diverged"], f"{float(row['val_error']):.2%}",
         f"{float(row['test_error']):.2%}", row["chosen"]]
        for row in selection
    ]  # fmt: skip
    header = [*_SETTING, "lr", "seeds", "diverged", "validation error", "test error", "chosen"]
    title = "Learning rates: the lowest mean of the last validation errors is chosen, a diverged run counts as 100 %"
    return _table(title, header, rows)


def _failures(failures: Sequence[Row]) -> list[str]:
    return _table("Failed runs", ["run", "failure"], [[row["cell"], row["failure"]] for row in failures])


def _runs(choice: Row, cells: Sequence[Row]) -> list[Row]:
    return [cell for cell in cells if all(cell[name] == choice[name] for name in (*_SETTING, "panel_tau", "lr"))]


def _mean(runs: Sequence[Row], name: str) -> float:
    return fmean(float(run[name]) for run in runs)


def _setting(row: Row) -> list[str]:
    return [row[name] for name in _SETTING]


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return []
    return [f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines, ""]
