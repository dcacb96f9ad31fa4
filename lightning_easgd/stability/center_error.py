r"""Bias and variance of the center of synchronous EASGD on a noisy quadratic, and of its average over time.

Model (paper, supplement): one dimension, gradients :math:`g = h x - b - \xi` with
independent noise of variance :math:`\sigma^2`, minimum :math:`x^* = b / h`, β = pα, τ = 1, δ = 0. With

.. math::
    a = \eta h + (p + 1)\alpha, \quad c^2 = \eta h p \alpha, \quad
    \gamma = 1 - \tfrac12 \bigl(a - \sqrt{a^2 - 4c^2}\bigr), \quad
    \varphi = 1 - \tfrac12 \bigl(a + \sqrt{a^2 - 4c^2}\bigr)

γ and φ are the eigenvalues of the mean mode. They are real and different, as
:math:`a^2 - 4c^2 = (\eta h)^2 - 2\eta h (p - 1)\alpha + (p + 1)^2\alpha^2 > 0` for α > 0.
:func:`moments` is the exact recursion of the same quantities for any β, δ and τ.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lightning_easgd.stability.spectra import Array
from lightning_easgd.stability.synchronous import mean_map

__all__ = [
    "Moments",
    "bias",
    "double_average_limit",
    "double_average_variance",
    "eigenvalues",
    "many_workers_limit",
    "moments",
    "steady_variance",
    "variance",
]


def eigenvalues(scaled_lr: ArrayLike, alpha: ArrayLike, workers: ArrayLike) -> tuple[Array, Array]:
    """γ and φ of the module's docstring; γ > φ.

    Args:
        scaled_lr: ηh; the arguments are broadcast against each other.
        alpha: α > 0.
        workers: p.
    """
    s, alpha, p = (np.asarray(value, float) for value in (scaled_lr, alpha, workers))
    a = s + (p + 1) * alpha
    root = np.sqrt(a**2 - 4 * s * p * alpha)
    return np.asarray(1 - (a - root) / 2), np.asarray(1 - (a + root) / 2)


def bias(steps: ArrayLike, *, scaled_lr: float, alpha: float, workers: Array, center: float) -> Array:
    r"""The mean error of the center.

    .. math::
        E \tilde x_t - x^* &= \gamma^t (\tilde x_0 - x^*) + \alpha u_0 \frac{\gamma^t - \varphi^t}{\gamma - \varphi} \\
        u_0 &= \sum_i \Bigl[x^i_0 - x^* - \frac{\alpha}{1 - p\alpha - \varphi} (\tilde x_0 - x^*)\Bigr]

    Args:
        steps: t.
        scaled_lr: ηh.
        alpha: α > 0.
        workers: The workers' first errors :math:`x^i_0 - x^*`, of shape (p,).
        center: The center's first error :math:`\tilde x_0 - x^*`.
    """
    t, workers = np.asarray(steps, float), np.asarray(workers, float)
    gamma, phi = eigenvalues(scaled_lr, alpha, workers.size)
    u0 = np.sum(workers - alpha / (1 - workers.size * alpha - phi) * center)
    return np.asarray(gamma**t * center + alpha * u0 * (gamma**t - phi**t) / (gamma - phi))


def variance(
    steps: ArrayLike, *, lr: ArrayLike, curvature: ArrayLike, alpha: ArrayLike, workers: ArrayLike, noise: float = 1.0
) -> Array:
    r"""The variance of the center after t steps from a start without randomness.

    .. math:: V \tilde x_t = \frac{p^2\alpha^2\eta^2}{(\gamma - \varphi)^2} \Bigl[
              \frac{\gamma^2 - \gamma^{2t}}{1 - \gamma^2} + \frac{\varphi^2 - \varphi^{2t}}{1 - \varphi^2}
              - 2 \frac{\gamma\varphi - (\gamma\varphi)^t}{1 - \gamma\varphi} \Bigr] \frac{\sigma^2}{p}

    Args:
        steps: t ≥ 1, ``inf`` for the limit where it is stable; the arguments are broadcast against each other.
        lr: η.
        curvature: h.
        alpha: α > 0.
        workers: p.
        noise: σ, the standard deviation of a gradient.
    """
    t, lr, alpha, p = (np.asarray(value, float) for value in (steps, lr, alpha, workers))
    gamma, phi = eigenvalues(lr * np.asarray(curvature, float), alpha, p)

    def summed(product: Array) -> Array:
        return np.asarray((product - product**t) / (1 - product))

    bracket = summed(gamma**2) + summed(phi**2) - 2 * summed(gamma * phi)
    return np.asarray(p * (alpha * lr * noise / (gamma - phi)) ** 2 * bracket)


def steady_variance(
    *, lr: ArrayLike, curvature: ArrayLike, alpha: ArrayLike, workers: ArrayLike, noise: float = 1.0
) -> Array:
    """The limit of :func:`variance` for t → ∞; infinite where the center is unstable."""
    lr, curvature = np.asarray(lr, float), np.asarray(curvature, float)
    gamma, phi = eigenvalues(lr * curvature, alpha, workers)
    stable = (np.abs(gamma) < 1) & (np.abs(phi) < 1)
    with np.errstate(over="ignore", invalid="ignore"):
        limit = variance(np.inf, lr=lr, curvature=curvature, alpha=alpha, workers=workers, noise=noise)
    return np.where(stable, limit, np.inf)


def many_workers_limit(scaled_lr: ArrayLike, beta: ArrayLike) -> Array:
    r"""The limit of p times the center's steady mean squared error for p → ∞ with fixed β, in units of σ²/h².

    .. math:: \frac{\beta\eta h}{(2 - \beta)(2 - \eta h)} \cdot
              \frac{2 - \beta - \eta h + \beta\eta h}{\beta + \eta h - \beta\eta h}

    It is finite: p workers are as good as a mini-batch p times as large. It vanishes for β → 0, as a center that
    moves slowly averages over time.
    """
    s, b = np.asarray(scaled_lr, float), np.asarray(beta, float)
    return np.asarray(b * s / ((2 - b) * (2 - s)) * (2 - b - s + b * s) / (b + s - b * s))


def double_average_limit(curvature: float, workers: int, noise: float = 1.0) -> float:
    r"""The limit of t times the variance of the center's average over time (paper, lemma on double averaging).

    .. math:: z_t = \frac1t \sum_{k<t} \tilde x_k, \qquad
              \sqrt t (z_t - x^*) \Rightarrow N\bigl(0, \sigma^2 / (p h^2)\bigr)

    It depends on neither η nor α: averaging over space and time attains the optimal (Fisher) variance.
    """
    return noise**2 / (workers * curvature**2)


def double_average_variance(steps: int, *, lr: float, curvature: float, alpha: float, workers: int) -> float:
    """The exact variance of z_t after t = ``steps`` steps, for σ = 1, by the recursion of (x, x̃, Σ x̃)."""
    s, beta = lr * curvature, workers * alpha
    step = np.array([[1 - s - alpha, alpha, 0], [beta, 1 - beta, 0], [0, 1, 1]])
    covariance = np.zeros((3, 3))
    for _ in range(steps):
        covariance = step @ covariance @ step.T
        covariance[0, 0] += lr**2 / workers
    return float(covariance[2, 2]) / steps**2


class Moments(NamedTuple):
    """Mean error and variance of the center after some steps; arrays of the broadcast shape of (ηh, α, β)."""

    bias: Array
    """In units of the common first error of workers and center."""
    variance: Array
    """In units of σ²/h²."""


def moments(
    steps: int, *, scaled_lr: ArrayLike, alpha: ArrayLike, beta: ArrayLike, workers: int,
    momentum: float = 0.0, tau: int = 1,
) -> Moments:  # fmt: skip
    """Bias and variance of the center of EASGD or EAMSGD, for any β, δ and τ, by the exact recursion.

    Args:
        steps: t; the exchanges are those of the steps 0, τ, 2τ, … < t.
        scaled_lr: ηh; ``scaled_lr``, ``alpha`` and ``beta`` are broadcast against each other.
        alpha: α.
        beta: β.
        workers: p.
        momentum: δ.
        tau: τ.
    """
    exchange = mean_map(scaled_lr, alpha, beta, momentum)
    local = mean_map(scaled_lr, 0.0 * np.asarray(alpha, float), 0.0 * np.asarray(beta, float), momentum)
    error = np.zeros((*exchange.shape[:-1], 1))
    error[..., [0, 2], :] = 1
    covariance = np.zeros_like(exchange)
    # The noise of the workers' mean enters the velocity, and with it the position.
    entering = (
        np.array([[1, 1, 0], [1, 1, 0], [0, 0, 0]]) * (np.asarray(scaled_lr, float) ** 2 / workers)[..., None, None]
    )
    for t in range(steps):
        step = exchange if t % tau == 0 else local
        error = step @ error
        covariance = step @ covariance @ np.swapaxes(step, -1, -2) + entering
    return Moments(error[..., 2, 0], covariance[..., 2, 2])
