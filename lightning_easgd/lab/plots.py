"""The figure of a run, drawn from its CSV files only: `python -m lightning_easgd.plots RUN_DIRECTORY`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_easgd import __version__
from lightning_easgd.callbacks import ACCURACY_FILE, ELASTIC_DIRECTORY
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.figure_style import (
    CENTER_STYLE,
    MODEL_STYLE,
    WORKER_STYLE,
    blank_figure,
    legend_below,
    percent,
    plot,
    save,
)
from lightning_easgd.lab.report import CENTER, is_elastic, whole_rows
from lightning_easgd.lab.unexpected import unexpected

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE_FILE = "figure.png"
_COMMAND = "python -m lightning_easgd.plots"
_USAGE = f"usage: {_COMMAND} RUN_DIRECTORY"
_HELP = f"""{_USAGE}

It draws the figure of a run again, from the CSV files in its directory.

Examples:
  {_COMMAND} outputs/2026-01-31/12-00-00-1a2b
  {_COMMAND} examples/results/digits
  {_COMMAND} --version"""
_STEPS = "optimizer steps of a worker"
_THIN: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.7}

Rows = list[dict[str, str]]


def draw(run: Path) -> Path | None:
    """Draw validation accuracy of center and workers, and the elastic distance, over the steps.

    Returns:
        The PNG file; None if there is nothing to draw.
    """
    scores = [row for row in whole_rows(run, ACCURACY_FILE) if row["stage"] == "val"]
    distances = _distances(run)
    panels: list[Callable[[Axes], None]] = []
    if scores:
        panels.append(lambda axes: _draw_accuracy(axes, scores, elastic=is_elastic(run)))
    if distances:
        panels.append(lambda axes: _draw_distances(axes, distances))
    if not panels:
        return None
    compared = "The center and the workers" if is_elastic(run) else "The model"
    figure, systems = blank_figure(len(panels), f"{compared} during training")
    for axes, panel in zip(systems, panels, strict=True):
        panel(axes)
        axes.set_xlabel(_STEPS)
    legend_below(figure)
    return save(figure, run / FIGURE_FILE)


def _distances(run: Path) -> list[Rows]:
    """Of each worker its rows with a distance; of workers that have some."""
    files = sorted((run / ELASTIC_DIRECTORY).glob("rank_*.csv"), key=lambda path: int(path.stem[5:]))
    found = [[row for row in whole_rows(run, f"{ELASTIC_DIRECTORY}/{path.name}") if row["distance"]] for path in files]
    return [rows for rows in found if rows]


def _draw_accuracy(axes: "Axes", rows: Rows, *, elastic: bool) -> None:
    curves = {weights: [row for row in rows if row["weights"] == weights] for weights in _weights(rows)}
    center = _points(curves.pop(CENTER, []), "accuracy")
    for own in curves.values():
        worker = _points(own, "accuracy")
        if elastic or worker != center:  # DDP: every rank has the same model
            plot(axes, worker[0], percent(worker[1]), WORKER_STYLE, **_THIN)
    if center[0]:
        plot(axes, center[0], percent(center[1]), CENTER_STYLE if elastic else MODEL_STYLE, linewidth=2.2, zorder=3)
    axes.set(title="accuracy on held-out data", ylabel="validation accuracy, %")


def _weights(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["weights"] for row in rows))


def _draw_distances(axes: "Axes", workers: list[Rows]) -> None:
    for rows in workers:
        steps, values = _points(rows, "distance")
        plot(axes, steps, values, WORKER_STYLE, **_THIN)
    axes.set(title="how far the workers are from it", ylabel="elastic distance ‖xᵢ − x̃‖")
    axes.set_ylim(bottom=0)


def _points(rows: Rows, column: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[column]) for row in rows]


def main() -> None:
    """Draw the figure of the run whose directory the command line names."""
    words = sys.argv[1:]
    if "--version" in words:
        print(f"{_COMMAND} {__version__}")
        return
    if not {"-h", "--help"}.isdisjoint(words):
        print(_HELP)
        return
    if len(words) != 1 or not Path(words[0]).is_dir():
        sys.exit(f"{_USAGE}, where that is the directory of a run")
    run = Path(words[0])
    try:
        figure = draw(run)
    except MissingExtraError as error:
        sys.exit(f"plots: {error}")
    except Exception as error:
        sys.exit(unexpected("plots", error))
    if figure is None:
        sys.exit(f"there is nothing to draw: {run} has no {ACCURACY_FILE} and no {ELASTIC_DIRECTORY}")
    print(figure)


if __name__ == "__main__":
    main()
