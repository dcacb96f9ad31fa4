r"""What the simulated workers learn: the interface, and noisy quadratics."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.lab.simulation.noise import WorkerNoise

__all__ = ["Gradients", "Problem", "Quadratic", "spectrum"]


class Gradients(ABC):
    """A loss as stacked workers see it: where they start, and what they step along."""

    @abstractmethod
    def start(self) -> Tensor:
        """The point from which center and workers start, shape (d,); its dtype and device are those of the run."""

    @abstractmethod
    def gradients(self, points: Tensor, workers: Sequence[int], clocks: Sequence[int]) -> Tensor:
        """The stochastic gradients of some workers.

        Args:
            points: Where they are, shape (k, d).
            workers: Who they are, k different numbers.
            clocks: The steps that each has made. A worker's clocks are asked for in order, each once.

        Returns:
            Shape (k, d).
        """


class Problem(Gradients):
    """A loss, its stochastic gradients for each worker, and the error by which a run is judged.

    The gradient of a worker at a clock is a function of worker, clock and point alone: it does not matter in which
    order, or with whom together, the workers are computed.
    """

    @property
    @abstractmethod
    def message_bytes(self) -> int:
        """Bytes of one vector on the wire."""

    @abstractmethod
    def error(self, point: Tensor) -> float:
        """The error at a point, shape (d,), that counts for the time to error."""


def spectrum(dimension: int, largest: float = 1.0, condition: float = 100.0) -> Tensor:
    """Curvatures in geometric progression from ``largest / condition`` to ``largest``, shape (dimension,), float64."""
    return largest * condition ** -torch.linspace(1, 0, dimension, dtype=torch.float64)


@final
class Quadratic(Problem):
    r"""Noisy gradients of quadratics with a common curvature.

    .. math:: f_i(x) = \tfrac12 \sum_k h_k (x_k - b^i_k)^2, \qquad g^i(x) = h (x - b^i) - \sigma \xi,
              \quad \xi \sim N(0, I)

    The error is the loss of the workers' mean objective above its minimum,
    :math:`\tfrac12\sum_k h_k (x_k - \bar b_k)^2`.

    Args:
        curvatures: h, shape (d,).
        start: The first point, shape (d,); its dtype and device are those of the run.
        noise: σ, the standard deviation of each component of a gradient.
        minima: b, shape (d,) for all workers or (p, d) for each; None: 0.
        seed: Of the noise.
    """

    def __init__(
        self, curvatures: Tensor, start: Tensor, *, noise: float = 0.0, minima: Tensor | None = None, seed: int = 0
    ) -> None:
        self._start = start
        self._curvatures = curvatures.to(start)
        self._minima = (torch.zeros_like(start) if minima is None else minima.to(start)).expand(
            start.shape if minima is None or minima.ndim == 1 else minima.shape
        )
        self._best = self._minima if self._minima.ndim == 1 else self._minima.mean(0)
        self._noise = WorkerNoise(start, noise, seed) if noise > 0 else None

    @property
    @override
    def message_bytes(self) -> int:
        return self._start.nbytes

    @override
    def start(self) -> Tensor:
        return self._start.clone()

    @override
    def gradients(self, points: Tensor, workers: Sequence[int], clocks: Sequence[int]) -> Tensor:
        minima = self._minima if self._minima.ndim == 1 else self._minima[list(workers)]
        gradients = (points - minima).mul_(self._curvatures)
        return gradients if self._noise is None else self._noise.subtract_from_(gradients, workers, clocks)

    @override
    def error(self, point: Tensor) -> float:
        return float(0.5 * (self._curvatures * (point - self._best).square()).sum())
