"""One simulated run, described by plain values: what ``easgd-simulate`` reads from its words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import final

from lightning_easgd.lab.simulation.cluster import Cluster, Link
from lightning_easgd.lab.simulation.digits import digits_network, digits_problem
from lightning_easgd.lab.simulation.problems import Problem, Quadratic, spectrum
from lightning_easgd.lab.simulation.schedules import Schedule, SynchronousSchedule
from lightning_easgd.lab.simulation.served import AsynchronousSchedule, RoundRobinSchedule, TreeSchedule
from lightning_easgd.lab.simulation.simulator import SimulatedRun, Timing, simulate, time_run
from lightning_easgd.lab.simulation.workers import LocalSGD
from lightning_easgd.method.rates import MovingRates

__all__ = ["PROBLEMS", "SCHEDULES", "Scenario"]

PROBLEMS = ("quadratic", "digits")
SCHEDULES = ("sync", "async", "round_robin", "tree")
_TARGETS: Mapping[str, float] = MappingProxyType({"quadratic": 0.01, "digits": 0.05})


@final
@dataclass(frozen=True)
class Scenario:
    """What is learnt, by whom, on what.

    Args:
        problem: "quadratic" (curvatures in geometric progression up to 1; its first error is 1) or "digits" (a small
            perceptron; its error is the share of wrong test images).
        schedule: "sync", "async", "round_robin" or "tree".
        workers: p.
        tau: τ.
        lr: η.
        momentum: δ.
        alpha: The worker's moving rate; β / p if left out.
        beta: The center's moving rate; pα if left out, 0.9 if ``alpha`` is left out, too.
        steps: The most steps of each worker.
        target: The error whose time is asked for; None: 0.01 of the quadratic, 0.05 of the digits.
        step_seconds: Seconds of one step.
        jitter: Standard deviation of a step's time divided by its mean.
        straggler: How many times slower the last worker is.
        failures: How many workers die, the last ones first.
        failure_seconds: When they die.
        megabytes: Size of a vector on the wire, 10⁶ bytes; None: as the problem's.
        bandwidth: Of each link, 10⁶ bytes per second in each direction.
        latency: Of each link, one way, seconds.
        upper_latency: Between the centers of a tree; None: as ``latency``.
        workers_per_node: A served center has a shard on every node.
        handling_seconds: Time of one exchange beyond its transfer.
        upper_tau: Of a tree: period between the groups' centers and the root.
        groups: Of a tree: centers below the root; None: about √p.
        dimension: Of the quadratic.
        condition: Of the quadratic: largest divided by smallest curvature.
        noise: Of the quadratic: standard deviation of a gradient's component.
        batch_size: Of the digits.
        seed: Of noise, data order and jitter.

    Raises:
        ValueError: If a name is unknown or a number is out of its range.
    """

    problem: str = "quadratic"
    schedule: str = "sync"
    workers: int = 4
    tau: int = 10
    lr: float = 0.1
    momentum: float = 0.0
    alpha: float | None = None
    beta: float | None = None
    steps: int = 2000
    target: float | None = None
    step_seconds: float = 0.1
    jitter: float = 0.1
    straggler: float = 1.0
    failures: int = 0
    failure_seconds: float = 1.0
    megabytes: float | None = None
    bandwidth: float = math.inf
    latency: float = 0.0
    upper_latency: float | None = None
    workers_per_node: int = 8
    handling_seconds: float = 0.0
    upper_tau: int = 100
    groups: int | None = None
    dimension: int = 100
    condition: float = 100.0
    noise: float = 0.1
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("problem", PROBLEMS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)}: unknown; choose one of {', '.join(known)}")
        for name in ("workers", "steps", "workers_per_node", "straggler", "dimension", "condition"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more")
        if not 0 <= self.failures < self.workers:
            raise ValueError(f"failures={self.failures}: one of the {self.workers} workers at least has to live")

    @property
    def target_error(self) -> float:
        """The error whose time is asked for."""
        return _TARGETS[self.problem] if self.target is None else self.target

    def run(self) -> SimulatedRun:
        """Simulate it, up to the target error."""
        problem = self.make_problem()
        return simulate(
            problem,
            self.make_schedule(),
            self.make_cluster(problem.message_bytes),
            LocalSGD(self.lr, self.momentum),
            MovingRates(self.alpha, self.beta),
            steps=self.steps,
            target=self.target_error,
        )

    def time(self) -> Timing:
        """Simulate the time of all steps, whatever they learn."""
        size = self.make_problem().message_bytes if self.megabytes is None else 0
        return time_run(self.make_schedule(), self.make_cluster(size), self.steps)

    def run_alone(self) -> SimulatedRun:
        """Simulate one worker without communication: plain SGD, whose "center" is the worker itself."""
        cluster = Cluster(1, step_seconds=self.step_seconds, jitter=self.jitter, seed=self.seed)
        return simulate(
            replace(self, workers=1, failures=0).make_problem(),
            AsynchronousSchedule(1),
            cluster,
            LocalSGD(self.lr, self.momentum),
            MovingRates(alpha=0.0, beta=1.0),
            steps=self.steps,
            target=self.target_error,
        )

    def make_problem(self) -> Problem:
        """What is learnt."""
        if self.problem == "digits":
            return digits_problem(digits_network(self.seed), batch_size=self.batch_size, seed=self.seed)
        curvatures = spectrum(self.dimension, 1.0, self.condition)
        start = (2 / curvatures.sum()).sqrt().expand(self.dimension).float()
        return Quadratic(curvatures, start, noise=self.noise, seed=self.seed)

    def make_schedule(self) -> Schedule:
        """Who exchanges with whom and when."""
        match self.schedule:
            case "sync":
                return SynchronousSchedule(self.tau)
            case "async":
                return AsynchronousSchedule(self.tau)
            case "round_robin":
                return RoundRobinSchedule(self.tau)
            case _:
                groups = round(math.sqrt(self.workers)) if self.groups is None else self.groups
                return TreeSchedule(self.tau, max(self.tau, self.upper_tau), groups)

    def make_cluster(self, message_bytes: float) -> Cluster:
        """What it runs on; this is the size of a vector on the wire, if ``megabytes`` does not say otherwise."""
        speeds = None if self.straggler == 1 else [*[1.0] * (self.workers - 1), 1 / self.straggler]
        bandwidth = 1e6 * self.bandwidth
        return Cluster(
            self.workers,
            step_seconds=self.step_seconds,
            message_bytes=message_bytes if self.megabytes is None else 1e6 * self.megabytes,
            link=Link(self.latency, bandwidth),
            upper_link=None if self.upper_latency is None else Link(self.upper_latency, bandwidth),
            speeds=speeds,
            jitter=self.jitter,
            shards=-(-self.workers // self.workers_per_node),
            handling_seconds=self.handling_seconds,
            failures={self.workers - 1 - number: self.failure_seconds for number in range(self.failures)},
            seed=self.seed,
        )
