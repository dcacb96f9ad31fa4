"""The figure of ``easgd-simulate sweep``: time to error against one varied value, from the CSV file alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_easgd.lab.figure_style import (
    LineStyle,
    blank_figure,
    legend_below,
    method_styles,
    plot,
    readable_log,
    save,
    value_styles,
)
from lightning_easgd.lab.simulation.sweep import ALONE, RESULTS, read_rows

__all__ = ["best_times", "draw"]

_SIGNS = {"tau": "τ", "workers": "p", "lr": "η", "momentum": "δ", "alpha": "α", "beta": "β"}
# By field: what it is, and its symbol or unit.
_AXES = {
    "workers": ("number of workers", "p"),
    "tau": ("communication period", "τ in steps"),
    "bandwidth": ("bandwidth of a link", "MB/s"),
    "latency": ("one-way latency of links", "s"),
}
_METHODS = {"sync": "easgd", "async": "easgd_async"}
_SCHEDULE = "schedule"


def best_times(rows: Sequence[Mapping[str, Any]], x: str) -> dict[tuple[str, str], dict[float, float]]:
    """The time to error with the best learning rate, for each line of the figure and each x.

    Returns:
        For the schedule of each line and what else tells it apart, and each of its x, the shortest time; infinite if no
        learning rate gets there.
    """
    others = [name for name in rows[0] if name not in (x, "lr", _SCHEDULE, *RESULTS)]
    told_apart = [name for name in others if len({row[name] for row in rows if row[_SCHEDULE] != ALONE}) > 1]
    lines: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        if row[_SCHEDULE] == ALONE:
            continue
        apart = ", ".join(f"{_SIGNS.get(name, name)} = {row[name]}" for name in told_apart)
        line = lines.setdefault((row[_SCHEDULE], apart), {})
        line[row[x]] = min(line.get(row[x], math.inf), row["seconds_to_error"])
    return lines


def draw(file: Path, x: str) -> Path:
    """Draw the figure of a sweep over a field x, which is a number, beside its CSV file; return the PNG file.

    Several schedules are compared in one system of axes for each setting; one schedule's settings are compared in one.
    """
    rows = read_rows(file)
    lines = {
        line: {value: seconds for value, seconds in sorted(times.items()) if math.isfinite(seconds)}
        for line, times in best_times(rows, x).items()
    }
    schedules = list(dict.fromkeys(schedule for schedule, _ in lines))
    settings = list(dict.fromkeys(apart for _, apart in lines))
    styles = _styles(schedules, settings)
    titles = settings if len(schedules) > 1 else [""]
    what, unit = _AXES.get(x, (x, _SIGNS.get(x, "")))
    alone = min(row["seconds_to_error"] for row in rows if row[_SCHEDULE] == ALONE)
    figure, systems = blank_figure(len(titles), f"Simulated time to error against {what}")
    known = [seconds for line in lines.values() for seconds in line.values()]
    known += [alone] if math.isfinite(alone) else []
    places = [value for line in lines.values() for value in line]
    for axes, title in zip(systems, titles, strict=True):
        for (schedule, apart), line in lines.items():
            if line and title in ("", apart):
                plot(axes, list(line), list(line.values()), styles[schedule, apart])
        if math.isfinite(alone):
            sgd = method_styles(["sgd"])["sgd"]
            axes.axhline(alone, label=sgd.label, **sgd.line)
        axes.set(title=title, xlabel=f"{what}, {unit}" if unit else what, ylabel="time to error, s (best η)")
        if known and places:
            axes.set_ylim(min(known) / 1.3, max(known) * 1.3)
            readable_log(axes.yaxis)
            if min(places) > 0:  # a latency may be none
                axes.set_xlim(min(places) / 1.3, max(places) * 1.3)
                readable_log(axes.xaxis)
    legend_below(figure)
    return save(figure, file.with_suffix(".png"))


def _styles(schedules: Sequence[str], settings: Sequence[str]) -> dict[tuple[str, str], LineStyle]:
    methods = method_styles(_METHODS.get(schedule, schedule) for schedule in schedules)
    if len(schedules) > 1 or len(settings) < 2:
        return {(schedule, apart): style for schedule, style in zip(schedules, methods.values(), strict=True)
                for apart in settings}  # fmt: skip
    return {(schedules[0], apart): style for apart, style in zip(settings, value_styles(settings), strict=True)}
