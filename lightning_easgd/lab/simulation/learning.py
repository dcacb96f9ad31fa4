r"""What exchanges do to the numbers: the events of a timeline applied to stacked workers and their centers.

The equations are those of :mod:`lightning_easgd.method.elastic`, which training runs on, too.
"""

from typing import final

import numpy as np
import torch
from torch import Tensor

from lightning_easgd.lab.simulation.events import Event, Exchange, Failure, Forward, Hop, Reduction, Return
from lightning_easgd.lab.simulation.problems import Problem
from lightning_easgd.lab.simulation.workers import LocalSGD, StackedWorkers
from lightning_easgd.method.elastic import elastic_difference, elastic_pull_, elastic_push_
from lightning_easgd.method.rates import MovingRates

__all__ = ["Learner", "meet"]


def meet(workers: StackedWorkers, rows: slice, center: Tensor, alpha: float, center_alpha: float) -> None:
    r"""An elastic exchange of some workers with their center, all at once.

    The center moves now, and the workers with their next step, whose gradient is thus taken where they are now.

    Args:
        workers: The workers, of which
        rows: are these.
        center: :math:`\tilde x`, changed in place, shape (d,).
        alpha: α, by which the workers move.
        center_alpha: By which each of them moves the center.
    """
    (differences,) = elastic_difference([workers.positions(rows)], [center])
    workers.owe(rows, differences, alpha)
    elastic_push_([center], [differences.sum(0)], center_alpha)


@final
class Learner:
    r"""p workers and their centers.

    Workers step when an event needs them to have stepped, and then all that may do so step together: until its next
    exchange a worker depends on nobody.

    Args:
        problem: Where the gradients come from.
        optimizer: The workers' optimizer.
        rates: α and β of every exchange, between centers of a tree, too; p is the number of those that share a center.
        workers: p.
        tau: τ, the period of the workers' exchanges. There is none at clock 0, where workers and center are equal.
        steps: Steps of each worker.
        centers: Centers; number 0 is the one that is evaluated.

    Attributes:
        exchanges: Vectors that workers and centers have exchanged so far.
    """

    def __init__(
        self,
        problem: Problem,
        optimizer: LocalSGD,
        rates: MovingRates,
        *,
        workers: int,
        tau: int,
        steps: int,
        centers: int = 1,
    ) -> None:
        self._rates = rates
        self._lr = optimizer.lr
        self._tau = tau
        self._steps = steps
        self._workers = StackedWorkers(problem, optimizer, workers)
        self._centers: list[Tensor] = list(problem.start().repeat(centers, 1))
        self._horizons = np.full(workers, min(tau, steps), np.int64)
        self._sent: dict[int, Tensor] = {}
        self._answers: dict[int, tuple[Tensor, float]] = {}
        self._lost: set[int] = set()
        self.exchanges = 0

    @property
    def center(self) -> Tensor:
        r""":math:`\tilde x` as it is after the events so far, shape (d,)."""
        return self._centers[0]

    @property
    def centers(self) -> list[Tensor]:
        """All centers of a tree, the root first; each of shape (d,)."""
        return self._centers

    @torch.no_grad()
    def positions(self) -> Tensor:
        """Where the living workers are when they have stepped as far as the events so far let them, shape (p, d).

        That is the last step before the next exchange, or the end of the run.
        """
        self._workers.advance(self._horizons)
        living = [worker for worker in range(len(self._horizons)) if worker not in self._lost]
        return self._workers.positions(slice(None))[living]

    @torch.no_grad()
    def apply(self, event: Event) -> None:
        """Do what an event does; events come in the order of the timeline."""
        match event:
            case Reduction():
                self._reduce(event)
            case Exchange():
                self._exchange(event)
            case Forward(center=center):
                self._sent[center] = self._centers[center].clone()
            case Hop():
                self._hop(event)
            case Return(center=center):
                differences, alpha = self._answers.pop(center)
                elastic_pull_([self._centers[center]], [differences], alpha)
            case Failure(worker=worker):
                self._lost.add(worker)

    def _reduce(self, event: Reduction) -> None:
        everyone = slice(None)
        count = len(self._horizons)
        self._bring(everyone, event.clock)
        alpha, beta = self._rates.resolve(count, self._lr)
        meet(self._workers, everyone, self.center, alpha, beta / count)
        self._horizons[:] = self._next_horizon(event.clock)
        self.exchanges += count

    def _exchange(self, event: Exchange) -> None:
        row = slice(event.worker, event.worker + 1)
        self._bring(row, event.clock)
        alpha, beta = self._rates.resolve(event.sharing, self._lr)
        meet(self._workers, row, self._centers[event.center], alpha, beta / event.sharing)
        self._horizons[row] = self._next_horizon(event.clock)
        self.exchanges += 1

    def _hop(self, event: Hop) -> None:
        alpha, beta = self._rates.resolve(event.sharing, self._lr)
        center = self._centers[event.center]
        (differences,) = elastic_difference([self._sent.pop(event.child)], [center])
        elastic_push_([center], [differences], beta / event.sharing)
        self._answers[event.child] = differences, alpha
        self.exchanges += 1

    def _bring(self, rows: slice, clock: int) -> None:
        if (self._workers.clocks[rows] < clock).any():
            self._workers.advance(self._horizons)
        assert (self._workers.clocks[rows] == clock).all()

    def _next_horizon(self, clock: int) -> int:
        return min(clock + self._tau, self._steps)
