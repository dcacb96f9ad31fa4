"""The figure of ``easgd-simulate sweep``: time to error against one varied value, from the CSV file alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_easgd.lab.demo_extra import blank_figure
from lightning_easgd.lab.simulation.sweep import ALONE, RESULTS, read_rows

__all__ = ["best_times", "draw"]

_SIGNS = {"tau": "τ", "workers": "p", "lr": "η", "momentum": "δ", "alpha": "α", "beta": "β"}
_AXES = {
    "workers": "workers p",
    "tau": "communication period τ, steps",
    "bandwidth": "bandwidth of a link, 10⁶ bytes/s",
    "latency": "one-way latency of a link, seconds",
}


def best_times(rows: Sequence[Mapping[str, Any]], x: str) -> dict[str, dict[float, float]]:
    """The time to error with the best learning rate, for each line of the figure and each x.

    Returns:
        For the label of each line, and each of its x, the shortest time; infinite if no learning rate gets there.
    """
    others = [name for name in rows[0] if name not in (x, "lr", *RESULTS)]
    told_apart = [name for name in others if len({row[name] for row in rows if row["schedule"] != ALONE}) > 1]
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["schedule"] == ALONE:
            continue
        label = ", ".join(
            str(row[name]) if name == "schedule" else f"{_SIGNS.get(name, name)} = {row[name]}" for name in told_apart
        )
        line = lines.setdefault(label, {})
        line[row[x]] = min(line.get(row[x], math.inf), row["seconds_to_error"])
    return lines


def draw(file: Path, x: str) -> Path:
    """Draw the figure of a sweep over a field x, which is a number, beside its CSV file; return the PNG file."""
    rows = read_rows(file)
    figure, (axes,) = blank_figure((5.6, 4.0))
    for label, line in best_times(rows, x).items():
        reached = {value: seconds for value, seconds in sorted(line.items()) if math.isfinite(seconds)}
        axes.plot(list(reached), list(reached.values()), marker="o", markersize=3, label=label or None)
    alone = min(row["seconds_to_error"] for row in rows if row["schedule"] == ALONE)
    if math.isfinite(alone):
        axes.axhline(alone, color="black", linestyle="--", linewidth=1, label="one worker alone (SGD)")
    axes.set(xscale="log", yscale="log", xlabel=_AXES.get(x, x), ylabel="seconds to error, best learning rate")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    picture = file.with_suffix(".png")
    figure.savefig(picture, dpi=90)
    return picture
