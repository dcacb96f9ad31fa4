"""The spectral radius of a linear map, where it passes one, and the covariance that noise builds up."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "first_unstable", "is_contraction", "spectral_radius", "steady_covariance"]

Array = NDArray[np.float64]

_ROUNDING = 1e-9
"""Maps that keep an invariant have an eigenvalue of exactly one; the eigenvalue routine returns it with an error."""


def spectral_radius(maps: Array) -> Array:
    """The largest modulus of the eigenvalues of each map.

    Args:
        maps: Square matrices, of shape (..., n, n).

    Returns:
        Radii, of shape (...); infinite for a map with entries that have overflowed.
    """
    finite = np.asarray(np.isfinite(maps).all(axis=(-2, -1)))
    radii = np.abs(np.linalg.eigvals(np.where(finite[..., None, None], maps, 0.0))).max(axis=-1)
    return np.where(finite, radii, np.inf)


def is_contraction(radii: Array) -> NDArray[np.bool_]:
    """Whether errors do not grow: radii ≤ 1, up to rounding."""
    return np.asarray(radii) <= 1 + _ROUNDING


def first_unstable(radii: Callable[[Array], Array], end: float, points: int = 400) -> float:
    """The first argument in (0, end] at which a map stops being stable.

    The interval is scanned, as the stable arguments need not be one interval, and the first gap found is bisected.

    Args:
        radii: Spectral radii for a vector of arguments.
        end: End of the interval that is searched.
        points: Number of arguments of the scan.

    Returns:
        The argument, to about ``end * 1e-12``; 0 if none is stable, ``end`` if all are.
    """
    scanned = np.linspace(0, end, points + 1)[1:]
    unstable = ~is_contraction(radii(scanned))
    if not unstable.any():
        return end
    first = int(unstable.argmax())
    low, high = (0.0 if first == 0 else float(scanned[first - 1])), float(scanned[first])
    while high - low > end * 1e-12:
        middle = (low + high) / 2
        if is_contraction(radii(np.array([middle])))[0]:
            low = middle
        else:
            high = middle
    return low


def steady_covariance(step: Array, noise: Array) -> Array:
    r"""The covariance :math:`C = M C M^T + Q` of a state that is mapped and disturbed again and again.

    Args:
        step: M, of shape (n, n).
        noise: Q, the covariance of what is added after each map, of shape (n, n).

    Returns:
        C, of shape (n, n); infinite unless the spectral radius of M is below one.
    """
    if spectral_radius(step) >= 1:
        return np.full_like(noise, np.inf)
    covariance, power = noise, step
    # After k rounds the sum has 2ᵏ terms: C = Q + MQMᵀ, then that + M²(·)M²ᵀ, …
    while np.abs(power).max() > 1e-12:
        covariance, power = covariance + power @ covariance @ power.T, power @ power
    return covariance
