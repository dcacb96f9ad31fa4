r"""The methods, synchronous, on stacked workers: who exchanges what and when, with the package's own equations.

Workers are stepped with gradients that the caller computes for all methods at once. An exchange at clock t comes before
step t + 1.
"""

import sys
from collections.abc import Sequence
from typing import final

from torch import Tensor

from lightning_easgd.lab.simulation import Gradients, LocalSGD
from lightning_easgd.lab.simulation.learning import meet
from lightning_easgd.lab.simulation.workers import StackedWorkers
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.rules import PlainRule

__all__ = ["Alone", "DataParallel", "Downpour", "Elastic", "PostLocal", "StackedMethod"]


@final
class _Handed(Gradients):
    """Gradients that are computed elsewhere."""

    def __init__(self, start: Tensor) -> None:
        self._start = start
        self.handed = start[None]

    def start(self) -> Tensor:
        return self._start.clone()

    def gradients(self, points: Tensor, workers: Sequence[int], clocks: Sequence[int]) -> Tensor:
        return self.handed


class StackedMethod:
    r"""p workers with one learning rate, which do not communicate; with p = 1 plain SGD.

    Args:
        start: Where workers and center start, shape (d,).
        optimizer: The workers' optimizer.
        workers: p.
        tau: τ.

    Attributes:
        count: p, the number of gradients for a step.
    """

    def __init__(self, start: Tensor, optimizer: LocalSGD, workers: int, tau: int) -> None:
        self.count = workers
        self._optimizer = optimizer
        self._tau = tau
        self._problem = _Handed(start)
        self._workers = StackedWorkers(self._problem, optimizer, self._copies(workers))

    @property
    def points(self) -> Tensor:
        """Where the gradients for the next step are to be taken, shape (p, d)."""
        return self._workers.points

    @property
    def center(self) -> Tensor:
        """What is evaluated, shape (d,)."""
        return self._workers.points.mean(0)

    def meet(self, clock: int) -> None:
        """Exchange what is due at a clock; called once for each clock."""

    def step(self, gradients: Tensor) -> None:
        """Step with gradients, shape (p, d)."""
        self._problem.handed = gradients
        self._workers.advance(self._workers.clocks + 1)

    def _copies(self, workers: int) -> int:
        return workers


@final
class Alone(StackedMethod):
    """SGD of workers without communication; one worker is the sequential control."""


@final
class Elastic(StackedMethod):
    r"""Synchronous EASGD with the paper's β = 0.9, α = β/p; EAMSGD if the optimizer has momentum."""

    def __init__(self, start: Tensor, optimizer: LocalSGD, workers: int, tau: int) -> None:
        super().__init__(start, optimizer, workers, tau)
        self._center = start.clone()
        self._alpha, self._beta = MovingRates().resolve(workers, optimizer.lr)

    @property
    def center(self) -> Tensor:  # noqa: D102
        return self._center

    def meet(self, clock: int) -> None:  # noqa: D102
        if clock > 0 and clock % self._tau == 0:
            meet(self._workers, slice(None), self._center, self._alpha, self._beta / self.count)


@final
class Downpour(StackedMethod):
    """DOWNPOUR; the workers come to the center in turn, and each takes over what those before it have added."""

    def __init__(self, start: Tensor, optimizer: LocalSGD, workers: int, tau: int) -> None:
        super().__init__(start, optimizer, workers, tau)
        self._center = start.clone()
        self._taken_over = self._workers.points.clone()

    @property
    def center(self) -> Tensor:  # noqa: D102
        return self._center

    def meet(self, clock: int) -> None:  # noqa: D102
        if clock == 0 or clock % self._tau:
            return
        for point, taken_over in zip(self._workers.points, self._taken_over, strict=True):
            PlainRule().move_([self._center], point - taken_over, 1.0, version=clock)
            point.copy_(self._center)
            taken_over.copy_(self._center)


@final
class DataParallel(StackedMethod):
    """DDP: one model, and the mean gradient of p mini-batches."""

    @property
    def points(self) -> Tensor:  # noqa: D102
        return self._workers.points.expand(self.count, -1)

    def step(self, gradients: Tensor) -> None:  # noqa: D102
        super().step(gradients.mean(0, keepdim=True))

    def _copies(self, workers: int) -> int:
        return 1


@final
class PostLocal(StackedMethod):
    r"""Post-local SGD: DDP for some steps, then the workers' mean replaces them every τ steps, as torch does it.

    torch's averager averages after the steps ``warmup_steps`` + 1, + 1 + τ, ….

    Attributes:
        warmup_steps: Steps of DDP.
    """

    warmup_steps = sys.maxsize

    def meet(self, clock: int) -> None:  # noqa: D102
        after = clock - self.warmup_steps - 1
        if after >= 0 and after % self._tau == 0:
            self._workers.points.copy_(self._workers.points.mean(0).expand_as(self._workers.points))

    def step(self, gradients: Tensor) -> None:  # noqa: D102
        if (self._workers.clocks < self.warmup_steps).all():
            gradients = gradients.mean(0).expand_as(gradients)
        super().step(gradients)
