"""How well the simulator predicts the time of real runs: 2 and 4 processes through the Lightning Trainer.

    python examples/benchmarks/simulated_time.py --output results/simulated_time

Steps and transfers sleep instead of computing, so that more processes than cores do not distort the times: a step
sleeps for a given time (a straggler three times as long), and every exchange for as long as its link would take. All
else is real: the Trainer, its processes, the exchanges' order and what waits for what. Calibration runs of the same
processes measure what this machine adds: once exchanges without a link, and before and after each case steps without
any communication, as load from outside comes and goes. Where those two disagree, or say that the machine was too busy
to sleep in time, the case is run again, whatever its time was, and counts as disturbed if that never ends. Printed is,
for each case, the time that the simulator predicts and the time that the real run took.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
import torch.distributed as dist
from harness.one_job import run_ranks
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.averagers import Channel, ProcessGroupChannel, Transfer, served
from lightning_easgd.lab.simulation import (
    AsynchronousSchedule,
    Cluster,
    Link,
    RoundRobinSchedule,
    Schedule,
    SynchronousSchedule,
    time_run,
)
from lightning_easgd.lab.simulation.events import Finish
from lightning_easgd.strategies import easgd as elastic_workers

ELEMENTS = 10_000
MEGABYTE = 1e6


@dataclass(frozen=True)
class Case:
    """A run: who exchanges with whom, on what."""

    name: str
    schedule: Schedule
    cluster: Cluster


def cases(workers: int, step: float) -> list[Case]:
    """The cases for this many processes; a step sleeps for this many seconds."""
    slow_last = [1.0] * (workers - 1) + [1 / 3]
    near = Cluster(workers, step_seconds=step, message_bytes=MEGABYTE)
    straggler = replace(near, speeds=slow_last)
    # On the slow link a ring all-reduce, or the round trips of all workers, take longer than a period of 4 steps.
    slow_ring = replace(near, link=Link(step, MEGABYTE / (2 * workers * step)))
    slow_center = replace(near, link=Link(step / 2, MEGABYTE / (2 * step)))
    return [
        Case("sync", SynchronousSchedule(4), near),
        Case("sync, straggler", SynchronousSchedule(4), straggler),
        Case("sync, slow link", SynchronousSchedule(4), slow_ring),
        Case("async", AsynchronousSchedule(4), near),
        Case("async, straggler", AsynchronousSchedule(4), straggler),
        Case("async, slow center", AsynchronousSchedule(2), slow_center),
        Case("round robin, slow link", RoundRobinSchedule(4), replace(near, link=Link(step))),
    ]


class Sleeper(L.LightningModule):
    """A model whose steps sleep."""

    def __init__(self, seconds: float, steps: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(ELEMENTS))
        self.seconds, self.steps = seconds, steps

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Sleep."""
        time.sleep(self.seconds)
        return self.x.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> list[int]:
        """One empty batch for each step."""
        return [0] * self.steps


class Stopwatch(Callback):
    """Seconds from the common start to this rank's last step, and to the end of training."""

    def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
        """All ranks start together, when they have agreed on where the center begins."""
        trainer.strategy.barrier()
        self.started = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        """The last call counts."""
        self.own = time.monotonic() - self.started

    def on_train_end(self, *_: Any) -> None:
        """All exchanges have been applied."""
        self.total = time.monotonic() - self.started


class ThrottledChannel(Channel):
    """A process group whose large reductions arrive as late as they would on a slow link."""

    def __init__(self, cluster: Cluster, *arguments: Any) -> None:
        self._inner = ProcessGroupChannel(*arguments)
        self._seconds = cluster.all_reduce_seconds()
        self.rank, self.size = self._inner.rank, self._inner.size

    def sum(self, buffer: Tensor) -> Transfer:
        """As the process group's, and later."""
        transfer = self._inner.sum(buffer)
        return _Late(transfer, self._seconds) if buffer.nbytes >= 4 * ELEMENTS else transfer

    def close(self) -> None:
        """Close the process group."""
        self._inner.close()


class _Late(Transfer):
    def __init__(self, transfer: Transfer, seconds: float) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._carry, args=(transfer, seconds), daemon=True)
        self._thread.start()

    def _carry(self, transfer: Transfer, seconds: float) -> None:
        try:
            transfer.wait()
            time.sleep(seconds)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


@contextmanager
def throttled(cluster: Cluster, center: Any) -> Iterator[None]:
    """Let exchanges take as long as on a cluster's links; ``center`` is a lock that the ranks share."""
    exchange, channel = served.CenterPart.exchange, elastic_workers.ProcessGroupChannel
    link, size = cluster.link, cluster.message_bytes

    def slow_exchange(part: Any, messages: Tensor, rates: Any) -> int:
        time.sleep(link.latency)
        with center:
            time.sleep(link.occupied(size))
            staleness = exchange(part, messages, rates)
        time.sleep(link.latency + link.occupied(min(size, cluster.chunk_bytes)))
        return staleness

    served.CenterPart.exchange = slow_exchange  # type: ignore[method-assign]
    elastic_workers.ProcessGroupChannel = lambda *arguments: ThrottledChannel(cluster, *arguments)  # type: ignore
    try:
        yield
    finally:
        served.CenterPart.exchange = exchange  # type: ignore[method-assign]
        elastic_workers.ProcessGroupChannel = channel  # type: ignore[misc]


def strategy_of(schedule: Schedule) -> EASGDStrategy:
    """The real counterpart of a schedule."""
    match schedule:
        case SynchronousSchedule(tau):
            return EASGDStrategy(tau=tau, process_group_backend="gloo")  # on one host they would share memory
        case RoundRobinSchedule(tau):
            return EASGDStrategy(mode="async", order="round_robin", tau=tau)
        case _:
            return EASGDStrategy(mode="async", tau=schedule.tau)


def train(strategy: Any, ranks: int, sleep: float, steps: int) -> tuple[list[float], float]:
    """Each rank's seconds to its last step, and the seconds to the end of training; the same on all ranks."""
    watch = Stopwatch()
    L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=ranks,
        max_epochs=1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Sleeper(sleep, steps))
    rows = torch.zeros(ranks, 2, dtype=torch.float64)
    rows[dist.get_rank()] = torch.tensor([watch.own, watch.total], dtype=torch.float64)
    dist.all_reduce(rows)
    return rows[:, 0].tolist(), rows[:, 1].max().item()


@dataclass(frozen=True)
class Calibration:
    """What this machine adds to exchanges that sleep.

    Attributes:
        reduction: Seconds of an all-reduce without a link.
        exchange: Seconds of an exchange with a served center without a link.
        turn: The same in round-robin order: until the next one's turn has come.
    """

    reduction: float
    exchange: float
    turn: float

    def predict(self, case: Case, added: float, steps: int) -> tuple[float, float]:
        """Seconds to the fastest worker's last step, and to the end, by the simulator.

        Args:
            case: The run.
            added: Seconds that a step takes beyond its sleep.
            steps: Steps of each worker.
        """
        speeds = case.cluster.speeds or [1.0] * case.cluster.workers
        seconds = [added + case.cluster.step_seconds / speed for speed in speeds]
        schedule, handling = case.schedule, self.exchange
        if isinstance(schedule, SynchronousSchedule):
            handling = self.reduction
        if isinstance(schedule, RoundRobinSchedule):
            schedule = replace(schedule, handover_seconds=max(0.0, self.turn - self.exchange))
        cluster = replace(
            case.cluster, step_seconds=1.0, speeds=[1 / each for each in seconds], handling_seconds=handling
        )
        finish = [event.time for event in schedule.timeline(cluster, steps) if isinstance(event, Finish)]
        return min(finish), time_run(schedule, cluster, steps).seconds


def per_step(strategy: Any, ranks: int, sleep: float, steps: int) -> float:
    """Seconds of a step, the mean of all ranks."""
    own, _ = train(strategy, ranks, sleep, steps)
    return sum(own) / ranks / steps


def calibrate(ranks: int, steps: int) -> Calibration:
    """Measure exchanges after each of steps that take no time."""
    bare = per_step(LocalStrategy(), ranks, 0.0, steps)
    reduction, exchange, turn = (
        max(0.0, per_step(strategy_of(schedule), ranks, 0.0, steps) - bare)
        for schedule in (SynchronousSchedule(1), AsynchronousSchedule(1), RoundRobinSchedule(1))
    )
    # In turn, one step comes for p exchanges.
    return Calibration(reduction, exchange, turn / ranks)


def measure(ranks: int, options: argparse.Namespace, center: Any) -> tuple[list[tuple[Any, ...]], Calibration]:
    """Run all cases on the ranks of this process's job; ``center`` is a lock that they share."""
    rank = int(os.environ["RANK"])  # no process group yet
    calibration = calibrate(ranks, options.steps)
    rows = []
    for case in cases(ranks, options.step):
        if options.cases and case.name not in options.cases:
            continue
        slowest = 1 / min(case.cluster.speeds or [1.0])
        sleep = options.step * (slowest if rank == ranks - 1 else 1.0)
        for _ in range(options.attempts):
            before = per_step(LocalStrategy(), ranks, options.step, options.steps) - options.step
            with throttled(case.cluster, center):
                own, total = train(strategy_of(case.schedule), ranks, sleep, options.steps)
            after = per_step(LocalStrategy(), ranks, options.step, options.steps) - options.step
            quiet = max(before, after) < options.step / 4 and abs(before - after) < options.step / 10
            if quiet:
                break
        added = (before + after) / 2
        fastest, end = calibration.predict(case, added, options.steps)
        # The meeting at the end is none of the simulator's; the last reduction, which synchronous workers wait for, is.
        real = total if isinstance(case.schedule, SynchronousSchedule) else max(own)
        row = case.name, ranks, case.schedule.tau, round(added, 4), "no" if quiet else "yes"
        rows.append((*row, "all workers", end, real))
        if isinstance(case.schedule, AsynchronousSchedule) and slowest > 1:
            rows.append((*row, "fastest worker", fastest, min(own)))
    return rows, calibration


def run(options: argparse.Namespace) -> tuple[list[tuple[Any, ...]], dict[int, Calibration]]:
    """Run all cases; returns their rows, and the calibration for each number of processes."""
    rows, calibrations = [], {}
    for ranks in options.ranks:
        lock = multiprocessing.get_context("fork").Lock()
        more, calibrations[ranks] = run_ranks(measure, ranks, options, lock, timeout=options.timeout)
        rows += more
    return rows, calibrations


def main() -> None:
    """Run, print the table, and write the results directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--step", type=float, default=0.05, help="seconds that a step sleeps")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--attempts", type=int, default=5, help="the most runs of a case on a busy machine")
    parser.add_argument("--cases", nargs="*", help="names of the cases to run; all by default")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one number of processes")
    parser.add_argument("--output", type=Path, help="folder for simulated_time.csv and setting.json")
    options = parser.parse_args()
    rows, calibrations = run(options)
    header = ("case", "workers", "tau", "added_to_step", "disturbed", "until")
    header += ("predicted_seconds", "real_seconds", "predicted_over_real")
    lines = [(*row[:6], *(round(each, 3) for each in (*row[6:], row[6] / row[7]))) for row in rows]
    widths = [24, 8, 5, 15, 10, 16, 18, 14, 20]
    for line in [header, *lines]:
        print("".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)))
    worst = max((abs(math.log(line[-1])) for line in lines if line[4] == "no"), default=math.nan)
    print(f"worst of those not disturbed: {100 * math.expm1(worst):.1f} %")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        with (options.output / "simulated_time.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *lines])
        setting: dict[str, Any] = {"ranks": options.ranks, "step": options.step, "steps": options.steps}
        setting |= {"calibration": {count: vars(each) for count, each in calibrations.items()}}
        setting |= {"torch": torch.__version__, "lightning": L.__version__, "python": platform.python_version()}
        setting |= {"machine": platform.machine(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        (options.output / "setting.json").write_text(json.dumps(setting, indent=2) + "\n")


if __name__ == "__main__":
    main()
