"""Test error and loss at EASGD's center with BatchNorm's statistics from various sources, on CIFAR-10.

    EASGD_DATA=~/data python examples/benchmarks/run.py batchnorm_statistics --tau 10 --steps 120 --every 40 --rounds 3

ResNet-18 for small images is trained by so many workers. Every so many steps all of them stop, and the same center is
scored on the same test images with each kind of statistics, so that nothing but the statistics differs:

    mean of workers   the mean of the workers' running statistics, what the center has by default
    recalibrated N    RecalibrateBatchNorm's, from the latest N training batches of each worker
    rank 0            the running statistics of rank 0's worker

and each worker with its own weights and its own running statistics ("own"). Looking changes nothing: the run goes on
bit for bit as without. Printed is the mean over the seeds, and how much larger error and loss are than with the mean of
the workers' statistics at the same center: mean, smallest, largest over the seeds. If --every is a multiple of τ, a
point is the last step before an exchange, where the workers are farthest from the center; before the first exchange,
which comes after τ steps, the center is where training began. Running statistics are averages over about ten batches
(momentum 0.1): leave some tens of steps before the first point.
"""

import argparse
import os
import statistics

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness.command import add_options, parser
from harness.figures import draw_curves
from harness.ranks import Place, RanksError, Send, one_host, run_ranks
from harness.ratios import Row
from harness.results import print_table, write_results
from harness.turns import quiet_trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_easgd import EASGDStrategy
from lightning_easgd.callbacks import RecalibrateBatchNorm, gather
from lightning_easgd.lab.data import CIFAR10DataModule, DataError
from lightning_easgd.lab.models import Classifier, ResNet18, SmallImageStem
from lightning_easgd.lab.simulation.sweep import read_rows as read_numbers
from lightning_easgd.strategies.rehearsal import copy_batch
from lightning_easgd.tensors.buffers import load_buffers

CENTER, OWN = "center", "own"
MEAN, RANK_0 = "mean of workers", "rank 0"
SCORED = 100  # images of a forward pass; which ones come together does not matter in evaluation mode


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--root", default=os.environ.get("EASGD_DATA", "data"), help="of the data set (%(default)s)")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--tau", type=int, nargs="+", default=[10], help="periods, a run for each (%(default)s)")
    options.add_argument("--lr", type=float, default=0.02, help="of plain SGD (%(default)g)")
    options.add_argument("--batch-size", type=int, default=32, help="of each worker (%(default)s)")
    options.add_argument("--steps", type=int, default=120, help="of each worker (%(default)s)")
    options.add_argument("--every", type=int, default=40, help="steps between two points (%(default)s)")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 5, 20], help="of RecalibrateBatchNorm")
    options.add_argument("--test-images", type=int, default=1000, help="the first of the test set (%(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of the first round, the next has the next")
    add_options(options, "batchnorm_statistics", rounds=3)
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = _options(arguments)
    try:
        CIFAR10DataModule(root=options.root).prepare_data()
    except DataError as error:
        print(f"skipped: {error}")
        return
    rows: list[Row] = []
    for number in range(options.rounds):
        for tau in options.tau:
            rows += _points(tau, options.seed + number, options)
            # Written after every run: what is measured is not lost.
            tables = {"batchnorm_statistics": rows, "means": _means(rows)}
            write_results(options.output, tables, vars(options))
    print_table(_means(rows))
    draw(options.output)


def draw(results: Path) -> None:
    """Draw the figure of a results directory from its tables."""
    means = read_numbers(results / "means.csv")
    draw_curves(
        results / "figure.png",
        {
            f"ResNet-18, CIFAR-10, τ = {tau}": _curves(row for row in means if row["tau"] == tau)
            for tau in dict.fromkeys(row["tau"] for row in means)
        },
        "Test error by source of BatchNorm's statistics",
        across="training of a worker",
        unit="steps",
    )


def _points(tau: int, seed: int, options: argparse.Namespace) -> list[Row]:
    """The scores of one run; those until a rank failed."""
    rows: list[Row] = []

    def receive(row: Row) -> None:
        rows.append({"tau": tau, "seed": seed} | row)
        what = "{weights:<9} {statistics:<16} error {error:.4f}  loss {loss:.4f}".format(**row)
        print(f"tau {tau:<4} seed {seed:<4} step {row['step']:<6} {what}", flush=True)

    try:
        run_ranks(_train, one_host(options.ranks), tau, seed, options, timeout=options.timeout, receive=receive)
    except RanksError as error:
        print(f"tau {tau}, seed {seed}: {error}")
    return rows


def _train(rank: int, place: Place, send: Send, tau: int, seed: int, options: argparse.Namespace) -> None:
    """Be one rank of one run; rank 0 sends a row for each score."""
    L.seed_everything(seed)
    data = CIFAR10DataModule(root=options.root, batch_size=options.batch_size, seed=seed, verify=False)
    comparison = _Comparison(options.every, options.batches, options.test_images, send)
    trainer = quiet_trainer(
        place,
        strategy=EASGDStrategy(tau=tau),
        callbacks=[comparison],
        max_epochs=-1,
        max_steps=options.steps,
        limit_val_batches=0,
        use_distributed_sampler=False,  # each worker has all of the data, in an order of its own
    )
    network = ResNet18(SmallImageStem(data.image_shape[0]), data.num_classes)
    trainer.fit(Classifier(network, partial(torch.optim.SGD, lr=options.lr)), datamodule=data)


class _Comparison(Callback):
    """Scores the center with each kind of statistics at every point; rank 0 sends the rows."""

    def __init__(self, every: int, batches: Sequence[int], test_images: int, send: Send) -> None:
        self.every = every
        self.batches = batches
        self.test_images = test_images
        self._send = send
        self._latest: list[tuple[Any, int]] = []
        self._images = self._labels = torch.empty(0)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Read the test images."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("test")
        loader = data.test_dataloader()
        images, labels = zip(*islice(loader, -(-self.test_images // loader.batch_size)), strict=True)
        self._images = torch.cat(images)[: self.test_images]
        self._labels = torch.cat(labels)[: self.test_images]

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """Keep the latest batches."""
        self._latest = [*self._latest, (copy_batch(batch), index)][-max(self.batches) :]

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Score at a point."""
        if trainer.global_step % self.every:
            return
        strategy = trainer.strategy
        assert isinstance(strategy, EASGDStrategy)
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        theirs = strategy.broadcast(buffers)
        self._center(trainer, module, MEAN)
        for count in self.batches:
            with _recalibrated(count, self._latest, trainer, module):
                self._center(trainer, module, f"recalibrated {count}")
        strategy.calibrate_buffers_with(partial(load_buffers, module, theirs))
        self._center(trainer, module, RANK_0)
        strategy.calibrate_buffers_with(None)
        every = gather(trainer, self._sums(module, slice(None)))
        for worker, (wrong, loss) in enumerate(every):
            self._report(trainer, f"worker_{worker}", OWN, wrong, loss)

    def _center(self, trainer: L.Trainer, module: nn.Module, kind: str) -> None:
        """Score the center, a part of the images on each rank."""
        strategy: Any = trainer.strategy
        with strategy.center_weights():
            parts = gather(trainer, self._sums(module, slice(trainer.global_rank, None, trainer.world_size)))
        self._report(trainer, CENTER, kind, *(sum(column) for column in zip(*parts, strict=True)))

    @torch.no_grad()
    def _sums(self, module: nn.Module, part: slice) -> tuple[float, float]:
        """Wrong answers and sum of the losses over a part of the images, with what the module holds."""
        wrong = loss = 0.0
        module.eval()
        own = (torch.split(tensor[part], SCORED) for tensor in (self._images, self._labels))
        for images, labels in zip(*own, strict=True):
            logits: Tensor = module(images)
            wrong += float((logits.argmax(dim=-1) != labels).sum())
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        module.train()
        return wrong, loss

    def _report(self, trainer: L.Trainer, weights: str, kind: str, wrong: float, loss: float) -> None:
        if trainer.is_global_zero:
            strategy: Any = trainer.strategy
            count = len(self._labels)
            self._send(
                {
                    "step": trainer.global_step,
                    "exchanges": strategy.communication.exchanges,
                    "weights": weights,
                    "statistics": kind,
                    "test_images": count,
                    "error": wrong / count,
                    "loss": loss / count,
                }
            )


@contextmanager
def _recalibrated(
    count: int, latest: Sequence[tuple[Any, int]], trainer: L.Trainer, module: L.LightningModule
) -> Iterator[None]:
    """Context in which the package's callback makes the center's statistics, as if it had been there all the time."""
    callback = RecalibrateBatchNorm(count)
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    for batch, index in latest:
        callback.on_train_batch_start(trainer, module, batch, index)
    try:
        yield
    finally:
        callback.teardown(trainer, module, "fit")


def _means(rows: Sequence[Row]) -> list[Row]:
    """Means over the seeds, and what error and loss are more than with the default statistics of the same center."""
    keys = ("tau", "step", "weights", "statistics")
    default = {
        (row["tau"], row["step"], row["seed"]): row
        for row in rows
        if (row["weights"], row["statistics"]) == (CENTER, MEAN)
    }
    lines = []
    for key in sorted(dict.fromkeys(tuple(row[name] for name in keys) for row in rows), key=lambda key: key[:2]):
        own = [row for row in rows if tuple(row[name] for name in keys) == key]
        line: Row = {**dict(zip(keys, key, strict=True)), "seeds": len(own)}
        for score in ("error", "loss"):
            more = [row[score] - default[row["tau"], row["step"], row["seed"]][score] for row in own]
            cells = {
                score: statistics.fmean(row[score] for row in own),
                f"{score}_more": statistics.fmean(more),
                f"{score}_more_min": min(more),
                f"{score}_more_max": max(more),
            }
            line |= {name: round(value, 4) for name, value in cells.items()}
        lines.append(line)
    return lines


def _curves(means: Iterator[Row]) -> dict[str, list[tuple[float, float]]]:
    """Error over steps at the center, for each kind of statistics."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in means:
        if row["weights"] == CENTER:
            curves.setdefault(row["statistics"], []).append((row["step"], row["error"]))
    return curves


if __name__ == "__main__":
    main()
