r"""A center that is stuck between two minima (thesis, chapter 5).

Two workers, or two equal groups of them, on :math:`f(x) = \tfrac14 (1 - x^2)^2`. The penalized objective

.. math:: \textstyle\sum_i f(x^i) + \tfrac\rho2 (x^i - \tilde x)^2

has the stationary point :math:`x^{1,2} = \pm\sqrt{1 - \rho}, \tilde x = 0`: the workers in different wells, the center
on the barrier, where the loss is largest. There :math:`f'' = 2 - 3\rho`, and eliminating the workers from the Hessian
leaves :math:`2\rho f'' / (f'' + \rho)` for the center, so that the point is a minimum iff :math:`\rho < 2/3`.
Remedy: one common start for all workers, or ρ that rises, as it does with fixed α while η decays.
"""

import numpy as np

from lightning_easgd.stability.spectra import Array

__all__ = ["RELEASING_PENALTY", "descend", "hessian_at_barrier"]

RELEASING_PENALTY = 2 / 3
"""The penalty ρ from which on the point with the center on the barrier is no minimum."""


def hessian_at_barrier(rho: float) -> Array:
    """The Hessian over (x¹, x², x̃) at the stationary point with the center on the barrier, of shape (3, 3).

    Args:
        rho: ρ in (0, 1); at 1 the two wells merge.
    """
    inner = 2 - 3 * rho + rho
    return np.array([[inner, 0, -rho], [0, inner, -rho], [-rho, -rho, 2 * rho]])


def descend(rho: float, *, start: tuple[float, float, float], lr: float = 0.05, steps: int = 10_000) -> Array:
    r"""Synchronous EASGD without noise, α = ηρ, β = 2α, from (x¹, x², x̃) = ``start``.

    Returns:
        (x¹, x², x̃) after ``steps`` steps, of shape (3,).
    """
    first, second, center = start
    for _ in range(steps):
        pulls = lr * rho * (first - center), lr * rho * (second - center)
        first += lr * (first - first**3) - pulls[0]
        second += lr * (second - second**3) - pulls[1]
        center += sum(pulls)
    return np.array([first, second, center])
