r"""Where synchronous averaging with momentum at the center, a pull to the new center and a delay is stable.

The family of :mod:`lightning_easgd.method.outer` on a quadratic :math:`f(x) = \tfrac h2 x^2`, with workers that make
Nesterov steps of momentum δ as in :mod:`.synchronous`. The workers' mean and the center have the state (x, v, x̃, u, k):
position and velocity of the workers' mean, the center and its velocity, and the pull that is still to come. The
difference modes, the workers' distances from their mean, have the state (x, v, k): there the center stands still.

A period is an exchange and τ gradient steps. A pull to the old center comes after the first step and one to the new
center before it; with a delay each comes as many steps later. (A delay of a pull to the old center is that of
asynchronous workers, here as if all exchanged at once.)
"""

from typing import Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from lightning_easgd.stability.spectra import Array, first_unstable, spectral_radius

__all__ = ["Family", "largest_scaled_lr", "period_map", "radius"]

_FARTHEST = 2560.0
_X, _V, _CENTER, _U, _PULL = range(5)


class Family(TypedDict, total=False):
    """What makes a member of the family, beside its rates; each has the default of the strategy's argument.

    Attributes:
        momentum: δ, of the workers' steps; 0 by default.
        tau: τ ≥ 1; 1 by default.
        outer_momentum: μ, of the center.
        outer_nesterov: Whether the center looks ahead.
        pull_to: The center that the workers are pulled towards.
        delay: Steps until the pull is applied, 0 ≤ k < τ.
    """

    momentum: float
    tau: int
    outer_momentum: float
    outer_nesterov: bool
    pull_to: Literal["old", "new"]
    delay: int


def period_map(scaled_lr: ArrayLike, alpha: ArrayLike, beta: ArrayLike, **family: Unpack[Family]) -> Array:
    """The map of (mean x, mean v, x̃, u, k) over a period; with β = 0 that of a difference mode.

    Args:
        scaled_lr: ηh; ``scaled_lr``, ``alpha`` and ``beta`` are broadcast against each other.
        alpha: The worker's moving rate α.
        beta: The center's moving rate β.
        **family: See :class:`Family`.

    Returns:
        Matrices, of shape (..., 5, 5).
    """
    momentum, outer_momentum = family.get("momentum", 0.0), family.get("outer_momentum", 0.0)
    to_old = family.get("pull_to", "old") == "old"
    s, a, b = np.broadcast_arrays(*(np.asarray(value, float) for value in (scaled_lr, alpha, beta)))
    identity = np.broadcast_to(np.eye(5), (*s.shape, 5, 5))
    exchange = identity.copy()
    # u ← μu + β(x - x̃); the center moves by u, or by β(x - x̃) + μu.
    exchange[..., _U, _U] = outer_momentum
    exchange[..., _U, _X], exchange[..., _U, _CENTER] = b, -b
    move = exchange[..., _U, :].copy()
    if family.get("outer_nesterov", False):
        move *= outer_momentum
        move[..., _X] += b
        move[..., _CENTER] -= b
    exchange[..., _CENTER, :] += move
    seen = identity if to_old else exchange
    exchange[..., _PULL, :] = identity[..., _X, :] - seen[..., _CENTER, :]

    step = identity.copy()
    step[..., _X, _X] = 1 - s
    step[..., _X, _V] = step[..., _V, _V] = momentum * (1 - s)
    step[..., _V, _X] = -s
    pull = identity.copy()
    pull[..., _X, _PULL] = -a

    before = family.get("delay", 0) + to_old
    first, last = (np.linalg.matrix_power(step, steps) for steps in (before, family.get("tau", 1) - before))
    return np.asarray(last @ pull @ first @ exchange)


def radius(scaled_lr: ArrayLike, alpha: ArrayLike, beta: ArrayLike, *, workers: int, **family: Unpack[Family]) -> Array:
    """The spectral radius of the map of all workers and the center over a period of τ steps.

    Args:
        scaled_lr: As for :func:`period_map`, as are the other arguments.
        alpha: α.
        beta: β.
        workers: p; matters only in that one worker has no difference mode.
        **family: See :class:`Family`.

    Returns:
        Radii, of the broadcast shape.
    """
    mean = spectral_radius(period_map(scaled_lr, alpha, beta, **family))
    if workers == 1:
        return mean
    modes = period_map(scaled_lr, alpha, np.zeros_like(np.asarray(beta, float)), **family)
    # There the center stands still: rows and columns of the workers alone.
    own = [_X, _V, _PULL]
    return np.maximum(mean, spectral_radius(modes[..., own, :][..., own]))


def largest_scaled_lr(alpha: float, beta: float, *, workers: int, **family: Unpack[Family]) -> float:
    """The ηh below which every curvature is stable, found numerically; arguments as :func:`radius`'s.

    A pull to the new center may hold workers that are not stable alone: there it is beyond 2. It is sought up to 2560.
    """
    end = 2.5
    while True:
        limit = first_unstable(lambda s: radius(s, alpha, beta, workers=workers, **family), end)
        if limit < end or end >= _FARTHEST:
            return limit
        end *= 2
