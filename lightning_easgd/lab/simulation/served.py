"""Schedules with served centers: every worker on its own clock, in turn, or below a tree of centers."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import final

from typing_extensions import override

from lightning_easgd.lab.simulation.cluster import Cluster, Link
from lightning_easgd.lab.simulation.events import Event, Exchange, Failure, Finish, Forward, Hop, Return
from lightning_easgd.lab.simulation.schedules import Schedule
from lightning_easgd.lab.simulation.turns import FreeOrder, RoundRobinOrder, Turns

__all__ = ["AsynchronousSchedule", "RoundRobinSchedule", "TreeSchedule"]


@final
@dataclass(frozen=True)
class AsynchronousSchedule(Schedule):
    """Algorithm 1: every worker exchanges with one served center on its own clock.

    A worker sends its vector before a step and has the answer when the step is done, or waits for it. The center
    takes the exchanges one after the other, in the order in which they come.
    """

    @override
    def timeline(self, cluster: Cluster, steps: int) -> Iterator[Event]:
        star = [0] * cluster.workers
        return _ServedRun(cluster, steps, self.tau, parents=star, turns=FreeOrder()).events()


@final
@dataclass(frozen=True)
class RoundRobinSchedule(Schedule):
    """As :class:`AsynchronousSchedule`, with workers that exchange in turn: 0, 1, …, p - 1, 0, ….

    An exchange begins when the one before it has been answered; a worker computes while it waits for its turn.

    Args:
        tau: τ.
        handover_seconds: Until a worker notices that its turn has come.
    """

    handover_seconds: float = 0.0

    @override
    def timeline(self, cluster: Cluster, steps: int) -> Iterator[Event]:
        return _ServedRun(
            cluster,
            steps,
            self.tau,
            parents=[0] * cluster.workers,
            turns=RoundRobinOrder(cluster.workers),
            handover_seconds=self.handover_seconds,
        ).events()


@final
@dataclass(frozen=True)
class TreeSchedule(Schedule):
    """EASGD tree of Zhang's thesis (NYU 2016, arXiv:1605.02216): workers, centers of groups of workers, a root.

    A worker exchanges with the center of its group every τ of its steps. That center does no gradient steps; it
    exchanges with the root, as a worker would, when its workers have made ``upper_tau`` steps each on average. It
    serves its workers meanwhile: the answer to what it has sent changes what it is by then. The groups are
    consecutive workers, of equal size or one less.

    Args:
        tau: τ, between workers and their group's center; 10 in the thesis.
        upper_tau: Period between those and the root, in workers' steps; 100 in the thesis.
        groups: Centers below the root; 0: the workers exchange with the root, which is
            :class:`AsynchronousSchedule`.
    """

    upper_tau: int = 100
    groups: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.upper_tau < self.tau:
            raise ValueError(
                f"TreeSchedule(tau={self.tau}, upper_tau={self.upper_tau}): centers do not exchange more often than"
                " their workers; let upper_tau be tau or more."
            )
        if self.groups < 0:
            raise ValueError(f"TreeSchedule(groups={self.groups}): a number of centers, 0 for a star.")

    @override
    def centers(self, workers: int) -> int:
        return 1 + min(self.groups, workers)

    @override
    def timeline(self, cluster: Cluster, steps: int) -> Iterator[Event]:
        groups = min(self.groups, cluster.workers)
        parents = [1 + worker * groups // cluster.workers if groups else 0 for worker in range(cluster.workers)]
        return _ServedRun(
            cluster, steps, self.tau, parents=parents, turns=FreeOrder(), forward_after=self.upper_tau / self.tau
        ).events()


@dataclass(eq=False)
class _SerialLink:
    """A center's link and its processor, which take one vector at a time."""

    cluster: Cluster
    shards: int
    free: float = 0.0  # when they have taken the last one

    def take(self, now: float, link: Link) -> float:
        """When the vector whose first byte arrives now has been taken in and answered."""
        size = self.cluster.message_bytes
        last_byte = now + link.occupied(size)
        self.free = max(self.free, now) + link.occupied(size / self.shards) + self.cluster.handling_seconds
        return max(self.free, last_byte)


_Action = Callable[[float], Iterable[Event]]


@dataclass(eq=False)
class _ServedRun:
    """A discrete-event simulation: a heap of actions in the order of their times."""

    cluster: Cluster
    steps: int
    tau: int
    parents: list[int]
    turns: Turns
    handover_seconds: float = 0.0
    forward_after: float = math.inf

    def __post_init__(self) -> None:
        cluster, parents = self.cluster, self.parents
        self._times = [cluster.step_times(worker) for worker in range(cluster.workers)]
        centers = max(parents) + 1
        # The root is spread over all nodes, the center of a group over the group's.
        shards = [cluster.shards, *[max(1, cluster.shards // max(1, centers - 1))] * (centers - 1)]
        self._links = [_SerialLink(cluster, count) for count in shards]
        self._alive = [True] * cluster.workers
        self._sharing = [parents.count(center) for center in range(centers)]
        self._served = [0] * centers
        self._forwarding = [False] * centers
        self._waited = [0.0] * cluster.workers
        self._begun: dict[int, tuple[int, float]] = {}  # clock, and when its step's computation ends
        self._heap: list[tuple[float, int, _Action]] = []
        self._numbers = count()  # of two actions at one time the first to be planned comes first

    def events(self) -> Iterator[Event]:
        for worker, seconds in self.cluster.failures.items():
            self._at(seconds, partial(self._fail, worker))
        for worker, times in enumerate(self._times):
            self._after_steps(worker, 0, times.take(min(self.tau, self.steps)))
        while self._heap:
            now, _, action = heapq.heappop(self._heap)
            yield from action(now)

    def _at(self, time: float, action: _Action) -> None:
        heapq.heappush(self._heap, (time, next(self._numbers), action))

    def _after_steps(self, worker: int, clock: int, time: float) -> None:
        """Plan what comes when the steps after this clock's exchange have been made."""
        if clock + self.tau < self.steps:
            self._at(time, partial(self._begin, worker, clock + self.tau))
        else:
            self._at(time, partial(self._finish, worker))

    def _begin(self, worker: int, clock: int, now: float) -> Iterable[Event]:
        if self._alive[worker]:
            self._begun[worker] = clock, now + self._times[worker].take(1)
            self._start(self.turns.request(worker), now)
        return ()

    def _start(self, workers: list[int], now: float) -> None:
        for worker in workers:
            self._at(now + self.handover_seconds + self.cluster.link.latency, partial(self._arrive, worker))

    def _arrive(self, worker: int, now: float) -> Iterable[Event]:
        done = self._links[self.parents[worker]].take(now, self.cluster.link)
        self._at(done, partial(self._serve, worker))
        return ()

    def _serve(self, worker: int, now: float) -> Iterable[Event]:
        center = self.parents[worker]
        yield Exchange(now, worker, self._begun[worker][0], center, max(1, self._sharing[center]))
        self._at(now + self._answer_seconds(self.cluster.link), partial(self._answer, worker))
        self._served[center] += 1
        yield from self._forward_if_due(center, now)

    def _answer(self, worker: int, now: float) -> Iterable[Event]:
        if not self._alive[worker]:
            return ()
        self._start(self.turns.release(worker), now)
        clock, computed = self._begun[worker]
        self._waited[worker] += max(0.0, now - computed)
        rest = min(self.tau, self.steps - clock) - 1
        self._after_steps(worker, clock, max(now, computed) + self._times[worker].take(rest))
        return ()

    def _finish(self, worker: int, now: float) -> Iterable[Event]:
        if self._alive[worker]:
            self._start(self.turns.leave(worker), now)
            yield Finish(now, worker, self._waited[worker])
            self._alive[worker] = False  # what befalls it from here on does not matter

    def _fail(self, worker: int, now: float) -> Iterable[Event]:
        if self._alive[worker]:
            self._alive[worker] = False
            self._sharing[self.parents[worker]] -= 1
            self._start(self.turns.leave(worker), now)
            yield Failure(now, worker, ends_run=False)

    def _forward_if_due(self, center: int, now: float) -> Iterable[Event]:
        if center == 0 or self._forwarding[center]:
            return
        if self._served[center] >= self.forward_after * max(1, self._sharing[center]):
            self._served[center] = 0
            self._forwarding[center] = True
            yield Forward(now, center)
            self._at(now + self._upper.latency, partial(self._hop_arrive, center))

    def _hop_arrive(self, center: int, now: float) -> Iterable[Event]:
        self._at(self._links[0].take(now, self._upper), partial(self._hop, center))
        return ()

    def _hop(self, center: int, now: float) -> Iterable[Event]:
        yield Hop(now, center, 0, sharing=len(self._links) - 1)
        self._at(now + self._answer_seconds(self._upper), partial(self._return, center))

    def _return(self, center: int, now: float) -> Iterable[Event]:
        self._forwarding[center] = False
        yield Return(now, center)
        yield from self._forward_if_due(center, now)

    @property
    def _upper(self) -> Link:
        return self.cluster.link if self.cluster.upper_link is None else self.cluster.upper_link

    def _answer_seconds(self, link: Link) -> float:
        # The pieces before the last have been answered while the later ones came.
        return link.latency + link.occupied(min(self.cluster.message_bytes, self.cluster.chunk_bytes))
