"""Who exchanges with whom and when: the interface of the schedules, and synchronous EASGD."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from lightning_easgd.lab.simulation.cluster import Cluster
from lightning_easgd.lab.simulation.events import Event, Failure, Finish, Reduction

__all__ = ["Schedule", "SynchronousSchedule"]


@dataclass(frozen=True)
class Schedule(ABC):
    """The order of a run's exchanges in simulated time. It knows nothing of the numbers that are exchanged.

    Args:
        tau: τ, the communication period of the workers, in their own steps.

    Raises:
        ValueError: If it is below 1.
    """

    tau: int = 10

    def __post_init__(self) -> None:
        if self.tau < 1:
            raise ValueError(f"{type(self).__name__}(tau={self.tau}): the period is a number of steps, 1 or more.")

    @abstractmethod
    def timeline(self, cluster: Cluster, steps: int) -> Iterator[Event]:
        """The events of a run of so many steps of each worker, in order of their times.

        As in training, the exchange at clock 0 is left out, and no exchange is begun after the last step.
        """

    def centers(self, workers: int) -> int:  # noqa: ARG002 - most schedules have one
        """How many centers this many workers have."""
        return 1


@final
@dataclass(frozen=True)
class SynchronousSchedule(Schedule):
    """All workers exchange at the same clocks, by a ring all-reduce that runs beside the next steps.

    The reduction starts when the last worker has come. A worker's own pull needs only the old center, so it waits for
    nothing but, at its next exchange, the end of the last one. If a worker dies, the run ends, as a real one does.
    """

    @override
    def timeline(self, cluster: Cluster, steps: int) -> Iterator[Event]:
        times = [cluster.step_times(worker) for worker in range(cluster.workers)]
        reduce_seconds = cluster.all_reduce_seconds()
        died = min(cluster.failures.values(), default=math.inf)
        waited = [0.0] * cluster.workers
        ready = [each.take(min(self.tau, steps)) for each in times]
        arrived = 0.0  # the last reduction
        for clock in range(self.tau, steps, self.tau):
            begins = [max(here, arrived) for here in ready]
            waited = [seconds + begin - here for seconds, begin, here in zip(waited, begins, ready, strict=True)]
            arrived = max(begins) + reduce_seconds
            if died < arrived:
                break
            yield Reduction(arrived, clock)
            taken = min(self.tau, steps - clock)
            ready = [begin + each.take(taken) for begin, each in zip(begins, times, strict=True)]
        if died < max(*ready, arrived):
            yield Failure(died, min(cluster.failures, key=cluster.failures.__getitem__), ends_run=True)
            return
        # At the end all wait for the last reduction.
        for here, worker in sorted((max(here, arrived), worker) for worker, here in enumerate(ready)):
            yield Finish(here, worker, waited[worker] + here - ready[worker])
