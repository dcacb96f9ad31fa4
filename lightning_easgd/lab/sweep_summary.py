"""What a sweep (`-m`) ends with: one table and one figure of all its jobs."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_easgd.callbacks import ACCURACY_FILE, TIME_FILE
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.figure_style import (
    METHODS,
    blank_figure,
    fit_to_most,
    legend_below,
    method_styles,
    percent,
    plot,
    save,
)
from lightning_easgd.lab.report import CENTER, last_accuracy, of_each_worker, read_rows, whole_rows

__all__ = ["SweepSummary"]

_TABLE, _FIGURE = "sweep.csv", "sweep.png"
_MANY = 10  # curves in one system of axes
_LEFT_OUT = ("hydra.", "+hydra.", "paths.")

Row = dict[str, str]


class SweepSummary(Callback):
    """Hydra's callback that gathers the jobs of a sweep: a table and a figure in the sweep's directory.

    Both are written after each job, so that a sweep that is interrupted has them, too.
    """

    def __init__(self) -> None:
        self._settings: list[dict[str, str]] = []
        self._runs: list[Path] = []
        self._failed: list[bool] = []
        self._directory = Path()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Add a job."""
        if config.hydra.mode != RunMode.MULTIRUN or job_return.cfg is None:
            return
        words = [word.lstrip("+") for word in job_return.overrides or () if not word.startswith(_LEFT_OUT)]
        settings = {key: value for key, _, value in (word.partition("=") for word in words)}
        place = job_return.cfg.get("directory") or job_return.cfg.paths.run
        self._settings.append(settings)
        self._runs.append(Path(place))
        self._failed.append(job_return.status != JobStatus.COMPLETED)
        self._directory = Path(config.hydra.sweep.dir)
        self._write(draw=job_return.cfg.get("plot", True))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Print the table; a sweep without a job is an error."""
        if not self._runs:
            sys.exit("--multirun: this sweep has no jobs; give values, as seed=0,1")
        rows = read_rows(self._directory / _TABLE)
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
        for row in ({name: name for name in widths}, *rows):
            print("  " + "  ".join(f"{row[name]:<{width}}" for name, width in widths.items()).rstrip())
        for name in (_TABLE, _FIGURE):
            if (self._directory / name).exists():
                print(f"  {self._directory / name}")

    def _write(self, draw: bool) -> None:
        labels = self._labels()
        found = [row for label, run in zip(labels, self._runs, strict=True) for row in _rows(label, run)]
        with (self._directory / _TABLE).open("w", newline="", encoding="utf-8") as file:
            names = list(dict.fromkeys(name for row in found for name in row))
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(found)
        if not draw:
            return
        try:
            _draw(self._directory / _FIGURE, labels, self._runs)
        except MissingExtraError as error:
            print(f"  no figure: {error}")

    def _labels(self) -> list[Row]:
        """Of each job the settings in which the jobs differ, and whether it has failed."""
        names = list(dict.fromkeys(name for settings in self._settings for name in settings))
        varied = [name for name in names if len({settings.get(name) for settings in self._settings}) > 1] or names
        return [
            {name: _short(settings.get(name, "")) for name in varied} | ({"state": "failed"} if failed else {})
            for settings, failed in zip(self._settings, self._failed, strict=True)
        ]


def _short(value: str) -> str:
    """A number that a search has drawn, with as many digits as one reads."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value


def _rows(label: Row, run: Path) -> list[Row]:
    """The results of a job: of a run one row, of a comparison one for each method."""
    chosen = _chosen(run)
    if chosen:
        return [
            label
            | {"method": row["label"], "tau": row["tau"], "workers": row["workers"]}
            | {"test error": f"{float(row['test_error']):.2%}"}
            for row in chosen
        ]
    scores = {stage: last_accuracy(run, stage).get(CENTER) for stage in ("val", "test")}
    row = {f"{stage} accuracy": f"{score:.2%}" for stage, score in scores.items() if score is not None}
    seconds = [float(each["total"]) for each in read_rows(run / TIME_FILE)]
    if seconds:
        row["seconds"] = f"{fmean(seconds):.2f}"
    sent = of_each_worker(run, "bytes_sent")
    if sent is not None:
        row["MB sent"] = f"{sent / 1e6:.2f}"
    return [label | row]


def _chosen(run: Path) -> list[Row]:
    """Of a comparison the settings with the chosen learning rates; of a run nothing."""
    return [row for row in read_rows(run / "selection.csv") if row["chosen"] == "yes"]


def _draw(path: Path, labels: Sequence[Row], runs: Sequence[Path]) -> None:
    """Draw the validation errors of all jobs over their steps; of many jobs the last ones over each setting."""
    curves = [
        [row for row in whole_rows(run, ACCURACY_FILE) if (row["stage"], row["weights"]) == ("val", CENTER)]
        for run in runs
    ]
    comparisons = [_chosen(run) for run in runs]
    if any(comparisons):
        _draw_comparisons(path, [_name(label) for label in labels], comparisons)
        return
    jobs = [(label, rows) for label, rows in zip(labels, curves, strict=True) if rows]
    if len(jobs) > _MANY:
        _draw_ends(path, jobs)
    elif jobs:
        _draw_curves(path, jobs)


def _draw_curves(path: Path, jobs: Sequence[tuple[Row, Sequence[Row]]]) -> None:
    figure, systems = blank_figure(1, "Validation error of the jobs")
    styles = method_styles(_name(label) for label, _ in jobs)
    for label, rows in jobs:
        errors = percent(1 - float(row["accuracy"]) for row in rows)
        plot(systems[0], [int(row["step"]) for row in rows], errors, styles[_name(label)])
    systems[0].set(xlabel="training of a worker, steps", ylabel="validation error, %")
    fit_to_most(systems, "steps", "%")
    legend_below(figure)
    save(figure, path)


def _draw_comparisons(path: Path, names: Sequence[str], comparisons: Sequence[Sequence[Row]]) -> None:
    """Draw the last test error of each method in each comparison."""
    styles = method_styles(row["label"] for rows in comparisons for row in rows)
    figure, (axes,) = blank_figure(1, "Test error of the comparisons")
    for method, style in styles.items():
        points = [
            (number, 100 * float(row["test_error"]))
            for number, rows in enumerate(comparisons)
            for row in rows
            if row["label"] == method
        ]
        x, errors = zip(*points, strict=True)
        plot(axes, x, errors, style, linestyle="none", markevery=1)
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    axes.set(xlim=(-0.5, len(names) - 0.5), ylabel="test error, %")
    legend_below(figure)
    save(figure, path)


def _name(label: Mapping[str, str]) -> str:
    """A job's name: a method's own where nothing else is varied."""
    (key, value), *others = label.items() or [("", "job")]
    if not others and key in ("strategy", "method") and value in METHODS:
        return value
    return ", ".join(f"{key.rpartition('.')[2]} = {value}" for key, value in label.items())


def _draw_ends(path: Path, jobs: Sequence[tuple[Row, Sequence[Row]]]) -> None:
    names = list(dict.fromkeys(name for label, _ in jobs for name in label if name != "state"))
    errors = percent(1 - float(rows[-1]["accuracy"]) for _, rows in jobs)
    figure, systems = blank_figure(len(names), f"Last validation error of {len(jobs)} jobs")
    style = METHODS["easgd"]
    for axes, name in zip(systems, names, strict=True):
        values = [label.get(name, "") for label, _ in jobs]
        words = sorted(set(values))
        try:
            x = [float(value) for value in values]
        except ValueError:
            x = [float(words.index(value)) for value in values]
            axes.set_xticks(range(len(words)), words)
        plot(axes, x, errors, style, label="_", linestyle="none", markevery=1)
        axes.set(xlabel=name, ylabel="validation error, %")
    save(figure, path)
