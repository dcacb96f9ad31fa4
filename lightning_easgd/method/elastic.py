r"""The equations of elastic averaging, as pure functions on lists of tensors.

Notation of Zhang, Choromanska and LeCun, *Deep learning with Elastic Averaging SGD*, NeurIPS 2015
(arXiv:1412.6651): :math:`p` workers :math:`x^i`, center variable :math:`\tilde x`, learning rate :math:`\eta`,
elastic penalty :math:`\rho`, the worker's moving rate :math:`\alpha = \eta\rho`, the center's moving rate
:math:`\beta = p\alpha`, momentum :math:`\delta`.

A list holds one tensor per parameter, and may be empty; lists of one call have the same length and shapes. A function
whose name ends in ``_`` writes to its first argument and reads the others.
When a worker has a narrower dtype than the center, arithmetic is done in the wider one and rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "elastic_difference",
    "elastic_difference_",
    "elastic_pull_",
    "elastic_push_",
    "moving_rate_from_center_rate",
    "moving_rate_from_penalty",
    "nesterov_position_",
    "penalty_from_moving_rate",
]

Tensors = Sequence[Tensor]


def elastic_difference(workers: Tensors, centers: Tensors) -> list[Tensor]:
    r"""The elastic difference, not yet scaled by a moving rate.

    .. math:: \Delta = x - \tilde x

    Args:
        workers: :math:`x`, the worker's parameters.
        centers: :math:`\tilde x`, of the same shapes.

    Returns:
        :math:`\Delta`, new tensors of the wider of the two dtypes.
    """
    return list(torch._foreach_sub(list(workers), list(centers))) if workers else []


def elastic_difference_(workers: Tensors, centers: Tensors) -> None:
    r"""The same in place: what held the worker holds the difference.

    .. math:: x \leftarrow x - \tilde x

    Args:
        workers: A copy of :math:`x`, changed in place; no narrower than the center.
        centers: :math:`\tilde x`, of the same shapes.
    """
    for worker, center in zip(workers, centers, strict=True):
        worker.sub_(center)


def elastic_pull_(workers: Tensors, differences: Tensors, alpha: float) -> None:
    r"""Pull a worker towards the center that it was compared with (Algorithm 1, step a).

    .. math:: x \leftarrow x - \alpha \Delta

    Args:
        workers: :math:`x`, changed in place. It may have moved since ``differences`` was taken: the gradient step
            comes between the two.
        differences: :math:`\Delta = x_{old} - \tilde x_{old}` of :func:`elastic_difference`.
        alpha: :math:`\alpha`, the worker's moving rate.
    """
    if workers:
        torch._foreach_sub_(list(workers), list(differences), alpha=alpha)


def elastic_push_(centers: Tensors, differences: Tensors, alpha: float) -> None:
    r"""Push the center towards one worker (Algorithm 1, step b), or towards the mean of all (eq. 6).

    .. math:: \tilde x \leftarrow \tilde x + \alpha \Delta

    Args:
        centers: :math:`\tilde x`, changed in place.
        differences: :math:`\Delta` of the same exchange, hence of the same two old values; or
            :math:`\sum_i \Delta^i` of all workers, with :math:`\beta / p` for the rate.
        alpha: The rate of the center's move; :math:`\alpha` for the symmetric exchange.
    """
    if centers:
        torch._foreach_add_(list(centers), list(differences), alpha=alpha)


def nesterov_position_(look_ahead: Tensors, momentum_buffers: Tensors, lr_times_momentum: float) -> None:
    r"""Turn the look-ahead point that ``torch.optim.SGD(nesterov=True)`` stores into the worker's position.

    .. math:: x = y + \eta\,\delta\, b

    torch keeps :math:`y = x + \delta v` in the parameters and :math:`b` in ``momentum_buffer``, with
    :math:`v = -\eta b`. EAMSGD (Algorithm 2) exchanges :math:`x`, not :math:`y`.

    Args:
        look_ahead: On entry :math:`y`, on return :math:`x`; changed in place.
        momentum_buffers: :math:`b`.
        lr_times_momentum: :math:`\eta\delta` of the step that wrote :math:`b`.
    """
    if look_ahead:
        torch._foreach_add_(list(look_ahead), list(momentum_buffers), alpha=lr_times_momentum)


def moving_rate_from_center_rate(beta: float, workers: int) -> float:
    r"""The worker's moving rate under elastic symmetry, :math:`\alpha = \beta / p`."""
    return beta / workers


def moving_rate_from_penalty(rho: float, lr: float) -> float:
    r"""The worker's moving rate of an elastic penalty, :math:`\alpha = \eta\rho`."""
    return lr * rho


def penalty_from_moving_rate(alpha: float, lr: float) -> float:
    r"""The elastic penalty of a moving rate, :math:`\rho = \alpha / \eta`: it rises while :math:`\eta` decays."""
    return alpha / lr
