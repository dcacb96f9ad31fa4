"""The tables of a comparison in Markdown, made from its CSV files only."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from lightning_easgd.lab.compare.curves import energy_curves
from lightning_easgd.lab.compare.records import (
    CELLS,
    COSTS,
    FAILURES,
    SELECTION,
    SETTING,
    TIMES,
    chosen_runs,
    read_table,
)  # fmt: skip

__all__ = ["TABLES_FILE", "write_tables"]

TABLES_FILE = "tables.md"
_MINI_BATCHES = 400  # as in the paper's table of times
_METHOD = SETTING[:3]
_SENT = "MB sent by a worker"


def write_tables(directory: Path) -> str:
    """Write `tables.md`: final errors, costs to target errors, time split, local energies, learning rates, failures.

    What has been written is returned, too.
    """
    selection, cells, times, failures = (read_table(directory / name) for name in (SELECTION, CELLS, TIMES, FAILURES))
    lines: list[str] = []
    if len(selection):
        runs = chosen_runs(selection, cells)
        lines += [*_errors(selection, runs), *_costs(times), *_split(runs), *_energies(directory), *_rates(selection)]
    lines += _table("Failed runs", ["run", "failure"], failures.to_numpy())
    text = "\n".join(lines)
    (directory / TABLES_FILE).write_text(text, encoding="utf-8")
    return text


def _errors(selection: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    chosen = selection[selection["chosen"] == "yes"].join(runs.groupby(SETTING)[COSTS].mean(), on=SETTING)
    rows = [
        [*_method(row), f"{row.lr:g}", row.seeds, row.diverged,
         f"{row.test_error:.2%} ± {row.test_error_deviation:.2%}",
         f"{row.epochs:.1f}", f"{row.seconds:.1f}", f"{row.bytes_sent / 1e6:.2f}"]
        for row in chosen.itertuples()
    ]  # fmt: skip
    header = [*_METHOD, "lr", "seeds", "diverged", "test error", "epochs", "seconds", _SENT]
    return _table("Test error at the end, mean and standard deviation of the seeds", header, rows)


def _costs(times: pd.DataFrame) -> list[str]:
    costs = {"seconds": "{:.1f}", "speedup": "{:.2f}", "epochs": "{:.1f}", "bytes_sent": "{:.2f}"}
    table = times.assign(bytes_sent=times["bytes_sent"] / 1e6, target_error=times["target_error"].map("{:.4g}".format))
    for name, style in costs.items():
        table[name] = table[name].map(style.format, na_action="ignore").astype(object)
        table[name] = table[name].fillna("not reached" if name == "seconds" else "")
    header = ["test error", *_METHOD, "seconds", "speed-up", "epochs", _SENT]
    rows = table[["target_error", *_METHOD, *costs]].to_numpy()
    return _table("What it took all seeds to reach a test error, mean of the seeds", header, rows)


def _split(runs: pd.DataFrame) -> list[str]:
    parts = ["compute", "data", "communication"]
    known = runs[runs["compute"].notna() & (runs["step"] > 0)]
    seconds = known[SETTING].join(known[parts].mul(_MINI_BATCHES / known["step"], axis=0))
    means = seconds.groupby(SETTING, sort=False)[parts].mean().map("{:.2f}".format).replace("nan", "in compute")
    rows = means.reset_index()[[*_METHOD, *parts]].to_numpy()
    return _table(f"Seconds per {_MINI_BATCHES} mini-batches of a worker", [*_METHOD, *parts], rows)


def _energies(directory: Path) -> list[str]:
    """One table for each grid of σ; a comparison has one unless its methods override it."""
    curves = energy_curves(directory)
    lines = []
    for sigmas in dict.fromkeys(tuple(curve.sigmas.tolist()) for curve in curves):
        rows = [
            [curve.label, curve.tau, curve.workers, curve.weights, f"{curve.errors.mean():.2%}",
             *(f"{100 * mean:.2f} ± {100 * deviation:.2f}"
               for mean, deviation in zip(curve.energies.mean(axis=0), curve.energies.std(axis=0), strict=True))]
            for curve in curves if tuple(curve.sigmas.tolist()) == sigmas
        ]  # fmt: skip
        header = [*_METHOD, "weights", "training error", *(f"σ = {sigma:g}" for sigma in sigmas)]
        title = "Increase of the training error under noise σ of the weights, in percentage points: mean and standard"
        lines += _table(f"{title} deviation of the seeds", header, rows)
    return lines


def _rates(selection: pd.DataFrame) -> list[str]:
    rows = [
        [*_method(row), f"{row.lr:g}", row.seeds, row.diverged, f"{row.val_error:.2%}", f"{row.test_error:.2%}",
         row.chosen]
        for row in selection.itertuples()
    ]  # fmt: skip
    header = [*_METHOD, "lr", "seeds", "diverged", "validation error", "test error", "chosen"]
    title = "Learning rates: the lowest mean of the last validation errors is chosen, a diverged run counts as 100 %"
    return _table(title, header, rows)


def _method(row: object) -> list[str]:
    return [getattr(row, name) for name in _METHOD]


def _table(title: str, header: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not lines:
        return []
    return [f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header), *lines, ""]
