r"""Where synchronous EASGD and EAMSGD are stable on a quadratic.

With :math:`f(x) = \tfrac h2 x^2` a step of EAMSGD (Algorithm 2 with the center of eq. 6; EASGD has δ = 0) is

.. math::
    v^i &\leftarrow \delta v^i - \eta h (x^i + \delta v^i) \\
    x^i &\leftarrow x^i + v^i - \alpha (x^i - \tilde x) \\
    \tilde x &\leftarrow \tilde x + \tfrac\beta p \textstyle\sum_i (x^i - \tilde x)

with the elastic terms in every τ-th step only. The workers' mean and the center form one system, the *mean mode*, with
state (x, v, x̃). The workers' distances from their mean, the p - 1 *difference modes*, have the state (x, v); there the
center stands still.
"""

import numpy as np
from numpy.typing import ArrayLike

from lightning_easgd.stability.spectra import Array, first_unstable, spectral_radius

__all__ = [
    "difference_map",
    "largest_alpha",
    "largest_moving_rate",
    "largest_scaled_lr",
    "mean_map",
    "nesterov_scaled_lr",
    "radius",
]


def largest_alpha(beta: ArrayLike, scaled_lr: ArrayLike = 0.0) -> Array:
    r"""The largest stable worker's moving rate for a given center's rate; δ = 0, τ = 1.

    .. math:: \alpha \le (2 - \eta h)(2 - \beta) / 2

    This is the Schur-Cohn condition at the eigenvalue -1 of the mean mode. It implies that of the difference modes,
    :math:`\alpha \le 2 - \eta h`. For :math:`\eta h \to 0` it reads :math:`\alpha + \beta \le 2`: without gradients
    the gap between the workers' mean and the center is multiplied by :math:`1 - \alpha - \beta` at each exchange.

    Args:
        beta: β in [0, 2].
        scaled_lr: ηh in [0, 2].
    """
    beta, scaled_lr = np.asarray(beta, float), np.asarray(scaled_lr, float)
    return np.asarray((2 - scaled_lr) * (2 - beta) / 2)


def largest_moving_rate(workers: ArrayLike, scaled_lr: ArrayLike = 0.0) -> Array:
    r"""The largest stable moving rate of the symmetric exchange, β = pα; δ = 0, τ = 1.

    .. math:: \alpha \le \frac{4 - 2 \eta h}{2 (p + 1) - p \eta h}

    :func:`largest_alpha` solved for :math:`\beta = p\alpha`. It is stricter than the round-robin order's limit, which
    does not depend on p: here all p workers push the center at once.

    Args:
        workers: p ≥ 1.
        scaled_lr: ηh in [0, 2].
    """
    workers, scaled_lr = np.asarray(workers, float), np.asarray(scaled_lr, float)
    return np.asarray((4 - 2 * scaled_lr) / (2 * (workers + 1) - workers * scaled_lr))


def nesterov_scaled_lr(momentum: float) -> float:
    r"""The largest stable ηh of a worker alone, :math:`(2 + 2\delta) / (1 + 2\delta)`; 2 for δ = 0."""
    return (2 + 2 * momentum) / (1 + 2 * momentum)


def mean_map(scaled_lr: ArrayLike, alpha: ArrayLike, beta: ArrayLike, momentum: float = 0.0, tau: int = 1) -> Array:
    """The map of (mean x, mean v, x̃) over a period: one step with an exchange, then τ - 1 without.

    Args:
        scaled_lr: ηh; ``scaled_lr``, ``alpha`` and ``beta`` are broadcast against each other.
        alpha: The worker's moving rate α.
        beta: The center's moving rate β.
        momentum: δ.
        tau: τ ≥ 1.

    Returns:
        Matrices, of shape (..., 3, 3).
    """
    exchange = _mean_step(scaled_lr, alpha, beta, momentum)
    return np.linalg.matrix_power(_mean_step(scaled_lr, 0.0, 0.0, momentum), tau - 1) @ exchange


def difference_map(scaled_lr: ArrayLike, alpha: ArrayLike, momentum: float = 0.0, tau: int = 1) -> Array:
    """The map of (x, v) of a difference mode over a period, of shape (..., 2, 2); arguments as :func:`mean_map`'s."""
    return mean_map(scaled_lr, alpha, 0.0, momentum, tau)[..., :2, :2]


def radius(
    scaled_lr: ArrayLike, alpha: ArrayLike, beta: ArrayLike, *, workers: int, momentum: float = 0.0, tau: int = 1
) -> Array:
    """The spectral radius of the map of all workers and the center over a period of τ steps.

    Args:
        scaled_lr: ηh; ``scaled_lr``, ``alpha`` and ``beta`` are broadcast against each other.
        alpha: The worker's moving rate α.
        beta: The center's moving rate β.
        workers: p; matters only in that one worker has no difference mode.
        momentum: δ.
        tau: τ ≥ 1.

    Returns:
        Radii, of the broadcast shape.
    """
    mean = spectral_radius(mean_map(scaled_lr, alpha, beta, momentum, tau))
    if workers == 1:
        return mean
    return np.maximum(mean, spectral_radius(difference_map(scaled_lr, alpha, momentum, tau)))


def largest_scaled_lr(alpha: float, beta: float, *, workers: int, momentum: float = 0.0, tau: int = 1) -> float:
    """The ηh below which every curvature is stable; arguments as :func:`radius`'s.

    It is found numerically. For δ = 0, τ = 1 it is the solution of :func:`largest_alpha`.
    """
    return first_unstable(lambda s: radius(s, alpha, beta, workers=workers, momentum=momentum, tau=tau), end=2.5)


def _mean_step(scaled_lr: ArrayLike, alpha: ArrayLike, beta: ArrayLike, momentum: float) -> Array:
    s, a, b = np.broadcast_arrays(*(np.asarray(value, float) for value in (scaled_lr, alpha, beta)))
    step = np.zeros((*s.shape, 3, 3))
    step[..., 0, 0] = 1 - s - a
    step[..., 0, 1] = step[..., 1, 1] = momentum * (1 - s)
    step[..., 0, 2] = a
    step[..., 1, 0] = -s
    step[..., 2, 0] = b
    step[..., 2, 2] = 1 - b
    return step
