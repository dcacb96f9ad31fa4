"""Time and numbers together: the error of the center against simulated time."""

import math
from dataclasses import dataclass
from typing import final

from lightning_easgd.lab.simulation.cluster import Cluster
from lightning_easgd.lab.simulation.events import Exchange, Failure, Finish, Reduction
from lightning_easgd.lab.simulation.learning import Learner
from lightning_easgd.lab.simulation.problems import Problem
from lightning_easgd.lab.simulation.schedules import Schedule
from lightning_easgd.lab.simulation.workers import LocalSGD
from lightning_easgd.method.rates import MovingRates

__all__ = ["SimulatedRun", "Timing", "simulate", "time_run"]

_READINGS = 200


@final
@dataclass(frozen=True)
class Timing:
    """How long a run takes, whatever it learns.

    Attributes:
        seconds: Until the last worker has made all its steps, or the run has ended with a failure.
        waiting: Share of the workers' time in which they stood still for exchanges.
        exchanges: Vectors that workers exchanged with a center.
        completed: Whether the living workers made all their steps.
    """

    seconds: float
    waiting: float
    exchanges: int
    completed: bool


@final
@dataclass(frozen=True)
class SimulatedRun:
    """The error of the center against simulated time.

    Attributes:
        times: Simulated seconds, from 0.
        errors: The center's error at these times; a run that diverges ends with a value that is not finite.
        learner: Workers and center at the end.
    """

    times: list[float]
    errors: list[float]
    learner: Learner

    def time_to_error(self, target: float) -> float:
        """The first reading at which the error was at or below the target, seconds; infinite if there is none."""
        return next((time for time, error in zip(self.times, self.errors, strict=True) if error <= target), math.inf)


def time_run(schedule: Schedule, cluster: Cluster, steps: int) -> Timing:
    """Simulate only the time of a run."""
    seconds = waited = spent = 0.0
    exchanges, completed = 0, True
    for event in schedule.timeline(cluster, steps):
        match event:
            case Finish():
                seconds, waited, spent = max(seconds, event.time), waited + event.waited, spent + event.time
            case Exchange():
                exchanges += 1
            case Reduction():
                exchanges += cluster.workers
            case Failure(ends_run=True):
                seconds, completed = event.time, False
    return Timing(seconds, waited / spent if spent else 0.0, exchanges, completed)


def simulate(
    problem: Problem,
    schedule: Schedule,
    cluster: Cluster,
    optimizer: LocalSGD,
    rates: MovingRates | None = None,
    *,
    steps: int,
    every: float | None = None,
    target: float | None = None,
) -> SimulatedRun:
    """Simulate a run: what it learns, and when.

    Args:
        problem: What the workers learn.
        schedule: Who exchanges with whom and when.
        cluster: What it runs on.
        optimizer: The workers' optimizer.
        rates: α and β; the paper's by default.
        steps: Steps of each worker.
        every: Simulated seconds between two readings of the error; a 200th of the computing time by default.
        target: End at the first reading at or below this error.
    """
    learner = Learner(
        problem,
        optimizer,
        MovingRates() if rates is None else rates,
        workers=cluster.workers,
        tau=schedule.tau,
        steps=steps,
        centers=schedule.centers(cluster.workers),
    )
    every = steps * cluster.step_seconds / _READINGS if every is None else every
    readings = _Readings(problem, learner, -math.inf if target is None else target)
    now = 0.0
    for event in schedule.timeline(cluster, steps):
        now = event.time
        while readings.number * every <= now:
            if readings.take(readings.number * every):
                return readings.run()
        learner.apply(event)
        if isinstance(event, Failure) and event.ends_run:
            break
    readings.take(now)
    return readings.run()


@dataclass(eq=False)
class _Readings:
    """Reads the center's error, and again only when the center may have moved."""

    problem: Problem
    learner: Learner
    target: float
    number: int = 0

    def __post_init__(self) -> None:
        self._times: list[float] = []
        self._errors: list[float] = []
        self._exchanges = -1

    def take(self, time: float) -> bool:
        """Write the error at this time down, and say whether that is the last one."""
        if self.learner.exchanges != self._exchanges:
            self._exchanges = self.learner.exchanges
            self._error = self.problem.error(self.learner.center)
        self._times.append(time)
        self._errors.append(self._error)
        self.number += 1
        return self._error <= self.target or not math.isfinite(self._error)

    def run(self) -> SimulatedRun:
        return SimulatedRun(self._times, self._errors, self.learner)
