"""The figure of a run, drawn from its CSV files only: `python -m lightning_easgd.plots RUN_DIRECTORY`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_easgd.callbacks import ELASTIC_DIRECTORY
from lightning_easgd.lab.demo_extra import blank_figure
from lightning_easgd.lab.report import CENTER, is_elastic, read_accuracy, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_FILE = "figure.png"


def draw(run: Path) -> Path:
    """Draw validation accuracy of center and workers, and the elastic distance, over the steps.

    Returns:
        The PNG file.
    """
    figure, (accuracy, distance) = blank_figure((5, 4), 2)
    _draw_accuracy(accuracy, run)
    _draw_distance(distance, run)
    path = run / FIGURE_FILE
    figure.savefig(path, dpi=150)
    return path


def _draw_accuracy(axes: "Axes", run: Path) -> None:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_accuracy(run):
        if row.stage == "val":
            curves.setdefault(row.weights, []).append((row.step, row.accuracy))
    for weights, points in curves.items():
        if weights == CENTER:
            label = "center" if is_elastic(run) else "model"
            axes.plot(*zip(*points, strict=True), label=label, color="black", linewidth=2, zorder=3)
        else:
            axes.plot(*zip(*points, strict=True), label=weights.replace("_", " "), linewidth=1)
    axes.set(xlabel="steps of a worker", ylabel="validation accuracy")
    if curves:
        axes.legend()


def _draw_distance(axes: "Axes", run: Path) -> None:
    files = sorted((run / ELASTIC_DIRECTORY).glob("rank_*.csv"), key=lambda path: int(path.stem[5:]))
    for path in files:
        rows = [row for row in read_rows(path) if row["distance"]]
        axes.plot(
            [int(row["step"]) for row in rows],
            [float(row["distance"]) for row in rows],
            label=f"worker {path.stem[5:]}",
            linewidth=1,
        )
    axes.set(xlabel="steps of a worker", ylabel="elastic distance")
    if files:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no elastic averaging in this run", ha="center", transform=axes.transAxes)


def main() -> None:
    """Draw the figure of the run whose directory the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lightning_easgd.plots RUN_DIRECTORY")
    print(draw(Path(sys.argv[1])))
