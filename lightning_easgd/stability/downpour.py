r"""DOWNPOUR on a noisy quadratic, the workers in turn: where it is stable, and how much its center varies.

A turn on :math:`f(x) = \tfrac h2 x^2`: the worker adds its sum of updates to the center, takes the center over, and
makes τ steps of SGD (paper, supplement):

.. math::
    \tilde x \leftarrow \tilde x + v^i, \qquad x^i \leftarrow \tilde x, \qquad
    v^i \leftarrow \bigl((1 - \eta h)^\tau - 1\bigr) \tilde x + \text{noise}

as :math:`v^i = x^i - \tilde x` after the turn. The p sums on their way add up, so that what counts is about pτη:
EASGD's center moves by α < 1 of each difference instead, whatever τ is.
"""

import numpy as np

from lightning_easgd.stability.spectra import Array, spectral_radius, steady_covariance

__all__ = ["composed_map", "radius", "steady_variance", "turn_map"]


def turn_map(worker: int, workers: int, scaled_lr: float, tau: int) -> Array:
    """The map of one worker's turn on (v¹, …, vᵖ, x̃), of shape (p + 1, p + 1).

    Args:
        worker: Which worker acts, 0 ≤ ``worker`` < ``workers``.
        workers: p.
        scaled_lr: ηh.
        tau: τ ≥ 1.
    """
    turn = np.eye(workers + 1)
    turn[workers, worker] = 1
    turn[worker] = ((1 - scaled_lr) ** tau - 1) * turn[workers]
    return turn


def composed_map(workers: int, scaled_lr: float, tau: int) -> Array:
    """The map of a round in which each of p workers has one turn; arguments as :func:`turn_map`'s."""
    composed = np.eye(workers + 1)
    for worker in range(workers):
        composed = turn_map(worker, workers, scaled_lr, tau) @ composed
    return composed


def radius(workers: int, scaled_lr: float, tau: int) -> float:
    """The spectral radius of :func:`composed_map`."""
    return float(spectral_radius(composed_map(workers, scaled_lr, tau)))


def steady_variance(workers: int, scaled_lr: float, tau: int) -> float:
    """The variance of the center after many rounds, in units of σ²/h²; infinite where it is unstable.

    Arguments as :func:`turn_map`'s.
    """
    entering = scaled_lr**2 * float(np.sum((1 - scaled_lr) ** (2 * np.arange(tau))))
    noise = np.zeros((workers + 1, workers + 1))
    for worker in range(workers):
        turn = turn_map(worker, workers, scaled_lr, tau)
        noise = turn @ noise @ turn.T
        noise[worker, worker] += entering
    return float(steady_covariance(composed_map(workers, scaled_lr, tau), noise)[-1, -1])
