r"""Momentum at the center, beyond the paper: the family that holds EASGD, local SGD, BMUF, SlowMo and DiLoCo.

With :math:`\bar D = \tfrac1p \sum_i (x^i - \tilde x)`, the mean of the workers' elastic differences, an exchange is

.. math::
    v &\leftarrow \mu v + \beta \bar D \\
    \tilde x' &= \tilde x + v \quad\text{or, with Nesterov's look-ahead,}\quad \tilde x + \beta \bar D + \mu v \\
    x^i &\leftarrow x^i - \alpha (x^i - \tilde x) \quad\text{(old) or}\quad x^i - \alpha (x^i - \tilde x')
        \quad\text{(new)}

=============================================  ======  =======  =====  ========  =====
method                                         α       β        μ      Nesterov  pull
=============================================  ======  =======  =====  ========  =====
EASGD, EAMSGD (arXiv:1412.6651)                β / p   0.9      0                old
local SGD (arXiv:1805.09767)                   1       1        0                new
BMUF (Chen, Huo, ICASSP 2016), classical       1       ζ        η      no        new
BMUF, Nesterov; DiLoCo (arXiv:2311.08105)      1       0.7      0.9    yes       new
SlowMo (arXiv:1910.00643)                      1       α        β      no        new
=============================================  ======  =======  =====  ========  =====

The numbers are those that the method's source recommends. v is kept with β inside: the same while β is constant.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["heavy_ball_push_"]

Tensors = Sequence[Tensor]


def heavy_ball_push_(centers: Tensors, velocities: Tensors, differences: Tensors, momentum: float, rate: float) -> None:
    r"""Move the center with Polyak's momentum; changes the first two arguments.

    .. math:: v \leftarrow \mu v + r \Delta, \qquad \tilde x \leftarrow \tilde x + v

    Args:
        centers: :math:`\tilde x`, changed in place.
        velocities: :math:`v`, zero at the start, changed in place.
        differences: :math:`\Delta`, or the sum of all workers'.
        momentum: :math:`\mu`.
        rate: :math:`r`; β/p for a sum.
    """
    centers, velocities = list(centers), list(velocities)
    torch._foreach_mul_(velocities, momentum)
    torch._foreach_add_(velocities, list(differences), alpha=rate)
    torch._foreach_add_(centers, velocities)
