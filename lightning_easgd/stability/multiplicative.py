r"""Noise that grows with the gradient: mean-square stability when each gradient is :math:`g = u x` with random u.

Model of the thesis (chapter 5): the curvature u that a worker sees in a step is drawn independently, with mean
:math:`\mu` and variance :math:`\nu`. The second moments

.. math:: A = E (x^i)^2, \quad B = E x^i x^j, \quad C = E x^i \tilde x, \quad D = E \tilde x^2

then follow a linear map, exactly. With :math:`a = 1 - \eta\mu - \alpha` and
:math:`S = \tfrac1p A + (1 - \tfrac1p) B = E (\tfrac1p\sum_i x^i)^2`:

.. math::
    A &\leftarrow (a^2 + \eta^2\nu) A + 2 a\alpha C + \alpha^2 D \\
    B &\leftarrow a^2 B + 2 a\alpha C + \alpha^2 D \\
    C &\leftarrow (a (1 - \beta) + \alpha\beta) C + a\beta S + \alpha (1 - \beta) D \\
    D &\leftarrow (1 - \beta)^2 D + 2\beta (1 - \beta) C + \beta^2 S
"""

import numpy as np

from lightning_easgd.stability.spectra import Array, first_unstable, spectral_radius

__all__ = ["large_batch_largest_lr", "large_batch_radius", "largest_lr", "moment_map", "radius"]


def moment_map(lr: float, alpha: float, beta: float, *, workers: int, mean: float = 1.0, spread: float = 1.0) -> Array:
    """The map of (A, B, C, D) of a step of synchronous EASGD with δ = 0, τ = 1.

    Args:
        lr: η.
        alpha: α.
        beta: β.
        workers: p.
        mean: μ, the mean curvature.
        spread: ν, the variance of the curvature.

    Returns:
        The matrix, of shape (4, 4).
    """
    a, share = 1 - lr * mean - alpha, 1 / workers
    return np.array(
        [
            [a**2 + lr**2 * spread, 0, 2 * a * alpha, alpha**2],
            [0, a**2, 2 * a * alpha, alpha**2],
            [a * beta * share, a * beta * (1 - share), a * (1 - beta) + alpha * beta, alpha * (1 - beta)],
            [beta**2 * share, beta**2 * (1 - share), 2 * beta * (1 - beta), (1 - beta) ** 2],
        ]
    )


def radius(lr: float, alpha: float, beta: float, *, workers: int, mean: float = 1.0, spread: float = 1.0) -> float:
    """The factor by which mean squares shrink or grow in a step, in the long run; as :func:`moment_map`."""
    full = moment_map(lr, alpha, beta, workers=workers, mean=mean, spread=spread)
    # One worker has no B.
    return float(spectral_radius(full if workers > 1 else np.delete(np.delete(full, 1, 0), 1, 1)))


def largest_lr(alpha: float, beta: float, *, workers: int, mean: float = 1.0, spread: float = 1.0) -> float:
    """The η below which EASGD is stable in mean square; arguments as :func:`moment_map`'s."""

    def radii(lrs: Array) -> Array:
        return np.array([radius(lr, alpha, beta, workers=workers, mean=mean, spread=spread) for lr in lrs])

    return first_unstable(radii, end=2 / mean)


def large_batch_radius(lr: float, *, workers: int, mean: float = 1.0, spread: float = 1.0) -> float:
    r"""The same for SGD on the mean of p gradients, :math:`(1 - \eta\mu)^2 + \eta^2\nu / p`."""
    return (1 - lr * mean) ** 2 + lr**2 * spread / workers


def large_batch_largest_lr(*, workers: int, mean: float = 1.0, spread: float = 1.0) -> float:
    r"""The η at which :func:`large_batch_radius` is one, :math:`2\mu / (\mu^2 + \nu / p)`."""
    return 2 * mean / (mean**2 + spread / workers)
