r"""Rules of the center beside each other on CIFAR-10 after equal steps: the paper's, local SGD, DiLoCo, their family.

    python examples/benchmarks/run.py outer_rules --data ~/data

Four workers with Nesterov momentum (easgd: without) train the small strided network, all stacked in one process, with
the package's own equations. For each schedule and period

1. a common list of members of the family (α, β, μ) is tried at one learning rate, and the best goes on as ``family``;
2. every method gets learning rates, by factors of two, until the best lies inside of what was tried;
3. it runs with these on new seeds.

1 and 2 look at 5000 images that are held out of the training set, with seed 0 alone; what is reported is the test error
of the seeds of 3. The bytes are those of an exchange, of which DDP has τ for one of the others: as an all-reduce, a
worker sends 2 (p − 1)/p of the parameters. Every run is in runs_SCHEDULE.csv, and one that is there is not made
again; several processes may each make a schedule in one directory.
"""

import argparse
import csv
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness.command import parser
from harness.figures import draw_curves
from harness.ratios import Row
from harness.results import print_table, write_results
from harness.stacked_gradients import StackedGradients, Way
from harness.stacked_images import StackedImages, read_cifar10, synthetic_images
from harness.stacked_rules import Member, train

from lightning_easgd.lab.models.convnets import StridedNet
from lightning_easgd.lab.simulation.sweep import read_rows

LOCAL_SGD = Member(1.0)
FAMILY = [
    Member(alpha, beta, momentum, nesterov)
    for alpha, beta, momentum, nesterov in (
        (0.9, 0.9, 0.3, False),
        (0.9, 0.9, 0.5, False),
        (0.9, 0.9, 0.7, False),
        (1.0, 1.0, 0.5, False),
        (0.7, 0.9, 0.5, False),
        (0.7, 0.9, 0.7, False),
        (0.5, 0.9, 0.0, False),
        (0.5, 0.9, 0.5, False),
        (1.0, 0.9, 0.5, True),
        (0.7, 0.9, 0.5, True),
        (0.7, 0.9, 0.7, True),
        (0.9, 0.9, 0.7, True),
        (0.5, 0.9, 0.7, True),
        (0.7, 1.2, 0.7, True),
    )
]
METHODS = {
    "ddp": Member(None),
    "local_sgd": LOCAL_SGD,
    "diloco": Member(1.0, 0.7, 0.9, outer_nesterov=True),
    "eamsgd": Member(0.225, 0.9, pull_to="old", exchanges_position=True),
    "easgd": Member(0.225, 0.9, pull_to="old", momentum=0.0),
}
START = {"easgd": 0.2}
RATE = 0.04  # where a search of rates begins, and what the members of the family are tried at
READINGS = 8
HELD_OUT = 5000
READ = ("steps", "validation_error", "test_error")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py")
    options.add_argument("--dry", action="store_true", help="try the code: few steps, invented data if none given")
    options.add_argument("--schedules", nargs="+", choices=["cosine", "constant"], default=["cosine", "constant"])
    options.add_argument("--tau", type=int, nargs="+", default=[64, 4, 16])
    options.add_argument("--methods", nargs="+", choices=[*METHODS, "family"], default=[*METHODS, "family"])
    options.add_argument("--workers", type=int, default=4)
    options.add_argument("--steps", type=int, default=2048)
    options.add_argument("--batch-size", type=int, default=32, help="of each worker (%(default)s)")
    options.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of what is reported (%(default)s)")
    default = Path("outputs", "benchmarks", "outer_rules")
    options.add_argument("--output", type=Path, default=default, help="results directory (%(default)s)")
    chosen = options.parse_args(arguments)
    if chosen.dry:
        chosen.steps, chosen.batch_size, chosen.tau, chosen.workers, chosen.seeds = 8, 2, [4], 2, [1]
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, run and write the tables."""
    options = _options(arguments)
    if options.data is None and not options.dry:
        print("outer_rules: give --data, the folder that holds cifar-10-batches-py; nothing was measured")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    for schedule in options.schedules:
        runs = Runs(options, schedule)
        for tau in options.tau:
            _report(runs, tau, options.methods)
    write_tables(options)


def _report(runs: "Runs", tau: int, methods: Iterable[str]) -> None:
    members = {name: METHODS[name] for name in methods if name in METHODS}
    if "family" in methods:
        members["family"] = min(FAMILY, key=lambda member: runs.error("try", member, tau, RATE))
    for name, member in members.items():
        period = 1 if member.alpha is None else tau
        lr = runs.best_rate(name, member, period)
        for seed in runs.seeds:
            runs.error(name, member, period, lr, seed)


class Runs:
    """The runs of a schedule; what has been run is looked up.

    Args:
        options: Of the command.
        schedule: Of the learning rate.

    Attributes:
        seeds: Of what is reported.
    """

    def __init__(self, options: argparse.Namespace, schedule: str) -> None:
        self.seeds = options.seeds
        self._options, self._schedule = options, schedule
        self._file = options.output / f"runs_{schedule}.csv"
        self._done = {_key(row): row for row in read_rows(self._file)} if self._file.exists() else {}
        train, test = synthetic_images(64) if options.data is None else read_cifar10(options.data)
        order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0)).numpy()
        held = order[: min(HELD_OUT, len(order) // 4)]
        kept = order[len(held) :]
        self._train = train[0][kept], train[1][kept]
        self._sets = {"validation_error": (train[0][held], train[1][held]), "test_error": test}

    def best_rate(self, name: str, member: Member, tau: int) -> float:
        """The learning rate of the least validation error, with a worse one on either side of it."""
        start = START.get(name, RATE)
        errors = {lr: self.error(name, member, tau, lr) for lr in (start / 2, start, 2 * start)}
        while True:
            best = min(errors, key=lambda lr: errors[lr])
            if min(errors) < best < max(errors):
                return best
            beyond = best / 2 if best == min(errors) else best * 2
            errors[beyond] = self.error(name, member, tau, beyond)

    def error(self, name: str, member: Member, tau: int, lr: float, seed: int = 0) -> float:
        """The validation error at the end of a run, which is made unless it has been."""
        row: Row = {"method": name, "tau": tau, "schedule": self._schedule, "lr": lr, "seed": seed, **vars(member)}
        key = _key({column: "" if value is None else value for column, value in row.items()})
        if key not in self._done:
            readings = [row | reading for reading in self._run(member, tau, lr, seed)]
            self._write(readings)  # of a whole run, or nothing
            self._done[key] = readings[-1]
        return float(self._done[key]["validation_error"])

    def _run(self, member: Member, tau: int, lr: float, seed: int) -> Iterable[dict[str, Any]]:
        options, device = self._options, torch.device("cpu")
        torch.manual_seed(seed)
        gradients = StackedGradients(StridedNet(), Way("grouped", "float32", 8))
        images = [
            StackedImages(
                self._train, kept, workers=options.workers, batch_size=options.batch_size, device=device, seed=seed
            )
            for kept in self._sets.values()
        ]
        every = max(1, options.steps // (READINGS if seed else 1))  # of a search the end alone
        started = time.process_time()
        for step, center in train(
            member, gradients, images[0], workers=options.workers, tau=tau, lr=lr, schedule=self._schedule,
            steps=options.steps, read_at=lambda step: step % every == 0,
        ):  # fmt: skip
            errors = [float(gradients.error(center, *each.test)) for each in images]
            yield dict(zip(READ, (step, *(round(each, 5) for each in errors)), strict=True))
        print(
            f"{self._schedule} tau={tau} lr={lr:g} seed={seed} {member}: {100 * errors[0]:.2f} %, "
            f"{time.process_time() - started:.0f} s",
            flush=True,
        )

    def _write(self, rows: Sequence[Row]) -> None:
        is_new = not self._file.exists()
        with self._file.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if is_new:
                writer.writeheader()
            writer.writerows(rows)


def _key(row: Row) -> tuple[str, ...]:
    """What tells runs from each other, the same whether it comes from a run or from its file."""
    return tuple(
        f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
        for column, value in row.items()
        if column not in READ
    )


def write_tables(options: argparse.Namespace) -> None:
    """Write what all runs in the directory have shown: the result of each method, and what was tried for it."""
    rows = [row for file in sorted(options.output.glob("runs_*.csv")) for row in read_rows(file)]
    last = max(row["steps"] for row in rows)
    ends = [row for row in rows if row["steps"] == last]
    parameters = sum(parameter.numel() for parameter in StridedNet().parameters())
    results = []
    for (schedule, tau, name), runs in _grouped(ends, "schedule", "tau", "method").items():
        final = [row["test_error"] for row in runs if row["seed"] != 0]
        if not final:
            continue
        chosen = next(row for row in runs if row["seed"] != 0)
        tried = sorted({row["lr"] for row in runs if row["seed"] == 0})
        exchanges = last if name == "ddp" else last // tau
        sent = exchanges * 2 * (options.workers - 1) / options.workers * 4 * parameters / 1e6
        results.append(
            {
                "schedule": schedule, "tau": tau, "method": name, "lr": chosen["lr"], "alpha": chosen["alpha"],
                "beta": chosen["beta"], "outer_momentum": chosen["outer_momentum"],
                "outer_nesterov": chosen["outer_nesterov"],
                "test_error": round(statistics.fmean(final), 4),
                "spread": round(statistics.stdev(final), 4) if len(final) > 1 else "", "seeds": len(final),
                "MB_sent": round(sent, 2), "rates_tried": " ".join(f"{lr:g}" for lr in tried),
            }
        )  # fmt: skip
    tried = [row for row in ends if row["method"] == "try"]
    print_table(results)
    write_results(options.output, {"results": results, "family": tried}, {**vars(options), "data": None})
    draw(options.output)


def draw(results: Path) -> None:
    """Draw the curves of the seeds that are reported, their means, from the table of all runs."""
    rows = [row for file in sorted(results.glob("runs_*.csv")) for row in read_rows(file) if row["seed"] != 0]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for schedule, tau in sorted({(row["schedule"], row["tau"]) for row in rows if row["method"] != "ddp"}):
        own = [row for row in rows if row["schedule"] == schedule and (row["tau"] == tau or row["method"] == "ddp")]
        panels[f"{schedule}, τ = {tau}"] = {
            name: [
                (step, statistics.fmean(row["test_error"] for row in at))
                for (step,), at in _grouped(of, "steps").items()
            ]
            for (name,), of in _grouped(own, "method").items()
        }
    draw_curves(
        results / "figure.png", panels, "Test error after equal steps", across="training of a worker", unit="steps"
    )


def _grouped(rows: Iterable[Row], *columns: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


if __name__ == "__main__":
    main()
