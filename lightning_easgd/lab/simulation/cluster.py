r"""The machines and links that a timeline runs on: how long a step, a transfer and an all-reduce take."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np

__all__ = ["Cluster", "Link", "Stall", "StepTimes"]


@final
@dataclass(frozen=True)
class Link:
    """A full-duplex link between a worker and the others.

    Args:
        latency: One-way delay of the first byte, seconds.
        bandwidth: Bytes per second in each direction.

    Raises:
        ValueError: If the latency is negative or the bandwidth not positive.
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"Link(latency={self.latency}): seconds, not negative and finite.")
        if not self.bandwidth > 0:
            raise ValueError(f"Link(bandwidth={self.bandwidth}): bytes per second, positive; math.inf is no limit.")

    def occupied(self, size: float) -> float:
        """Seconds for which ``size`` bytes occupy the link."""
        return size / self.bandwidth

    def ring_all_reduce(self, size: float, workers: int) -> float:
        r"""Seconds of a ring all-reduce of ``size`` bytes S over ``workers`` p.

        .. math:: 2 (p - 1) \left(L + \frac{S}{p B}\right)

        2 (p - 1) messages one after the other, each of a p-th of the buffer: latency L, size S, bandwidth B.
        """
        return 2 * (workers - 1) * (self.latency + self.occupied(size / workers))


@final
@dataclass(frozen=True)
class Stall:
    """A worker stands still once, before one of its steps.

    Args:
        worker: Which worker.
        clock: The steps that it has made by then.
        seconds: How long.
    """

    worker: int
    clock: int
    seconds: float


@final
@dataclass(frozen=True)
class Cluster:
    """p workers, their links, and what befalls them.

    Args:
        workers: p.
        step_seconds: Seconds of one step (forward, backward, optimizer, data) of a worker of speed 1.
        message_bytes: Bytes of one vector on the wire.
        link: Between any worker and the others, or the center.
        upper_link: Between the centers of a tree; None: as ``link``.
        speeds: Speed of each worker, 1 for the nominal one; None: all 1.
        jitter: Standard deviation of a step's time divided by its mean; the times are gamma distributed.
        shards: Parts that a served center is cut into, each with a link of its own. In a tree they are those of the
            root; the centers below it have equal parts of their number.
        handling_seconds: Time of one exchange beyond the transfer: locks, copies, arithmetic. A served center takes
            one worker at a time for as long.
        chunk_bytes: Size of the pieces in which a vector travels. A piece is answered while the next ones still come.
        stalls: Single delays.
        failures: Seconds after the start at which workers die.
        seed: Of the jitter.

    Raises:
        ValueError: If a value is out of its range.
    """

    workers: int
    step_seconds: float = 0.01
    message_bytes: float = 0.0
    link: Link = field(default_factory=Link)
    upper_link: Link | None = None
    speeds: Sequence[float] | None = None
    jitter: float = 0.0
    shards: int = 1
    handling_seconds: float = 0.0
    chunk_bytes: float = 2**20
    stalls: Sequence[Stall] = ()
    failures: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("workers", "step_seconds", "shards", "chunk_bytes"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Cluster({name}={value}): it has to be positive and finite.")
        for name in ("message_bytes", "jitter", "handling_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"Cluster({name}={value}): it has to be finite and not negative.")
        if self.speeds is not None and (
            len(self.speeds) != self.workers or not all(speed > 0 for speed in self.speeds)
        ):
            raise ValueError(f"Cluster(speeds={self.speeds}): one positive speed for each of {self.workers} workers.")
        named = {*self.failures, *(stall.worker for stall in self.stalls)}
        if not named <= set(range(self.workers)):
            raise ValueError(
                f"Cluster(workers={self.workers}): stalls and failures name the workers {sorted(named)}; the workers"
                f" are 0 to {self.workers - 1}."
            )

    def all_reduce_seconds(self) -> float:
        """Seconds of an all-reduce of one vector, from the moment at which the last worker has come."""
        return self.link.ring_all_reduce(self.message_bytes, self.workers) + self.handling_seconds

    def step_times(self, worker: int) -> "StepTimes":
        """The times of one worker's steps, from the first."""
        return StepTimes(self, worker)


@final
class StepTimes:
    """Hands out how long a worker's steps take, one after the other.

    Args:
        cluster: Whose worker it is.
        worker: Which one.
    """

    def __init__(self, cluster: Cluster, worker: int) -> None:
        self._mean = cluster.step_seconds / (1.0 if cluster.speeds is None else cluster.speeds[worker])
        self._jitter = cluster.jitter
        self._generator = np.random.default_rng([cluster.seed, worker])
        self._stalls = {stall.clock: stall.seconds for stall in cluster.stalls if stall.worker == worker}
        self._clock = 0

    def take(self, steps: int) -> float:
        """Seconds that the next ``steps`` steps take together."""
        first, self._clock = self._clock, self._clock + steps
        stalled = sum(seconds for clock, seconds in self._stalls.items() if first <= clock < self._clock)
        if self._jitter == 0 or steps == 0:
            return steps * self._mean + stalled
        # A sum of independent gamma variables of one scale is a gamma variable.
        scale = self._mean * self._jitter**2
        return float(self._generator.gamma(steps / self._jitter**2, scale)) + stalled
