"""Seconds to a test error on CIFAR-10 between nodes on a slow network.

    EASGD_DATA=~/data python examples/benchmarks/run.py time_to_accuracy --mbit 100

Every method trains the same small network (StridedNet, 89 834 parameters, mini-batches of 32) for the same seconds of
wall-clock with each learning rate of its grid, which has as many values for each method; the learning rate with the
smallest validation error is the method's own. DDP and post-local SGD use SGD with Nesterov momentum 0.9, EAMSGD the
same, EASGD plain SGD with learning rates ten times as large. The clock stands still during evaluations, which score the
center (post-local SGD: the workers' mean) on the validation and the test set; it takes over whole periods between them,
so that a time is known to the evaluation after it. One seed: this is a demonstration, not a comparison of accuracy.
"""

import argparse
import json
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from harness.command import add_options, parser
from harness.figures import draw_curves
from harness.methods import Method, methods
from harness.network import Link, NoNamespacesError, slow_network
from harness.ranks import Place, RanksError, Send, run_ranks
from harness.ratios import Row
from harness.results import print_table, write_results
from harness.turns import quiet_trainer

from lightning_easgd.lab.data import CIFAR10DataModule, DataError
from lightning_easgd.lab.models import Classifier, StridedNet
from lightning_easgd.lab.recorders import CURVE_FILE, LearningCurve
from lightning_easgd.lab.report import read_rows
from lightning_easgd.lab.simulation.sweep import read_rows as read_numbers

NAMES = ("ddp", "post_local_sgd", "easgd", "eamsgd")
MOMENTUM = 0.9
BATCH_SIZE = 32


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--root", default=os.environ.get("EASGD_DATA", "data"), help="of the data set (%(default)s)")
    options.add_argument("--mbit", type=float, default=100.0, help="rate of the network, Mbit/s (%(default)g)")
    options.add_argument("--delay-ms", type=float, default=0.0, help="its one-way delay, ms (%(default)g)")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--tau", type=int, default=10)
    options.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    options.add_argument("--lr", type=float, nargs="+", default=[0.02, 0.05], help="grid with momentum (%(default)s)")
    options.add_argument("--seconds", type=float, default=15.0, help="of training for each run (%(default)g)")
    options.add_argument("--target", type=float, default=0.45, help="test error to reach (%(default)g)")
    options.add_argument("--every", type=int, default=250, help="steps between evaluations (DDP: a fifth of it)")
    options.add_argument("--seed", type=int, default=0)
    add_options(options, "time_to_accuracy", rounds=1, timeout=900.0)
    return options.parse_args(arguments)


def _train(
    rank: int, place: Place, send: Send, method: Method, lr: float, seed: int, options: argparse.Namespace
) -> None:
    """Be one rank of one run; rank 0 sends its learning curve."""
    L.seed_everything(seed)
    data = CIFAR10DataModule(root=options.root, batch_size=BATCH_SIZE, seed=seed, verify=False)
    momentum = {} if method.name == "easgd" else {"momentum": MOMENTUM, "nesterov": True}
    optimizer = partial(torch.optim.SGD, lr=lr, **momentum)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            place,
            strategy=method.strategy(),
            callbacks=[*method.callbacks(place), LearningCurve(folder, max_seconds=options.seconds)],
            max_epochs=1000,
            use_distributed_sampler=False,
            val_check_interval=max(1, options.every // 5) if method.every_step else options.every,
            check_val_every_n_epoch=None,
            limit_val_batches=1,  # LearningCurve scores the whole sets itself
            num_sanity_val_steps=0,
        )
        trainer.fit(Classifier(StridedNet(data.image_shape, data.num_classes), optimizer), datamodule=data)
        if rank == 0:
            send([{name: float(value) for name, value in row.items()} for row in read_rows(Path(folder, CURVE_FILE))])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = _options(arguments)
    try:
        CIFAR10DataModule(root=options.root).prepare_data()
    except DataError as error:
        print(f"skipped: {error}")
        return
    curves: list[Row] = []
    try:
        with slow_network(options.ranks, Link(options.mbit, options.delay_ms)) as places:
            for method in methods(options.methods, [options.tau]):
                for lr in options.lr:
                    curves += _runs(places, method, 10 * lr if method.name == "easgd" else lr, options)
    except NoNamespacesError as error:
        print(f"skipped: {error}")
        return
    rows = _times(curves, options.target)
    write_results(options.output, {"time_to_accuracy": rows, "curves": curves}, vars(options))
    print_table(rows)
    draw(options.output)


def draw(results: Path) -> None:
    """Draw the figure of a results directory from its tables."""
    rows, curves = (read_numbers(results / f"{name}.csv") for name in ("time_to_accuracy", "curves"))
    options = json.loads((results / "setting.json").read_text(encoding="utf-8"))["options"]
    draw_curves(
        results / "figure.png",
        {
            f"CIFAR-10, {options['ranks']} nodes, {Link(options['mbit'], options['delay_ms']).name}": {
                method: [
                    (point["seconds"], point["test_error"])
                    for point in curves
                    if (point["method"], point["lr"], point["round"]) == (method, lr, 0)
                ]
                for method, lr in sorted({(row["method"], row["lr"]) for row in rows})
            }
        },
        "Test error against training time over a slow network",
        target=options["target"],
    )


def _runs(places: Sequence[Place], method: Method, lr: float, options: argparse.Namespace) -> list[Row]:
    """The learning curves of one method with one learning rate, one for each round with a seed of its own."""
    rows: list[Row] = []
    for number in range(options.rounds):
        setting = {"method": method.label, "lr": lr, "round": number}

        def receive(curve: list[dict[str, float]], setting: Row = setting) -> None:
            rows.extend(setting | point for point in curve)
            print(f"{setting['method']:<22} lr {lr:<6g} test error {curve[-1]['test_error']:.3f}", flush=True)

        try:
            run_ranks(
                _train, places, method, lr, options.seed + number, options, timeout=options.timeout, receive=receive
            )
        except RanksError as error:
            print(f"{method.label}, lr {lr:g}: {error}")
    return rows


def _times(curves: Sequence[Row], target: float) -> list[Row]:
    """One row for each method at its best learning rate: seconds to the target error, and the last error."""
    rows = []
    for method in dict.fromkeys(row["method"] for row in curves):
        lasts = [row for row, after in zip(curves, [*curves[1:], None], strict=True) if _ends(row, after, method)]
        grid = dict.fromkeys(row["lr"] for row in lasts)
        mean = {lr: torch.tensor([row["val_error"] for row in lasts if row["lr"] == lr]).mean().item() for lr in grid}
        best = min(grid, key=lambda lr: mean[lr])
        own = [row for row in curves if (row["method"], row["lr"]) == (method, best)]
        reached = [_first(own, number, target) for number in dict.fromkeys(row["round"] for row in own)]
        last = [row for row in lasts if row["lr"] == best]
        rows.append(
            {
                "method": method,
                "lr": best,
                "learning_rates_tried": len(grid),
                "seconds_to_target": _median(reached),
                "target": target,
                "last_test_error": round(_median([row["test_error"] for row in last]) or 1.0, 4),
                "steps": int(_median([row["step"] for row in last]) or 0),
                "MB_sent": round((_median([row["bytes_sent"] for row in last]) or 0.0) / 1e6, 1),
            }
        )
    return rows


def _ends(row: Row, after: Row | None, method: str) -> bool:
    """Whether a point is the last of its curve, and the method's."""
    curve = ("method", "lr", "round")
    return row["method"] == method and (after is None or any(row[name] != after[name] for name in curve))


def _first(curve: Sequence[Row], number: int, target: float) -> float | None:
    return next((row["seconds"] for row in curve if row["round"] == number and row["test_error"] <= target), None)


def _median(values: Sequence[float | None]) -> float | None:
    """The median, None if one is missing."""
    known = [value for value in values if value is not None]
    return (
        round(float(torch.tensor(known, dtype=torch.float64).quantile(0.5)), 2) if len(known) == len(values) else None
    )


if __name__ == "__main__":
    main()
