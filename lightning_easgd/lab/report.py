"""The table that ends a run, made from the CSV files and the configuration in its directory."""

import csv
import math
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from omegaconf import OmegaConf

from lightning_easgd.callbacks import ACCURACY_FILE, COMMUNICATION_FILE, TIME_FILE

CENTER = "center"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
EARLIER = "earlier"  # what a resumed run keeps of those before it: a folder by the step at which each was left
_WORKER = "worker_"
_AS_GUESSING = 1.5  # times the accuracy of guessing
_FAR_FROM_GUESSING = 10  # times the loss of guessing
# By strategy: what happens inside a batch. Nobody can tell from outside how long DDP waits there.
_IN_A_BATCH = {
    "builtins.str": "compute",
    "lightning_easgd.LocalStrategy": "compute",
    "lightning.pytorch.strategies.DDPStrategy": "compute and all-reduce",
}


class _Line(NamedTuple):
    label: str
    value: str
    note: str = ""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header; a file that was not written has no rows.

    Raises:
        ValueError: If it holds bytes that are no text.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: this is no text (utf-8): {error.reason} at byte {error.start}") from error


def whole_rows(run: Path, name: str) -> list[dict[str, str]]:
    """Read a CSV file of a run, after the rows of the runs that it has gone on from."""
    legs = sorted((run / EARLIER).glob("[0-9]*"), key=lambda leg: int(leg.name))
    return [row for folder in (*legs, run) for row in read_rows(folder / name)]


def last_accuracy(run: Path, stage: str) -> dict[str, float]:
    """Return the last accuracy of each weights on the set "val" or "test", the center's first."""
    return {row["weights"]: float(row["accuracy"]) for row in read_rows(run / ACCURACY_FILE) if row["stage"] == stage}


def divergence(loss: float | None, accuracy: float | None, classes: int | None) -> str | None:
    """Say how a training has diverged, None if it has not.

    Args:
        loss: The last loss that is known.
        accuracy: The last accuracy.
        classes: Number of classes, whose reciprocal is the accuracy of guessing.
    """
    if loss is not None and not math.isfinite(loss):
        return f"the loss is not finite ({loss})"
    if loss is None or accuracy is None or not classes:
        return None
    # A network that has hardly been trained may be a few times worse than a guess, and is right as often.
    if accuracy <= _AS_GUESSING / classes and loss > _FAR_FROM_GUESSING * math.log(classes):
        return f"the loss is {loss:.3g}, that of guessing {math.log(classes):.3g}; accuracy {accuracy:.2%}"
    return None


def render(run: Path, diverged: str | None = None) -> str:
    """Format accuracy, time and traffic of a finished run, and how it has diverged if it has."""
    lines = [*_accuracy_lines(run), *_time_lines(run), *_traffic_lines(run)]
    if diverged:
        lines.insert(0, _Line("DIVERGED", "", diverged))
    if not lines:
        return f"  nothing to report: callbacks=default writes the CSV files that {run} lacks"
    width = max(len(line.label) for line in lines)
    return "\n".join(f"  {line.label:<{width}} {line.value:>10}  {line.note}".rstrip() for line in lines)


def is_elastic(run: Path) -> bool:
    """Say whether the run had a center; without one, rank 0's model takes its place in `accuracy.csv`."""
    return (run / COMMUNICATION_FILE).exists()


def of_each_worker(run: Path, column: str) -> float | None:
    """Return the mean of the workers of a count of communication, which the ranks of one add to; None of no record."""
    rows = read_rows(run / COMMUNICATION_FILE)
    # Records of before workers could be of several ranks do not name them.
    workers = {row.get("worker", row["rank"]) for row in rows}
    return sum(float(row[column]) for row in rows) / len(workers) if rows else None


def _strategy(run: Path) -> str:
    path = run / CONFIG_FILE
    return str(OmegaConf.select(OmegaConf.load(path), "strategy._target_")) if path.exists() else ""


def _accuracy_lines(run: Path) -> list[_Line]:
    lines: list[_Line] = []
    scores = last_accuracy(run, "test")
    if not is_elastic(run) and len(set(scores.values())) == 1:  # DDP: every rank has the same model
        scores = {CENTER: scores[CENTER]}
    for weights, value in scores.items():
        if weights == CENTER:
            name = "at the center" if is_elastic(run) else "of the model"
        else:
            name = f"of worker {weights.removeprefix(_WORKER)}"
        lines.append(_Line(f"test accuracy {name}", f"{value:.2%}"))
    return lines


def _time_lines(run: Path) -> list[_Line]:
    mean = _means(run / TIME_FILE)
    if not mean:
        return []
    total = mean.pop("total")
    labels = {"rest": "validation, checkpoints"}
    if not is_elastic(run):
        del mean["communication"]
        labels["compute"] = _IN_A_BATCH.get(_strategy(run), "compute and communication")
    shares = [
        _Line(f"  {labels.get(name, name)}", f"{value:.1f} s", f"{value / max(total, 1e-9):.1%}")
        for name, value in mean.items()
    ]
    return [_Line("training time (mean of the workers)", f"{total:.1f} s"), *shares]


def _traffic_lines(run: Path) -> list[_Line]:
    mean = _means(run / COMMUNICATION_FILE)
    sent, ddp = (of_each_worker(run, column) for column in ("bytes_sent", "ddp_bytes"))
    if sent is None or ddp is None:
        return []
    share = f", {sent / ddp:.1%} of it" if ddp else ""
    return [
        _Line("exchanges", f"{mean['exchanges']:.0f}", f"in {mean['steps']:.0f} steps of each worker"),
        _Line("bytes sent by each worker", f"{sent / 1e6:.2f} MB", f"DDP: {ddp / 1e6:.2f} MB{share}"),
    ]


def _means(path: Path) -> dict[str, float]:
    """The mean over the ranks of each column."""
    rows = read_rows(path)
    names = [name for name in (rows[0] if rows else ()) if name not in ("rank", "worker")]
    return {name: fmean(float(row[name]) for row in rows) for name in names}
