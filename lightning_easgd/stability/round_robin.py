r"""Where EASGD and EAMSGD are stable when the workers act in turn (the asynchronous scheme, paper eqs. 12-13).

At each clock one worker acts: on :math:`F(x) = \tfrac h2 x^2` the map of the state :math:`(x^1, …, x^p, \tilde x)` is
the identity except in the rows and columns of that worker and the center,

.. math:: \begin{pmatrix} x^i \\ \tilde x \end{pmatrix} \leftarrow
          \begin{pmatrix} 1 - \eta h - \alpha & \alpha \\ \alpha & 1 - \alpha \end{pmatrix}
          \begin{pmatrix} x^i \\ \tilde x \end{pmatrix}.
"""

import numpy as np
from numpy.typing import ArrayLike

from lightning_easgd.stability.spectra import Array, spectral_radius, steady_covariance

__all__ = ["center_trajectory", "composed_map", "largest_moving_rate", "radius", "steady_variance", "turn_map"]


def largest_moving_rate(scaled_lr: ArrayLike) -> Array:
    r"""The largest stable moving rate for 0 ≤ ηh ≤ 2; δ = 0, τ = 1 (paper, section 4).

    .. math:: 0 \le \eta h \le 2, \qquad 0 \le \alpha \le \frac{4 - 2\eta h}{4 - \eta h}

    Sufficient for every p: each worker's map is symmetric, and within these limits its norm is one. For odd p it is
    necessary, too: at the limit all workers and the center change sign in every round. Even p is stable a little
    further, up to 6.1 % in α for p = 2, 1.3 % for p = 4, 0.33 % for p = 8 (found with :func:`radius`; the paper does
    not make this distinction). The limit is also that of synchronous EASGD with one worker.

    Args:
        scaled_lr: ηh in [0, 2].
    """
    scaled_lr = np.asarray(scaled_lr, float)
    return np.asarray((4 - 2 * scaled_lr) / (4 - scaled_lr))


def turn_map(
    worker: int, workers: int, scaled_lr: float, alpha: float, *, momentum: float = 0.0, tau: int = 1
) -> Array:
    """The map of the turn of one worker: a step with an exchange, then its τ - 1 steps without.

    Between its exchanges a worker touches nobody else's state, so that it does not matter when those steps are made.

    Args:
        worker: Which worker acts, 0 ≤ ``worker`` < ``workers``.
        workers: p.
        scaled_lr: ηh.
        alpha: The moving rate α of both sides.
        momentum: δ.
        tau: τ ≥ 1.

    Returns:
        The matrix on (x¹, v¹, …, xᵖ, vᵖ, x̃), of shape (2p + 1, 2p + 1).
    """
    x, v, center = 2 * worker, 2 * worker + 1, 2 * workers
    local = np.eye(2 * workers + 1)
    local[np.ix_([x, v], [x, v])] = [
        [1 - scaled_lr, momentum * (1 - scaled_lr)],
        [-scaled_lr, momentum * (1 - scaled_lr)],
    ]
    exchange = local.copy()
    exchange[x, [x, center]] += [-alpha, alpha]
    exchange[center, [x, center]] += [alpha, -alpha]
    return np.linalg.matrix_power(local, tau - 1) @ exchange


def composed_map(workers: int, scaled_lr: float, alpha: float, *, momentum: float = 0.0, tau: int = 1) -> Array:
    """The map of a round in which each of p workers has one turn; arguments as :func:`turn_map`'s."""
    composed = np.eye(2 * workers + 1)
    for worker in range(workers):
        composed = turn_map(worker, workers, scaled_lr, alpha, momentum=momentum, tau=tau) @ composed
    return composed


def radius(workers: int, scaled_lr: float, alpha: float, *, momentum: float = 0.0, tau: int = 1) -> float:
    """The spectral radius of :func:`composed_map`; the time grows with the cube of ``workers``."""
    return float(spectral_radius(composed_map(workers, scaled_lr, alpha, momentum=momentum, tau=tau)))


def steady_variance(workers: int, scaled_lr: float, alpha: float, *, momentum: float = 0.0, tau: int = 1) -> float:
    """The variance of the center after many rounds, in units of σ²/h²; infinite where it is unstable.

    Arguments as :func:`turn_map`'s.
    """
    size = 2 * workers + 1
    noise = np.zeros((size, size))
    for worker in range(workers):
        turn = turn_map(worker, workers, scaled_lr, alpha, momentum=momentum, tau=tau)
        noise = turn @ noise @ turn.T
        # The noise of a step enters x and v, and is carried on by the steps that follow before the next turn.
        local = turn_map(worker, workers, scaled_lr, 0.0, momentum=momentum)
        entering = np.zeros(size)
        entering[2 * worker : 2 * worker + 2] = scaled_lr
        for _ in range(tau):
            noise += np.outer(entering, entering)
            entering = local @ entering
    step = composed_map(workers, scaled_lr, alpha, momentum=momentum, tau=tau)
    return float(steady_covariance(step, noise)[-1, -1])


def center_trajectory(workers: int, scaled_lr: float, alpha: float, *, start: float, turns: int) -> Array:
    """The center after each turn; workers and center begin at ``start``, the minimum is at 0; δ = 0, τ = 1.

    Returns:
        x̃ after 0, 1, …, ``turns`` turns, of shape (turns + 1,).
    """
    x, center = [start] * workers, start
    centers = np.empty(turns + 1)
    centers[0] = start
    for turn in range(turns):
        i = turn % workers
        pull = alpha * (x[i] - center)
        x[i] -= scaled_lr * x[i] + pull
        center += pull
        centers[turn + 1] = center
    return centers
