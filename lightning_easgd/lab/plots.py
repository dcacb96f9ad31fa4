"""The figure of a run, drawn from its CSV files only: `python -m lightning_easgd.plots RUN_DIRECTORY`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_easgd.callbacks import ACCURACY_FILE, ELASTIC_DIRECTORY
from lightning_easgd.lab.demo_extra import blank_figure
from lightning_easgd.lab.report import CENTER, is_elastic, whole_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_FILE = "figure.png"


def draw(run: Path) -> Path:
    """Draw validation accuracy of center and workers, and the elastic distance, over the steps; return the PNG file."""
    figure, (accuracy, distance) = blank_figure((5, 4), 2)
    _draw_accuracy(accuracy, run)
    _draw_distance(distance, run)
    path = run / FIGURE_FILE
    figure.savefig(path, dpi=150)
    return path


def _draw_accuracy(axes: "Axes", run: Path) -> None:
    rows = [row for row in whole_rows(run, ACCURACY_FILE) if row["stage"] == "val"]
    for weights in dict.fromkeys(row["weights"] for row in rows):
        if weights == CENTER:
            style = {"label": "center" if is_elastic(run) else "model", "color": "black", "linewidth": 2, "zorder": 3}
        else:
            style = {"label": weights.replace("_", " "), "linewidth": 1}
        _plot(axes, [row for row in rows if row["weights"] == weights], "accuracy", style)
    axes.set(xlabel="steps of a worker", ylabel="validation accuracy")
    if rows:
        axes.legend()


def _draw_distance(axes: "Axes", run: Path) -> None:
    files = sorted((run / ELASTIC_DIRECTORY).glob("rank_*.csv"), key=lambda path: int(path.stem[5:]))
    for path in files:
        style = {"label": f"worker {path.stem[5:]}", "linewidth": 1}
        _plot(
            axes,
            [row for row in whole_rows(run, f"{ELASTIC_DIRECTORY}/{path.name}") if row["distance"]],
            "distance",
            style,
        )
    axes.set(xlabel="steps of a worker", ylabel="elastic distance")
    if files:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no elastic averaging in this run", ha="center", transform=axes.transAxes)


def _plot(axes: "Axes", rows: list[dict[str, str]], column: str, style: dict[str, Any]) -> None:
    axes.plot([int(row["step"]) for row in rows], [float(row[column]) for row in rows], **style)


def main() -> None:
    """Draw the figure of the run whose directory the command line names."""
    words = sys.argv[1:]
    if len(words) != 1 or not Path(words[0]).is_dir():
        sys.exit("usage: python -m lightning_easgd.plots RUN_DIRECTORY, where that is the directory of a run")
    print(draw(Path(words[0])))


if __name__ == "__main__":
    main()
