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
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lightning_easgd.callbacks import LOCAL_ENERGY_FILE, TIME_FILE
from lightning_easgd.lab.compare.runs import CELL_FILE, RUNS
from lightning_easgd.lab.recorders import CURVE_FILE

__all__ = [
    "CELLS", "COSTS", "CURVES", "ENERGIES", "FAILURES", "SELECTION", "SETTING", "TIMES", "chosen_runs", "collect",
    "read_table",
]  # fmt: skip

CELLS, CURVES, SELECTION, TIMES, ENERGIES, FAILURES = (
    f"{name}.csv" for name in ("cells", "curves", "selection", "times", "local_energy", "failures")
)
SETTING = ["label", "tau", "workers", "panel_tau", "panel_workers"]
COSTS = ["seconds", "epochs", "bytes_sent"]
_ENDS = ["step", "epochs", "seconds", "bytes_sent", "val_error", "test_error"]
_SPLIT = ["compute", "data", "communication", "rest"]


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV file; settings are text, "" for none. A file that is missing or empty has no rows."""
    try:
        # Of pandas' many words for a missing value only those that are written here: a method may be called "null".
        table = pd.read_csv(path, dtype=dict.fromkeys(SETTING, str), keep_default_na=False, na_values=["", "nan"])
        return table.fillna(dict.fromkeys(SETTING, ""))
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()


def chosen_runs(selection: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of ``cells.csv`` with a chosen learning rate, in the order of the selection."""
    return selection.loc[selection["chosen"] == "yes", [*SETTING, "lr"]].merge(cells, on=[*SETTING, "lr"])


def collect(
    directory: Path,
    labels: Sequence[str],
    targets: Sequence[float],
    baseline: str | None,
    failures: Mapping[str, str],
) -> None:
    """Write the tables of a comparison.

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
    tables = {FAILURES: pd.DataFrame(failures.items(), columns=["cell", "failure"])}
    runs = sorted(path.parent for path in (directory / RUNS).glob(f"*/{CELL_FILE}"))
    if runs:
        curves = _gathered(runs, CURVE_FILE)
        cells = _cells(runs, curves, labels)
        selection = _select(cells)
        times = _times(chosen_runs(selection, cells), curves, targets, baseline)
        tables |= {CELLS: cells, CURVES: curves, SELECTION: selection, TIMES: times}
        energies = _gathered(runs, LOCAL_ENERGY_FILE)
        if len(energies):
            tables[ENERGIES] = energies
    for name in {CELLS, CURVES, SELECTION, TIMES, *tables}:
        # Of a curve "nan" is a value: the run has diverged.
        text = "nan" if name == CURVES else ""
        table = tables.get(name, pd.DataFrame())
        table.to_csv(directory / name, index=False, na_rep=text, lineterminator="\r\n")


def _gathered(runs: Sequence[Path], name: str) -> pd.DataFrame:
    """A file of each run, one below the other, with the run's name in the first column."""
    found = {run.name: read_table(run / name) for run in runs}
    return pd.concat(found, names=["cell"]).reset_index("cell")


def _cells(runs: Sequence[Path], curves: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    settings = [{"cell": run.name} | json.loads((run / CELL_FILE).read_text(encoding="utf-8")) for run in runs]
    place = {label: number for number, label in enumerate(labels)}
    settings.sort(key=lambda one: (place.get(one["label"], len(place)), one["tau"] or 0, one["workers"], -one["lr"]))
    cells = pd.DataFrame(settings, columns=["cell", *SETTING, "lr", "seed", "method"])
    cells[SETTING] = [["" if one[name] is None else str(one[name]) for name in SETTING] for one in settings]
    ends = curves.drop_duplicates("cell", keep="last").set_index("cell")
    state = pd.Series(np.where(np.isfinite(ends["val_loss"]), "finished", "diverged"), ends.index, name="state")
    split = _gathered(runs, TIME_FILE).reindex(columns=["cell", *_SPLIT]).groupby("cell").mean()
    cells = cells.join(pd.concat([state, ends[_ENDS], split], axis=1), on="cell")
    # Nobody can tell from outside how long DDP waits inside a batch.
    cells.loc[cells["method"] == "ddp", "communication"] = np.nan
    return cells.drop(columns="method")


def _select(cells: pd.DataFrame) -> pd.DataFrame:
    diverged = cells["state"] == "diverged"
    scored = cells.assign(diverged=diverged, val_error=cells["val_error"].mask(diverged, 1.0))
    rates = scored.groupby([*SETTING, "lr"], sort=False, as_index=False).agg(
        seeds=("seed", "size"),
        diverged=("diverged", "sum"),
        val_error=("val_error", "mean"),
        test_error=("test_error", "mean"),
        test_error_deviation=("test_error", lambda errors: errors.std(ddof=0)),
    )
    # Where a seed is missing, as its run failed, the others are no fair sample.
    whole = rates[rates["seeds"] == rates.groupby(SETTING)["seeds"].transform("max")]
    best = whole.sort_values(["val_error", "lr"], ascending=[True, False]).drop_duplicates(SETTING)
    return rates.assign(chosen=np.where(rates.index.isin(best.index), "yes", "no"))


def _times(runs: pd.DataFrame, curves: pd.DataFrame, targets: Sequence[float], baseline: str | None) -> pd.DataFrame:
    """Means over the seeds of what it took to reach a test error; none if a seed has not reached it."""
    settings = runs[SETTING].drop_duplicates()
    tables = [settings.reindex(columns=[*SETTING, "target_error", *COSTS, "speedup"])[:0]]
    for target in targets:
        firsts = curves[curves["test_error"] <= target].drop_duplicates("cell").set_index("cell")[COSTS]
        by_setting = runs[[*SETTING, "cell"]].join(firsts, on="cell").groupby(SETTING, sort=False, as_index=False)
        times = by_setting[COSTS].agg(lambda costs: costs.mean(skipna=False))
        times.insert(len(SETTING), "target_error", target)
        # Of a baseline with several settings the fastest is what a user would take.
        tables.append(times.assign(speedup=times.loc[times["label"] == baseline, "seconds"].min() / times["seconds"]))
    return pd.concat(tables[1:] or tables)
