"""Error curves of real runs on the digits beside the simulator's, for three seeds.

    python examples/benchmarks/simulated_curve.py --output results/simulated_curve

Real: the Lightning Trainer with so many processes. Simulated: the same network, data and seeds in one process. The
center's test error is read between two exchanges. Synchronous runs should agree to rounding; asynchronous ones in free
order are never twice the same, and should differ by no more than runs of different seeds do.
"""

import argparse
import csv
import os
import statistics
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from harness.one_job import run_ranks
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_easgd import EASGDStrategy
from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.simulation import AsynchronousSchedule, Cluster, LocalSGD, SynchronousSchedule, simulate
from lightning_easgd.lab.simulation.digits import digits_network, digits_problem

LR, TAU, SEEDS = 0.3, 10, (0, 1, 2)
MODES = {"sync": SynchronousSchedule(TAU), "async": AsynchronousSchedule(TAU)}


class Digits(L.LightningModule):
    """The simulator's network."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = digits_network(seed)

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy of the batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=LR)


class Readings(Callback):
    """The center in the middle of each period."""

    def __init__(self) -> None:
        self.centers: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Read it."""
        if trainer.global_step % TAU == TAU // 2:
            center: Any = trainer.strategy.center  # type: ignore[attr-defined]
            self.centers.append(torch.cat([each.flatten() for each in center.values()]).clone())


def real_curves(ranks: int, steps: int) -> dict[tuple[str, int], list[float]]:
    """The error of each mode and seed after 5, 15, 25, … steps."""
    curves = {}
    for mode in MODES:
        for seed in SEEDS:
            readings = Readings()
            L.Trainer(
                strategy=EASGDStrategy(mode=mode, tau=TAU),
                accelerator="cpu",
                devices=ranks,
                max_steps=steps,
                callbacks=[readings],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            ).fit(Digits(seed), datamodule=DigitsDataModule(seed=seed))
            problem = digits_problem(digits_network(seed), seed=seed)
            curves[mode, seed] = [problem.error(center) for center in readings.centers]
    return curves


def simulated_curve(mode: str, seed: int, ranks: int, steps: int) -> list[float]:
    """The same by the simulator."""
    step = 0.01
    problem = digits_problem(digits_network(seed), seed=seed)
    cluster = Cluster(ranks, step_seconds=step, jitter=0.0 if mode == "sync" else 0.1, seed=seed)
    run = simulate(problem, MODES[mode], cluster, LocalSGD(LR), steps=steps, every=TAU / 2 * step)
    return run.errors[1 : 2 * (steps // TAU) : 2]


def main() -> None:
    """Run, print how far the curves are apart, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200, help="a multiple of 10")
    parser.add_argument("--timeout", type=float, default=1500)
    parser.add_argument("--output", type=Path, help="folder for simulated_curve.csv")
    options = parser.parse_args()
    real = run_ranks(real_curves, options.ranks, options.steps, timeout=options.timeout)
    simulated = {(mode, seed): simulated_curve(mode, seed, options.ranks, options.steps) for mode, seed in real}
    for mode in MODES:
        columns = [list(zip(*(curves[mode, seed] for seed in SEEDS), strict=True)) for curves in (real, simulated)]
        apart = statistics.mean(abs(statistics.mean(a) - statistics.mean(b)) for a, b in zip(*columns, strict=True))
        noise = statistics.mean(statistics.stdev(errors) for errors in columns[0])
        print(f"{mode:<6} mean difference of the curves {apart:.5f}   standard deviation of the seeds {noise:.5f}")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        with (options.output / "simulated_curve.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("mode", "workers", "seed", "step", "real_error", "simulated_error"))
            for (mode, seed), errors in real.items():
                pairs = zip(errors, simulated[mode, seed], strict=True)
                for number, pair in enumerate(pairs):
                    values = (f"{value:.5f}" for value in pair)
                    writer.writerow((mode, options.ranks, seed, TAU // 2 + TAU * number, *values))


if __name__ == "__main__":
    main()
