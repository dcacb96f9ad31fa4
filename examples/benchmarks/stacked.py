r"""The paper's CIFAR-10 figure in steps: test error of the center, all workers of all methods stacked on one device.

    python examples/benchmarks/run.py stacked --data ~/data --seconds 230

The parameters of all workers are rows of one tensor, and their gradients come from vmapped calls. Every method, at
every number of workers and each of its three learning rates, makes the same steps on the same batches side by side, so
that a run that is cut off compares equal numbers of steps. Exchanges are synchronous, with the package's own
equations; τ is 10.

    easgd           β = 0.9, α = β/p
    eamsgd          with Nesterov momentum 0.99, the paper's; eamsgd_0.9: with that of ddp_momentum and msgd, 0.9
    downpour        workers push and take over in turn; the paper found it unstable for large τ
    ddp             the mean gradient of p mini-batches at every step; ddp_momentum: with momentum
    post_local_sgd  ddp for the first half, then the workers' mean every τ steps
    sgd, msgd       one worker, the control

The curves are over steps: what an exchange costs, of which ddp has τ for one of the others, is no part of them.

Network, batch size, dropout, weight decay and augmentation are the paper's. The learning rates are constant; the best
is the one with the least mean of the last readings of the test error, which every method thus has for tuning, too, and
best.csv says whether it lies at an end of its grid. How many steps are made follows from the speed that is found;
curves.csv is written as the run goes on, figure and tables now and then.
"""

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness.command import parser
from harness.figures import draw_curves
from harness.ratios import Row
from harness.results import print_table, write_results
from harness.stacked_gradients import StackedGradients, Way, fastest, measure
from harness.stacked_images import StackedImages, read_cifar10, synthetic_images
from harness.stacked_methods import PostLocal
from harness.stacked_results import best_curves, best_rates
from harness.stacked_runs import METHODS, Run, runs
from torch import nn

from lightning_easgd.lab.models.convnets import ConvNet7, StridedNet
from lightning_easgd.lab.simulation.sweep import read_rows as read_numbers

READINGS = 40  # of a run, about
RESERVE = 8.0  # seconds for figure and tables at the end
WRITTEN = 10.0  # and for those on the way
PROBE = 20  # steps from which the number of steps follows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options.add_argument("--seconds", type=float, default=230.0, help="all in all (%(default)g)")
    options.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-py")
    options.add_argument(
        "--dry", action="store_true", help="try the code: few steps, tiny, invented data if none given"
    )
    options.add_argument("--workers", type=int, nargs="+", default=[4, 16])
    options.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    options.add_argument("--tau", type=int, default=10)
    options.add_argument("--seeds", type=int, default=1, help="of start, order and dropout (%(default)s)")
    options.add_argument("--batch-size", type=int, default=128, help="of each worker (%(default)s)")
    options.add_argument("--steps", type=int, help="instead of as many as there is time for")
    options.add_argument("--network", choices=["convnet7", "strided_net"], default="convnet7")
    options.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of activations")
    options.add_argument("--train-images", type=int, help="the first of the training set (all)")
    options.add_argument("--test-images", type=int, help="the first of the test set (all)")
    default = Path("outputs", "benchmarks", "stacked")
    options.add_argument("--output", type=Path, default=default, help="results directory (%(default)s)")
    chosen = options.parse_args(arguments)
    if chosen.dry:
        chosen.workers, chosen.batch_size, chosen.tau, chosen.steps = [2], 2, 2, chosen.steps or 4
        chosen.train_images, chosen.test_images = 64, 32
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, write tables and figure as it goes, and print the best rates."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("stacked: this machine has no CUDA device (or torch was built without CUDA); nothing was measured")
        return
    if options.data is None and not options.dry:
        print("stacked: give --data, the folder that holds cifar-10-batches-py; nothing was measured")
        return
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32; cuDNN's convolutions use it anyway
        torch.backends.cudnn.benchmark = True
    Stacked(options).train()


class Stacked:
    """All runs, and what they have shown so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._started = getattr(sys.modules["__main__"], "STARTED", time.perf_counter())
        self._device = torch.device(options.device)
        train, test = synthetic_images(64) if options.data is None else read_cifar10(options.data)
        train = train[0][: options.train_images], train[1][: options.train_images]
        test = test[0][: options.test_images], test[1][: options.test_images]
        self._most = max(options.workers)
        self._images = [
            StackedImages(
                train, test, workers=self._most, batch_size=options.batch_size, device=self._device, seed=seed
            )
            for seed in range(options.seeds)
        ]
        self._say("data read")
        self.speeds = self._measured()
        self._way = fastest(self.speeds, options.precision)
        self._gradients = StackedGradients(self._network(0), self._way)
        self._runs = [run for seed in range(options.seeds) for run in self._of_seed(seed)]
        self._streams = torch.cat([run.streams for run in self._runs])
        self._losses = torch.zeros(len(self._runs), device=self._device)
        self._summed = 0
        self.curves: list[Row] = []
        self._say(f"{len(self._runs)} runs, {len(self._streams)} workers, {self._way}")

    def train(self) -> None:
        """Train until the steps are made, or the time is over."""
        torch.manual_seed(self._options.seeds)  # dropout
        steps, every = self._options.steps or 0, 0
        if steps:
            every = self._plan(steps)
        probed = 0.0  # when half of the probe was over
        for clock in itertools.count():
            for run in self._runs:
                run.method.meet(clock)
            if not steps and clock == PROBE // 2:
                probed = self._now()
            if not steps and clock == PROBE:
                steps = self._affordable((self._now() - probed) / (PROBE - PROBE // 2))
                every = self._plan(steps)
            if clock in (0, steps) or (every and clock % every == 0):
                last = (clock > 0 and clock == steps) or (not self._options.dry and self._left() < 0)
                self._read(clock, last)
                if last:
                    return
            self._step(clock)

    def _step(self, clock: int) -> None:
        images, labels = (torch.cat(parts) for parts in zip(*(i.draw(clock) for i in self._images), strict=True))
        points = torch.cat([run.method.points for run in self._runs])
        gradients, losses = self._gradients(points, images, labels, self._streams)
        counts = [run.method.count for run in self._runs]
        for run, part in zip(self._runs, gradients.split(counts), strict=True):
            run.method.step(part)
        self._losses += torch.stack([part.mean() for part in losses.split(counts)])
        self._summed += 1

    def _read(self, clock: int, last: bool) -> None:
        """Score all centers; write the readings, and from time to time everything."""
        errors = torch.stack([self._gradients.error(run.method.center, *self._images[0].test) for run in self._runs])
        losses = (self._losses / max(self._summed, 1)).tolist()
        self._losses.zero_()
        self._summed = 0
        for run, error, loss in zip(self._runs, errors.tolist(), losses, strict=True):
            shown = round(loss, 5) if clock else ""
            self.curves.append({**run.label, "step": clock, "test_error": round(error, 5), "train_loss": shown})
        self._options.output.mkdir(parents=True, exist_ok=True)
        with (self._options.output / "curves.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.curves[0]))
            writer.writeheader()
            writer.writerows(self.curves)
        self._say(f"step {clock}: least error {min(errors.tolist()):.3f}")
        if last or (clock and len(self.curves) // len(self._runs) % 10 == 0):
            self._write()

    def _write(self) -> None:
        best = best_rates(self.curves)
        tables = {"curves": self.curves, "best": best, "speed": self.speeds}
        found = {
            "way": str(self._way),
            "steps_made": self.curves[-1]["step"],
            "wall_seconds": round(self._now() - self._started),
        }
        options = {name: value for name, value in vars(self._options).items() if name != "data"}
        write_results(self._options.output, tables, options | found)
        print_table(best)
        draw(self._options.output)

    def _measured(self) -> list[Row]:
        """The speed of all ways of computing gradients here; bfloat16 is timed for information, too."""
        options = self._options
        images, labels = self._images[0].draw(0)
        gpu = self._device.type == "cuda"
        sizes = (16, 48, 96) if gpu else (8,)
        other = "bfloat16" if options.precision == "float32" else "float32"
        ways = [Way("patches", options.precision, rows) for rows in sizes]
        ways += [Way("grouped", options.precision, rows) for rows in sizes[:2]]
        ways += [Way("patches", other, sizes[1]), Way("grouped", other, sizes[0])] if gpu else []
        return measure(self._network(0), ways, (images, labels), repeats=5 if gpu else 1)

    def _of_seed(self, seed: int) -> Iterator[Run]:
        start = StackedGradients(self._network(seed), self._way).start
        options = self._options
        return runs(options.methods, options.workers, start, tau=options.tau, seed=seed)

    def _network(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = ConvNet7() if self._options.network == "convnet7" else StridedNet()
        return network.to(self._device)

    def _plan(self, steps: int) -> int:
        """Tell the runs how many steps there will be; returns after how many each a reading comes."""
        for run in self._runs:
            if isinstance(run.method, PostLocal):
                run.method.warmup_steps = steps // 2
        tau = self._options.tau
        return max(1, round(steps / READINGS / tau)) * tau

    def _affordable(self, step_seconds: float) -> int:
        started = self._now()
        for run in self._runs:
            self._gradients.error(run.method.center, *self._images[0].test)
        reading = self._now() - started
        steps = (self._left() - READINGS * reading - WRITTEN) * 0.96 / step_seconds
        tau = self._options.tau
        steps = max(2 * PROBE, int(steps) // tau * tau)
        self._say(f"{1e3 * step_seconds:.1f} ms for a step of all, {reading:.2f} s for a reading: {steps} steps")
        return steps

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _left(self) -> float:
        return self._options.seconds - RESERVE - (time.perf_counter() - self._started)

    def _say(self, what: str) -> None:
        print(f"{time.perf_counter() - self._started:6.1f} s  {what}", flush=True)


def draw(results: Path) -> None:
    """Draw the figure of a results directory from its tables."""
    curves, best = (read_numbers(results / f"{name}.csv") for name in ("curves", "best"))
    workers = sorted({row["workers"] for row in best} - {1}) or [1]
    panels = {f"p = {p} workers": best_curves(curves, best, p, METHODS) for p in workers}
    draw_curves(results / "figure.png", panels, "Test error against steps", across="training of a worker", unit="steps")


if __name__ == "__main__":
    main()
