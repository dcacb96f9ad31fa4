"""The figures of a comparison, drawn from its CSV files only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_easgd.lab.compare.curves import EnergyCurve, MeanCurve, Panel, energy_curves, mean_curves, panels
from lightning_easgd.lab.compare.records import TIMES
from lightning_easgd.lab.figure_style import (
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
from lightning_easgd.lab.report import read_rows

if TYPE_CHECKING:
    pass

__all__ = ["draw"]

# By cost: the file, what it is, and its unit.
_COSTS = {
    "seconds": ("error_by_seconds.png", "training time", "s"),
    "epochs": ("error_by_epochs.png", "data seen by all workers together", "epochs"),
    "bytes_sent": ("error_by_bytes.png", "data sent by each worker", "MB"),
}
_TIMES_FIGURE = "time_to_error.png"
_ENERGIES_FIGURE = "local_energy.png"
_MANY_TIMES = 8  # beyond, the shortest times would be one point on an axis from zero

Styles = Mapping[str, LineStyle]


def draw(directory: Path) -> list[Path]:
    """Draw test error against its costs, the time to each target error, and local energies; return the PNG files.

    A figure in which there would be nothing to see is not drawn.
    """
    curves = mean_curves(directory)
    if not curves:
        return []
    styles = method_styles(curve.label for curve in curves)  # the same in all figures
    drawn = [_draw_errors(directory, curves, cost, styles) for cost in _COSTS]
    drawn.append(_draw_times(directory, [row for row in read_rows(directory / TIMES) if row["seconds"]], styles))
    drawn.append(_draw_energies(directory, energy_curves(directory), styles))
    return [path for path in drawn if path is not None]


def _draw_errors(directory: Path, curves: Sequence[MeanCurve], cost: str, styles: Styles) -> Path | None:
    name, what, unit = _COSTS[cost]
    # A method that sends nothing has no place on the axis of what is sent.
    curves = [curve for curve in curves if cost != "bytes_sent" or curve.costs[cost].any()]
    every = _panels_of(curves)
    if not every:
        return None
    figure, systems = blank_figure(len(every), f"Test error against {what}")
    for axes, panel in zip(systems, every, strict=True):
        for curve in curves:
            if panel.holds(curve.panel_tau, curve.panel_workers):
                x = curve.costs[cost] / (1e6 if cost == "bytes_sent" else 1)
                band = percent(curve.low), percent(curve.high)
                plot(axes, x, percent(curve.error), styles[curve.label], band)
        axes.set_title(_in_words(panel), fontsize="medium")
        axes.set(xlabel=f"{what}, {unit}", ylabel="test error, %")
        if cost == "bytes_sent":
            axes.set_xscale("log")
    fit_to_most(systems, unit, "%")
    legend_below(figure)
    return save(figure, directory / name)


def _draw_times(directory: Path, times: Sequence[dict[str, str]], styles: Styles) -> Path | None:
    """Seconds to a target error, one system of axes per target, over the grid's periods or numbers of workers."""
    targets = sorted({row["target_error"] for row in times}, key=float, reverse=True)
    if not targets:  # none is reached
        return None
    every = panels([row["panel_tau"] for row in times], [row["panel_workers"] for row in times])
    labels = list(dict.fromkeys(row["label"] for row in times))
    apart = 0.6 if len(every) == 1 else 0.12  # equal times do not hide each other
    figure, systems = blank_figure(len(targets), "Training time until all seeds reach a test error")
    for axes, target in zip(systems, targets, strict=True):
        for number, label in enumerate(labels):
            rows = [row for row in times if (row["label"], row["target_error"]) == (label, target)]
            beside = apart * (number - (len(labels) - 1) / 2) / len(labels)
            points = [(at + beside, float(row["seconds"])) for at, one in enumerate(every) for row in _of(one, rows)]
            if points:
                x, seconds = zip(*points, strict=True)
                plot(axes, x, seconds, styles[label])
        axes.set(title=f"to {100 * float(target):.4g} % test error", ylabel="training time, s")
        axes.set_xticks(range(len(every)), _told_apart(every))
        axes.set_xlim(-0.5, len(every) - 0.5)
        spent = [float(row["seconds"]) for row in times if row["target_error"] == target]
        if max(spent) > _MANY_TIMES * min(spent):
            readable_log(axes.yaxis)
        else:
            axes.set_ylim(0, 1.08 * max(spent))
    legend_below(figure)
    return save(figure, directory / _TIMES_FIGURE)


def _draw_energies(directory: Path, curves: Sequence[EnergyCurve], styles: Styles) -> Path | None:
    """Increase of the training error over the noise, from none at σ = 0: mean of the seeds, and smallest to largest."""
    every = _panels_of(curves)
    if not every:
        return None
    figure, systems = blank_figure(len(every), "Training error under noise on the weights")
    for axes, panel in zip(systems, every, strict=True):
        for curve in curves:
            if not panel.holds(curve.panel_tau, curve.panel_workers):
                continue
            sigmas, style = [0.0, *curve.sigmas], styles[curve.label]
            mean, *band = ([0.0, *percent(values)] for values in curve.summary)
            if curve.weights == "workers":
                plot(axes, sigmas, mean, style, label="_", linestyle=":", marker="", linewidth=1.2)
            else:
                plot(axes, sigmas, mean, style, (band[0], band[1]))
        axes.set_title(_in_words(panel), fontsize="medium")
        axes.set(xlabel="noise of the weights σ, relative", ylabel="increase of the error, % points")
    if any(curve.weights == "workers" for curve in curves):
        systems[0].plot([], label="mean of the workers", color="gray", linestyle=":")
    legend_below(figure)
    return save(figure, directory / _ENERGIES_FIGURE)


def _panels_of(curves: Sequence[MeanCurve] | Sequence[EnergyCurve]) -> list[Panel]:
    """The panels in which there is something; a curve that belongs into all fills none."""
    every = panels([curve.panel_tau for curve in curves], [curve.panel_workers for curve in curves])
    own = [curve for curve in curves if curve.panel_tau or curve.panel_workers] or curves
    return [panel for panel in every if any(panel.holds(curve.panel_tau, curve.panel_workers) for curve in own)]


def _in_words(panel: Panel) -> str:
    parts = (
        ("exchange every {} steps" if panel.tau != "1" else "exchange every step", panel.tau),
        ("{} workers", panel.workers),
    )
    return ", ".join(words.format(value) for words, value in parts if value)


def _told_apart(every: Sequence[Panel]) -> list[str]:
    """Short names: without what all have in common."""
    if len({panel.workers for panel in every}) == 1 and every[0].tau:
        return [f"τ = {panel.tau}" for panel in every]
    if len({panel.tau for panel in every}) == 1 and every[0].workers:
        return [f"p = {panel.workers}" for panel in every]
    return [panel.title.replace(", ", "\n") for panel in every]


def _of(panel: Panel, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if panel.holds(row["panel_tau"], row["panel_workers"])]
