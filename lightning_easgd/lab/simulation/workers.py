r"""The local steps of p workers at once: stacked vectors, one torch SGD step for all that step together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.sgd import sgd

from lightning_easgd.lab.simulation.problems import Gradients
from lightning_easgd.method.elastic import elastic_pull_, nesterov_position_

__all__ = ["LocalSGD", "StackedWorkers"]


@final
@dataclass(frozen=True)
class LocalSGD:
    """The workers' optimizer: ``torch.optim.SGD``, Nesterov if it has momentum.

    Args:
        lr: η.
        momentum: δ; with it the workers are those of EAMSGD.
        weight_decay: λ, as torch's: added to the gradient as λx.

    Raises:
        ValueError: If a value is out of its range.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"LocalSGD(lr={self.lr}): the learning rate is positive.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"LocalSGD(momentum={self.momentum}): Nesterov momentum lies in [0, 1); 0 is plain SGD.")

    def step_(self, points: Tensor, gradients: Tensor, buffers: Tensor) -> None:
        """One step of torch's own SGD on stacked vectors, shape (k, d), in place."""
        has_momentum = self.momentum > 0
        sgd(
            [points],
            [gradients],
            [buffers if has_momentum else None],
            foreach=False,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=has_momentum,
            maximize=False,
        )


@final
class StackedWorkers:
    r"""p workers that start at one point.

    Args:
        problem: Where the gradients come from.
        optimizer: What each worker does with them.
        workers: p.

    Attributes:
        points: The parameters as the optimizer stores them, shape (p, d): :math:`x^i`, with momentum the look-ahead
            point :math:`y^i`.
        clocks: Steps of each worker so far, shape (p,).
    """

    def __init__(self, problem: Gradients, optimizer: LocalSGD, workers: int) -> None:
        self._problem = problem
        self._optimizer = optimizer
        self.points = problem.start().repeat(workers, 1)
        self.clocks: NDArray[np.int64] = np.zeros(workers, np.int64)
        # torch starts the buffer at the first gradient, which is δ·0 + g.
        self._buffers = torch.zeros_like(self.points) if optimizer.momentum > 0 else self.points[:0]
        self._pulls = torch.empty_like(self.points)
        self._alphas = np.zeros(workers)
        self._pull_due = np.zeros(workers, bool)

    def positions(self, rows: slice) -> Tensor:
        """What the workers exchange, :math:`x^i` (with momentum :math:`y + ηδb`), shape (k, d); a copy."""
        positions = self.points[rows].clone()
        if self._optimizer.momentum > 0:
            nesterov_position_([positions], [self._buffers[rows]], self._optimizer.lr * self._optimizer.momentum)
        return positions

    def owe(self, rows: slice, differences: Tensor, alpha: float) -> None:
        """Pull workers by α times these differences, shape (k, d), once they have made their next step."""
        self._pulls[rows] = differences
        self._alphas[rows] = alpha
        self._pull_due[rows] = True

    def advance(self, limits: NDArray[np.int64]) -> None:
        """Let every worker step until its clock is at its limit, as many workers at a time as can."""
        while True:
            rows = np.flatnonzero(self.clocks < limits)
            if len(rows) == 0:
                return
            if len(rows) == len(self.clocks):
                self._step_all()
            else:
                self._step(rows)

    def _step_all(self) -> None:
        gradients = self._problem.gradients(self.points, range(len(self.clocks)), self.clocks.tolist())
        self._optimizer.step_(self.points, gradients, self._buffers)
        self._pull(np.arange(len(self.clocks)))
        self.clocks += 1

    def _step(self, rows: NDArray[np.int64]) -> None:
        index = torch.from_numpy(rows).to(self.points.device)
        points = self.points[index]
        buffers = self._buffers[index] if self._optimizer.momentum > 0 else self._buffers
        gradients = self._problem.gradients(points, rows.tolist(), self.clocks[rows].tolist())
        self._optimizer.step_(points, gradients, buffers)
        self.points[index] = points
        if self._optimizer.momentum > 0:
            self._buffers[index] = buffers
        self._pull(rows)
        self.clocks[rows] += 1

    def _pull(self, rows: NDArray[np.int64]) -> None:
        due = rows[self._pull_due[rows]]
        for alpha in np.unique(self._alphas[due]):
            self._pull_by(due[self._alphas[due] == alpha], float(alpha))
        self._pull_due[due] = False

    def _pull_by(self, rows: NDArray[np.int64], alpha: float) -> None:
        if len(rows) == len(self.clocks):
            elastic_pull_([self.points], [self._pulls], alpha)
            return
        index: Sequence[int] | Tensor = torch.from_numpy(rows).to(self.points.device)
        points = self.points[index]
        elastic_pull_([points], [self._pulls[index]], alpha)
        self.points[index] = points
