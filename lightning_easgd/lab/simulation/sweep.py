"""Many scenarios: all combinations of some values, and their times to error as a CSV file."""

import csv
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_easgd.lab.simulation.scenario import Scenario
from lightning_easgd.lab.simulation.simulator import SimulatedRun

__all__ = ["ALONE", "RESULTS", "read_rows", "sweep", "write_rows"]

ALONE = "alone"
"""The schedule's name in the rows of the baseline: one worker, plain SGD."""

RESULTS = ("seconds_to_error", "last_error", "exchanges")


def sweep(
    base: Scenario, varied: Mapping[str, Sequence[Any]], report: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Simulates all combinations, and one worker alone for each learning rate.

    Args:
        base: What does not vary.
        varied: The values of each field that does.
        report: Called with each row when it is known.

    Returns:
        A row for each run: schedule, workers, lr, the varied fields, and :data:`RESULTS`.
    """
    rows = []
    names = list(dict.fromkeys(["schedule", "workers", "lr", *varied]))
    for lr in varied.get("lr", [base.lr]):
        scenario = replace(base, lr=lr)
        row = {name: getattr(scenario, name) for name in names} | {"schedule": ALONE, "workers": 1}
        rows.append(row | _results(scenario.run_alone(), scenario.target_error))
        report(rows[-1])
    for values in itertools.product(*varied.values()):
        scenario = replace(base, **dict(zip(varied, values, strict=True)))
        row = {name: getattr(scenario, name) for name in names}
        rows.append(row | _results(scenario.run(), scenario.target_error))
        report(rows[-1])
    return rows


def write_rows(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write rows of equal keys as CSV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read what :func:`write_rows` has written; what looks like a number becomes one."""
    with file.open(newline="") as stream:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(stream)]


def _results(run: SimulatedRun, target: float) -> dict[str, Any]:
    seconds, error = (float(f"{value:.6g}") for value in (run.time_to_error(target), run.errors[-1]))
    return dict(zip(RESULTS, (seconds, error, run.learner.exchanges), strict=True))


def _value(text: str) -> Any:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if math.isfinite(number) and number == int(number) else number
