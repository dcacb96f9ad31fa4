r"""The equations of the DOWNPOUR family, as pure in-place functions on lists of tensors.

DOWNPOUR, MDOWNPOUR, ADOWNPOUR and MVADOWNPOUR are the baselines of Zhang, Choromanska and LeCun, *Deep learning with
Elastic Averaging SGD*, NeurIPS 2015 (arXiv:1412.6651). Notation as in :mod:`lightning_easgd.method.elastic`: workers
:math:`x^i`, center variable :math:`\tilde x`, learning rate :math:`\eta`, momentum :math:`\delta`. A worker's update
:math:`v^i` is what its optimizer has added to :math:`x^i` since the last exchange.

:class:`~lightning_easgd.method.rules.PlainRule` is DOWNPOUR's center, which adds what it is given.

A list holds one tensor per parameter; lists of one call have the same length and shapes. A function whose name ends in
``_`` writes to its first argument (or first two, where its summary says so) and reads the others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["nesterov_push_", "polyak_rate", "running_average_"]

Tensors = Sequence[Tensor]


def nesterov_push_(centers: Tensors, velocities: Tensors, updates: Tensors, momentum: float, rate: float = 1.0) -> None:
    r"""One step of Nesterov's momentum at the center (MDOWNPOUR); changes the first two arguments.

    .. math:: v \leftarrow \delta v + r\, u, \qquad \tilde x \leftarrow \tilde x + \delta v + r\, u

    with the new :math:`v` in the second equation. The center is kept in look-ahead coordinates, so that a worker's
    gradient :math:`g` at :math:`\tilde x` is the one that Nesterov's method asks for: :math:`u = -\eta g`. Defined
    for a communication period of 1 only.

    Args:
        centers: :math:`\tilde x`, changed in place.
        velocities: :math:`v`, zero at the start, changed in place.
        updates: :math:`u = -\eta g`; or :math:`g` itself, with :math:`r = -\eta`.
        momentum: :math:`\delta`.
        rate: :math:`r`, 1 for an update that holds the learning rate.
    """
    centers, velocities, updates = list(centers), list(velocities), list(updates)
    torch._foreach_mul_(velocities, momentum)
    torch._foreach_add_(velocities, updates, alpha=rate)
    torch._foreach_add_(centers, velocities, alpha=momentum)
    torch._foreach_add_(centers, updates, alpha=rate)


def running_average_(averages: Tensors, centers: Tensors, rate: float) -> None:
    r"""Move the running average of the center after a change of the center (ADOWNPOUR, MVADOWNPOUR).

    .. math:: z \leftarrow (1 - a) z + a \tilde x

    Args:
        averages: :math:`z`, changed in place.
        centers: :math:`\tilde x` of after its change.
        rate: :math:`a`: :func:`polyak_rate` (ADOWNPOUR, ASGD) or a constant (MVADOWNPOUR, MVASGD; 0.001 in the paper).
    """
    torch._foreach_lerp_(list(averages), list(centers), rate)


def polyak_rate(updates: int) -> float:
    r"""The rate that makes :math:`z` the plain mean of :math:`\tilde x_0, …, \tilde x_t`.

    .. math:: a = \frac{1}{t + 1}

    Args:
        updates: :math:`t ≥ 1`, the center's changes so far, with the one that has just been made.
    """
    return 1.0 / (updates + 1)
