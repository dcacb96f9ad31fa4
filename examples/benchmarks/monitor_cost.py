"""What this package's callbacks cost in a training step of EASGD, and what a reading takes of those that take readings.

    python examples/benchmarks/run.py monitor_cost --ranks 2 --parameters 350000 1000000 --rounds 5

EASGD alone and with one callback each take turns in the same processes, round after round, as in step_cost: printed is
the median over the rounds of the ratio to EASGD alone of the same round, with the smallest and the largest. "easgd
again" is EASGD alone a second time, and shows what the noise of the machine does. All count the same steps, a multiple
of every period there is (of the exchange, of ElasticMonitor's records, of CurvatureMonitor's readings); what is special
about the beginning, such as CurvatureMonitor's reading after the first step, which starts from a random vector and
checks the loss, comes before them. A turn's time is that of its slowest rank, here and in rounds.csv: while a callback
works on one rank, as CurvatureMonitor does, the others go ahead by up to a period; in the long run they wait for it.

    ElasticMonitor        a record at every tenth exchange, its default, and at every exchange
    CurvatureMonitor      a reading on rank 0 after every --every-n-steps steps
    RecalibrateBatchNorm  in a step without a validation: the copy of the batch
    TimeSplit             its two readings of the clock
    LearningCurve is left out: between two validations it counts samples, and at them it takes what a scoring takes.

The second table has the time of a reading by itself, in seconds and in training steps of EASGD alone:
CurvatureMonitor's first and the median of later ones (with the Hessian products that they took; a curvature that
changes more between two readings takes more of them), LocalEnergyMonitor's with its default settings, and what
``center_weights()``, where all ranks meet and the center is shown as for a validation, takes without and with
RecalibrateBatchNorm.

The model is the perceptron of step_cost with a BatchNorm layer, on samples of the size of a CIFAR image, which a
DataLoader hands out: small steps and large batches, so that the costs are large beside them. There is no logger.
"""

import argparse
import dataclasses
import math
import os
import statistics
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from harness.command import add_options, collect_turns, parser
from harness.methods import Method
from harness.model import CLASSES, Model, Task
from harness.ranks import Place, RanksError, Send, one_host, run_ranks
from harness.ratios import Row, every_turn, ratios
from harness.results import print_table, write_results
from harness.turns import Turn, Turns, quiet_trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easgd import EASGDStrategy
from lightning_easgd.callbacks import (
    CurvatureMonitor,
    ElasticMonitor,
    LocalEnergyMonitor,
    RecalibrateBatchNorm,
    TimeSplit,
)

EXCHANGES = 10  # between two records of ElasticMonitor, its default
MEETINGS = 5  # of which the median is taken
TRAINER = {"use_distributed_sampler": False}  # Lightning would deal the steps out to the ranks


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--parameters", type=int, nargs="+", default=[350_000, 1_000_000])
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--batch-size", type=int, default=128, help="128 is the EASGD paper's")
    options.add_argument("--features", type=int, default=3 * 32 * 32, help="of a sample (%(default)s: a CIFAR image)")
    options.add_argument("--tau", type=int, default=10)
    options.add_argument("--every-n-steps", type=int, default=100, help="CurvatureMonitor's (%(default)s)")
    options.add_argument("--batches", type=int, default=10, help="RecalibrateBatchNorm's (%(default)s)")
    options.add_argument("--draws", type=int, default=20, help="LocalEnergyMonitor's (%(default)s)")
    options.add_argument("--readings", type=int, default=3, help="of CurvatureMonitor after its first (%(default)s)")
    options.add_argument("--steps", type=int, default=200, help="counted steps of a turn, at least (%(default)s)")
    add_options(options, "monitor_cost", rounds=5)
    return options.parse_args(arguments)


class Watched(Model):
    """The perceptron with BatchNorm, on batches that come through the Trainer: callbacks copy what it hands out."""

    def __init__(self, task: Task, steps: int) -> None:
        super().__init__(task, steps)
        width, _features = next(self.net.parameters()).shape
        self.net.insert(1, nn.BatchNorm1d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy of the batch."""
        inputs, targets = batch
        return nn.functional.cross_entropy(self(inputs), targets)

    def train_dataloader(self) -> Iterable[Any]:
        """The same batch for each step."""
        batches: Any = [self.batch] * self.steps
        return DataLoader(batches, batch_size=None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the tables, and write the results directory."""
    options = _options(arguments)
    # Whole periods of everything: no reading is counted in a turn once and in another twice.
    period = math.lcm(EXCHANGES * options.tau, options.every_n_steps)
    steps = -(-options.steps // period) * period
    rows, rounds, readings = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        methods = _methods(options, folder)
        for parameters in options.parameters:
            task = Task(parameters, batch_size=options.batch_size, features=options.features)
            setting = {"ranks": options.ranks, "batch_size": options.batch_size, "parameters": parameters}
            turns = collect_turns(
                one_host(options.ranks),
                Turns(partial(Watched, task), methods, options.rounds, steps, steps, trainer=TRAINER),
                title=f"{parameters:>10}",
                timeout=options.timeout,
            )
            turns = [_slowest(turn) for turn in turns]
            lines = ratios(setting, turns, reference=methods[0].label)
            rows += lines
            rounds += every_turn(setting, turns)
            if lines:
                step_seconds = lines[0]["ms_per_step"] / 1e3
                readings += _readings(setting, task, step_seconds, options)
            # Written after every setting: what is measured is not lost.
            write_results(options.output, {"monitor_cost": rows, "rounds": rounds, "readings": readings}, vars(options))
    print_table(rows)
    print_table(readings)


def _slowest(turn: Turn) -> Turn:
    """A turn whose time is the slowest rank's."""
    return dataclasses.replace(turn, seconds=[max(turn.seconds)], cpu_seconds=[max(turn.cpu_seconds)])


def _methods(options: argparse.Namespace, folder: str) -> list[Method]:
    """EASGD alone, and with one callback each; callbacks that write get the folder."""
    makers: dict[str, Callable[[Place], list[Callback]]] = {
        "easgd": lambda place: [],
        "easgd again": lambda place: [],
        "ElasticMonitor": lambda place: [ElasticMonitor(EXCHANGES, directory=folder)],
        "ElasticMonitor, every exchange": lambda place: [ElasticMonitor(1, directory=folder)],
        "CurvatureMonitor": lambda place: [CurvatureMonitor(options.every_n_steps)],
        "RecalibrateBatchNorm": lambda place: [RecalibrateBatchNorm(options.batches)],
        "TimeSplit": lambda place: [TimeSplit(folder)],
    }
    strategy = partial(EASGDStrategy, tau=options.tau)
    return [Method(name, options.tau, strategy, make) for name, make in makers.items()]


def _readings(setting: Row, task: Task, step_seconds: float, options: argparse.Namespace) -> list[Row]:
    """One row for each kind of reading; those until a rank failed."""
    rows: list[Row] = []

    def receive(reading: tuple[str, float, float | str]) -> None:
        name, seconds, products = reading
        in_steps = round(seconds / step_seconds, 2)
        rows.append({**setting, "reading": name, "seconds": round(seconds, 5), "steps": in_steps, "products": products})
        print(f"{task.parameters:>10}  {name:<44} {1e3 * seconds:9.3f} ms", flush=True)

    try:
        run_ranks(_read, one_host(options.ranks), task, options, timeout=options.timeout, receive=receive)
    except RanksError as error:
        print(f"readings of {task.parameters} parameters: {error}")
    return rows


def _read(rank: int, place: Place, send: Send, task: Task, options: argparse.Namespace) -> None:
    """Be one rank; rank 0 sends a name, seconds, and the Hessian products where there are some."""

    def fit(steps: int, *callbacks: Callback) -> None:
        strategy = EASGDStrategy(tau=options.tau)
        trainer = quiet_trainer(place, strategy=strategy, callbacks=list(callbacks), **TRAINER)
        model = Watched(task, steps)
        trainer.fit(model, datamodule=_Samples(model, task))

    before, after = _Moments(), _Moments()
    monitor = CurvatureMonitor(options.every_n_steps)
    fit(options.readings * options.every_n_steps, before, monitor, after)
    if rank == 0:
        took = [after.batches[reading.step - 1] - before.batches[reading.step - 1] for reading in monitor.readings]
        products = [reading.products for reading in monitor.readings]
        send(("CurvatureMonitor, first", took[0], products[0]))
        send(("CurvatureMonitor, later", statistics.median(took[1:]), statistics.median(products[1:])))

    steps = max(options.tau, options.batches) + 1  # as many batches as are asked for, and an exchange
    for name, callbacks in (
        ("center_weights()", []),
        ("center_weights() with RecalibrateBatchNorm", [RecalibrateBatchNorm(options.batches)]),
    ):
        meetings = _Meetings(steps)
        fit(steps, *callbacks, meetings)
        if rank == 0:
            send((name, statistics.median(meetings.seconds), ""))

    before, after = _Moments(), _Moments()
    fit(steps, before, LocalEnergyMonitor(draws=options.draws), after)
    if rank == 0:
        send(("LocalEnergyMonitor", after.end - before.end, ""))


class _Samples(L.LightningDataModule):
    """Where LocalEnergyMonitor finds as many samples as it takes by default; the model trains on its own batch."""

    def __init__(self, model: Watched, task: Task) -> None:
        super().__init__()
        self._model, self._task = model, task

    def train_dataloader(self) -> Iterable[Any]:
        """The model's own."""
        return self._model.train_dataloader()

    def train_evaluation_dataloader(self) -> DataLoader[Any]:
        """Random samples."""
        count = 8 * 256
        return DataLoader(TensorDataset(torch.randn(count, self._task.features), torch.randint(CLASSES, (count,))))


class _Moments(Callback):
    """When callbacks at this place of the list were called: one before and one after another time that one."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.end = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        """After each batch."""
        self.batches.append(time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        """After training, where all ranks have come."""
        dist.barrier()
        self.end = time.perf_counter()


class _Meetings(Callback):
    """Seconds of :meth:`center_weights` after a step, several times."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seconds: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Enter it together, and leave it."""
        strategy = trainer.strategy
        assert isinstance(strategy, EASGDStrategy)
        if trainer.global_step != self.step:
            return
        for _number in range(MEETINGS):
            dist.barrier()
            started = time.perf_counter()
            with strategy.center_weights():
                pass
            self.seconds.append(time.perf_counter() - started)


if __name__ == "__main__":
    main()
