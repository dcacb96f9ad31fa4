r"""ADMM in the same round-robin order, which is not stable (paper eqs. 8-11 and figure 1).

The worker whose turn it is makes one linearized step on :math:`F(x) = \tfrac12 x^2`, with the new :math:`\lambda^i`:

.. math::
    \lambda^i &\leftarrow \lambda^i - (x^i - \tilde x) \\
    x^i &\leftarrow \frac{x^i - \eta \nabla F(x^i) + \eta\rho (\lambda^i + \tilde x)}{1 + \eta\rho} \\
    \tilde x &\leftarrow \tfrac1p \textstyle\sum_j (x^j - \lambda^j)

The center forgets its old value; for EASGD it is an average over time. That is the difference that matters.
"""

import numpy as np
from numpy.typing import ArrayLike

from lightning_easgd.stability.spectra import Array, spectral_radius

__all__ = ["center_trajectory", "composed_map", "radius", "turn_map"]


def turn_map(worker: int, workers: int, lr: ArrayLike, rho: ArrayLike) -> Array:
    """The map of one worker's turn on the state (λ¹, x¹, …, λᵖ, xᵖ, x̃).

    Args:
        worker: Which worker acts, 0 ≤ ``worker`` < ``workers``.
        workers: p.
        lr: η, for curvature 1; broadcast against ``rho``.
        rho: The penalty ρ.

    Returns:
        Matrices, of shape (..., 2p + 1, 2p + 1).
    """
    lr, rho = np.broadcast_arrays(np.asarray(lr, float), np.asarray(rho, float))
    lagrange, x, center = 2 * worker, 2 * worker + 1, 2 * workers
    size = 2 * workers + 1
    turn = np.zeros((*lr.shape, size, size))
    turn[..., range(center), range(center)] = 1
    turn[..., lagrange, x] = -1
    turn[..., lagrange, center] = 1
    weight = lr * rho
    turn[..., x, lagrange] = weight / (1 + weight)
    turn[..., x, x] = (1 - lr - weight) / (1 + weight)
    turn[..., x, center] = 2 * weight / (1 + weight)
    turn[..., center, :] = (turn[..., 1:center:2, :].sum(-2) - turn[..., 0:center:2, :].sum(-2)) / workers
    return turn


def composed_map(workers: int, lr: ArrayLike, rho: ArrayLike) -> Array:
    """The map of a round in which each of p workers has one turn; arguments as :func:`turn_map`'s."""
    composed = turn_map(0, workers, lr, rho)
    for worker in range(1, workers):
        composed = turn_map(worker, workers, lr, rho) @ composed
    return composed


def radius(workers: int, lr: ArrayLike, rho: ArrayLike) -> Array:
    """The spectral radius of :func:`composed_map`, of the broadcast shape; above one ADMM diverges (figure 1)."""
    return spectral_radius(composed_map(workers, lr, rho))


def center_trajectory(workers: int, lr: float, rho: float, *, start: float, turns: int) -> Array:
    """The center after each turn; λ = 0, workers and center begin at ``start``, the minimum is at 0.

    Returns:
        x̃ after 0, 1, …, ``turns`` turns, of shape (turns + 1,).
    """
    lagrange, x, center = [0.0] * workers, [start] * workers, start
    centers = np.empty(turns + 1)
    centers[0] = start
    for turn in range(turns):
        i = turn % workers
        lagrange[i] -= x[i] - center
        x[i] = (x[i] - lr * x[i] + lr * rho * (lagrange[i] + center)) / (1 + lr * rho)
        center = (sum(x) - sum(lagrange)) / workers
        centers[turn + 1] = center
    return centers
