"""Tables and curves of the benchmark stacked: which learning rate was best, and how it looks."""

import statistics
from collections.abc import Iterable, Sequence

from harness.ratios import Row

__all__ = ["best_curves", "best_rates"]

LAST = 4  # readings whose mean is a run's result


def best_rates(curves: Sequence[Row]) -> list[Row]:
    """For each number of workers and method the best learning rate: the mean of the last readings of all seeds."""
    last = sorted({row["step"] for row in curves})[-LAST:]
    results: dict[tuple[int, str], dict[float, list[float]]] = {}
    for row in curves:
        if row["step"] in last:
            grid = results.setdefault((row["workers"], row["method"]), {})
            grid.setdefault(row["lr"], []).append(row["test_error"])
    rows = []
    for (workers, method), grid in sorted(results.items()):
        errors = {lr: statistics.fmean(values) for lr, values in grid.items()}
        lr = min(errors, key=lambda lr: errors[lr])
        at_end = "yes" if lr in (min(errors), max(errors)) else "no"
        cells = {f"error_lr_{number}": f"{errors[each]:.4f} at {each:g}" for number, each in enumerate(sorted(errors))}
        rows.append(
            {
                "workers": workers,
                "method": method,
                "lr": lr,
                "test_error": round(errors[lr], 4),
                "at_end": at_end,
                **cells,
            }
        )
    return rows


def best_curves(
    curves: Sequence[Row], best: Sequence[Row], workers: int, names: Iterable[str]
) -> dict[str, list[tuple[float, float]]]:
    """Mean of the seeds at the best learning rate; the control of one worker is in every panel."""
    panel = {}
    for name in names:
        for chosen in best:
            if chosen["method"] != name or chosen["workers"] not in (1, workers):
                continue
            points: dict[int, list[float]] = {}
            for row in curves:
                if all(row[column] == chosen[column] for column in ("workers", "method", "lr")):
                    points.setdefault(row["step"], []).append(row["test_error"])
            panel[name] = [(step, statistics.fmean(errors)) for step, errors in points.items()]
    return panel
