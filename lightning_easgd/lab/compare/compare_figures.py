"""The figures of a comparison, drawn from its CSV files only."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_easgd.lab.compare.curves import EnergyCurve, MeanCurve, Panel, energy_curves, mean_curves, panels
from lightning_easgd.lab.compare.records import TIMES
from lightning_easgd.lab.demo_extra import blank_figure
from lightning_easgd.lab.report import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_AXES = {
    "seconds": ("error_by_seconds.png", "seconds of training"),
    "epochs": ("error_by_epochs.png", "epochs, of all workers together"),
    "bytes_sent": ("error_by_bytes.png", "megabytes sent by a worker"),
}
_TIMES_FIGURE = "time_to_error.png"
_ENERGIES_FIGURE = "local_energy.png"
_MANY_COLORS = (
    "black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray",
    "tab:olive", "tab:cyan", "navy", "gold", "lime", "darkred", "indigo", "sienna", "hotpink", "teal", "silver",
)  # fmt: skip
_INCHES = (4.6, 3.6)


def draw(directory: Path) -> list[Path]:
    """Draw test error against its costs, the time to each target error, and local energies; return the PNG files."""
    curves = mean_curves(directory)
    if not curves:
        return []
    colors = _colors([curve.label for curve in curves])
    files = [_draw_errors(directory, curves, cost, colors) for cost in _AXES]
    times = read_rows(directory / TIMES)
    if times:
        files.append(_draw_times(directory, times, colors))
    energies = energy_curves(directory)
    if energies:
        files.append(_draw_energies(directory, energies, colors))
    return files


def _draw_errors(directory: Path, curves: Sequence[MeanCurve], cost: str, colors: dict[str, str]) -> Path:
    name, xlabel = _AXES[cost]
    every = panels([curve.panel_tau for curve in curves], [curve.panel_workers for curve in curves])
    figure, systems = blank_figure(_INCHES, len(every))
    for axes, panel in zip(systems, every, strict=True):
        for curve in curves:
            if panel.holds(curve.panel_tau, curve.panel_workers):
                _draw_curve(axes, curve, cost, colors)
        axes.set(title=panel.title, xlabel=xlabel, ylabel="test error")
        if cost == "bytes_sent":
            axes.set_xscale("log")
        if axes.lines:
            axes.legend(fontsize="small")
    return _save(figure, directory / name)


def _draw_curve(axes: "Axes", curve: MeanCurve, cost: str, colors: dict[str, str]) -> None:
    x = curve.costs[cost]
    if cost == "bytes_sent":
        x = x / 1e6
        if not x.any():  # a method that sends nothing has no place on this axis
            return
    (line,) = axes.plot(x, curve.error, label=curve.label, color=colors[curve.label])
    axes.fill_between(x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0)


def _draw_times(directory: Path, times: Sequence[dict[str, str]], colors: dict[str, str]) -> Path:
    """Seconds to a target error, one system of axes per target, over the grid's periods or numbers of workers."""
    targets = sorted({row["target_error"] for row in times}, key=float, reverse=True)
    every = panels([row["panel_tau"] for row in times], [row["panel_workers"] for row in times])
    figure, systems = blank_figure(_INCHES, len(targets))
    for axes, target in zip(systems, targets, strict=True):
        for label in dict.fromkeys(row["label"] for row in times):
            rows = [row for row in times if (row["label"], row["target_error"]) == (label, target) and row["seconds"]]
            points = [(at, float(row["seconds"])) for at, panel in enumerate(every) for row in _of(panel, rows)]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o", color=colors[label])
        axes.set(title=f"test error {float(target):.4g}", ylabel="seconds of training", yscale="log")
        axes.set_xticks(range(len(every)), [panel.title for panel in every])
        if axes.lines:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "reached by no method", ha="center", transform=axes.transAxes)
    return _save(figure, directory / _TIMES_FIGURE)


def _draw_energies(directory: Path, curves: Sequence[EnergyCurve], colors: dict[str, str]) -> Path:
    """Increase of the training error over the noise, from none at σ = 0: mean of the seeds, and smallest to largest."""
    every = panels([curve.panel_tau for curve in curves], [curve.panel_workers for curve in curves])
    figure, systems = blank_figure(_INCHES, len(every))
    for axes, panel in zip(systems, every, strict=True):
        for curve in curves:
            if not panel.holds(curve.panel_tau, curve.panel_workers):
                continue
            sigmas, (mean, low, high) = [0.0, *curve.sigmas], curve.summary
            color, of_workers = colors[curve.label], curve.weights == "workers"
            label, style = (None, ":") if of_workers else (curve.label, "-")
            axes.plot(sigmas, [0.0, *mean], label=label, color=color, linestyle=style)
            if not of_workers:
                axes.fill_between(sigmas, [0.0, *low], [0.0, *high], color=color, alpha=0.15, linewidth=0)
        if any(curve.weights == "workers" for curve in curves):
            axes.plot([], label="mean of the workers", color="gray", linestyle=":")
        axes.set(title=panel.title, xlabel="σ, relative noise of the weights", ylabel="increase of the training error")
        axes.legend(fontsize="small")
    return _save(figure, directory / _ENERGIES_FIGURE)


def _of(panel: Panel, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if panel.holds(row["panel_tau"], row["panel_workers"])]


def _colors(labels: Sequence[str]) -> dict[str, str]:
    """The same color for a method in every panel and figure."""
    names = list(dict.fromkeys(labels))
    # Matplotlib's cycle has ten colors, which more methods would share.
    if len(names) <= 10:
        return {label: f"C{index}" for index, label in enumerate(names)}
    return {label: _MANY_COLORS[index % len(_MANY_COLORS)] for index, label in enumerate(names)}


def _save(figure: "Figure", path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path
