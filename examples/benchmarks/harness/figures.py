"""Step time relative to local training, a line for each method, and test errors as curves."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.methods import LOCAL
from harness.ratios import Row
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.figure_style import (
    METHODS,
    LineStyle,
    blank_figure,
    fit_to_most,
    legend_below,
    method_styles,
    percent,
    plot,
    readable_log,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Panel", "draw_curves", "draw_ratios", "panels_of"]

_LOG_BEYOND = 6  # times local training


@dataclass(frozen=True)
class Panel:
    """One system of axes: the methods of one setting.

    Attributes:
        title: Its title.
        rows: What :func:`harness.ratios.ratios` returns for the setting, or the same read from a table.
    """

    title: str
    rows: Sequence[Row]


def panels_of(rows: Sequence[Row], columns: Sequence[str], title: Callable[[Row], str]) -> list[Panel]:
    """One panel for each setting: for the rows that agree in some columns."""
    settings: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(tuple(str(row[column]) for column in columns), []).append(row)
    return [Panel(title(own[0]), own) for own in settings.values()]


def draw_ratios(
    path: Path, panels: Sequence[Panel], title: str, *, what: str = "time of a step", methods: Sequence[str] = ()
) -> None:
    """Draw the ratios of each panel, each from 1 to where it is; without matplotlib say so, and draw nothing.

    Panels whose methods have several communication periods are drawn once for each.

    Args:
        path: The PNG file.
        panels: From left to right, at most two side by side.
        title: Above all of them.
        what: What the ratios are of.
        methods: Which are shown, from top to bottom; all unless given.
    """
    panels = [part for part in _by_period(panels) if part.rows]
    present = list(dict.fromkeys(row["method"] for panel in panels for row in panel.rows))
    order = methods or sorted(present, key=lambda name: list(METHODS).index(name) if name in METHODS else -1)
    shown = [method for method in order if method in present and method != LOCAL]
    styles = method_styles(shown)
    try:
        figure, systems = blank_figure(len(panels), title, (3.6 if len(panels) > 1 else 5.6, 1.1 + 0.235 * len(shown)))
    except MissingExtraError as error:
        print(f"skipped: the figure: {error}")
        return
    for number, (axes, panel) in enumerate(zip(systems, panels, strict=True)):
        rows = {row["method"]: row for row in panel.rows if row["method"] in styles}
        _fit(axes, [float(row[end]) for row in rows.values() for end in ("ratio_min", "ratio_max")])
        for place, method in enumerate(shown):
            if method in rows:
                _draw_ratio(axes, place, rows[method], styles[method])
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(_in_two_lines(panel.title), fontsize="medium")
        axes.set(xlabel=f"{what}, multiples of that\nwithout communication")
        axes.set_yticks(range(len(shown)), [styles[method].label for method in shown] if number % 2 == 0 else [])
        axes.set_ylim(len(shown) - 0.5, -0.5)  # the first on top
        axes.grid(visible=False, axis="y")
    save(figure, path)


def _in_two_lines(title: str) -> str:
    """A long title: before its last comma, and after it."""
    return title if len(title) <= 26 else ",\n".join(title.rsplit(", ", 1))


def _draw_ratio(axes: "Axes", place: int, row: Row, style: LineStyle) -> None:
    ratio, low, high = (float(row[name]) for name in ("ratio", "ratio_min", "ratio_max"))
    axes.hlines(place, min(ratio, 1.0), max(ratio, 1.0), color=style.color, linewidth=5, alpha=0.35)
    axes.errorbar(ratio, place, xerr=[[ratio - low], [high - ratio]], color=style.color, marker="o", markersize=5)
    text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
    axes.annotate(
        text, (max(high, 1.0), place), (6, 0), textcoords="offset points", va="center", fontsize="small"
    )  # fmt: skip


def _fit(axes: "Axes", ratios: Sequence[float]) -> None:
    """Limits with room for the numbers beside the longest line."""
    smallest, largest = min([1.0, *ratios]), max([1.0, *ratios])
    if largest > _LOG_BEYOND:
        axes.set_xlim(smallest / 1.15, largest * 2.2)
        readable_log(axes.xaxis)
    else:
        room = 0.3 * max(largest - smallest, 0.2)
        axes.set_xlim(smallest - 0.15 * room, max(largest, smallest + 0.2) + room)


def _by_period(panels: Sequence[Panel]) -> Iterator[Panel]:
    """Each panel once for each communication period, all panels of the first period first; labels without it."""
    periods = {id(panel): sorted({_period(row) for row in panel.rows} - {math.inf}) for panel in panels}
    every = sorted({period for own in periods.values() for period in own}) or [math.inf]
    for period in every:
        for panel in panels:
            own = periods[id(panel)]
            if period in own or (not own and period == every[0]):
                rows = [
                    {**row, "method": row["method"].partition(" tau=")[0]}
                    for row in panel.rows
                    if _period(row) in (period, math.inf)
                ]
                at = "" if period == math.inf or "τ" in panel.title else f", τ = {period:g}"
                yield Panel(panel.title + at, rows)


def _period(row: Row) -> float:
    tau: str = row["method"].partition(" tau=")[2]
    return float(tau) if tau else math.inf


Curves = Mapping[str, Sequence[tuple[float, float]]]


def draw_curves(
    path: Path,
    panels: Mapping[str, Curves],
    title: str,
    *,
    across: str = "training time",
    unit: str = "s",
    target: float | None = None,
) -> None:
    """Draw curves of the test error; without matplotlib say so, and draw nothing.

    Args:
        path: The PNG file.
        panels: For each title the points of each curve by its label; systems of axes from left to right.
        title: What is compared, above all of them.
        across: What the errors are drawn over.
        unit: Its unit.
        target: The error to reach, a line.
    """
    styles = method_styles(label for curves in panels.values() for label in curves)
    try:
        figure, systems = blank_figure(len(panels), title)
    except MissingExtraError as error:
        print(f"skipped: the figure: {error}")
        return
    for axes, (heading, curves) in zip(systems, panels.items(), strict=True):
        for label, points in curves.items():
            x, errors = zip(*points, strict=True)
            plot(axes, x, percent(errors), styles[label])
        axes.set(title=heading, xlabel=f"{across}, {unit}", ylabel="test error, %")
    fit_to_most(systems, unit, "%")
    if target is not None:
        for axes in systems:
            axes.axhline(100 * target, color="black", linewidth=0.8, linestyle="--", label=f"target: {target:.0%}")
    legend_below(figure)
    save(figure, path)
