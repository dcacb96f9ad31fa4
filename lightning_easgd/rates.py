r"""The moving rates α and β: which of them are given, which follow, and when they are stable."""

import math
from dataclasses import dataclass
from typing import final

from torch.optim import Optimizer

from lightning_easgd.elastic import moving_rate_from_center_rate, moving_rate_from_penalty
from lightning_easgd.stability import synchronous

__all__ = ["DEFAULT_BETA", "MovingRates", "check_number"]

DEFAULT_BETA = 0.9
"""β of all experiments of the paper."""


@final
@dataclass(frozen=True)
class MovingRates:
    r"""How far an exchange moves the worker (α) and the center (β).

    ==================  ================  ==============
    given               α                 β
    ==================  ================  ==============
    nothing             0.9 / p           0.9
    ``beta``            β / p             β
    ``alpha``           α                 pα
    ``rho``             lr·ρ              p·lr·ρ
    ``alpha, beta``     α                 β (asymmetric)
    ``rho, beta``       lr·ρ              β (asymmetric)
    ==================  ================  ==============

    Args:
        alpha: The worker's moving rate, -1 < α ≤ 1.
        beta: The center's moving rate, 0 < β < 2.
        rho: The elastic penalty ρ > 0; the moving rate then follows the learning rate.

    Raises:
        ValueError: If a value is out of its range, or both ``alpha`` and ``rho`` are given.
    """

    alpha: float | None = None
    beta: float | None = None
    rho: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "rho"):
            check_number("EASGDStrategy", name, getattr(self, name))
        if self.alpha is not None and self.rho is not None:
            raise ValueError(
                f"EASGDStrategy(alpha={self.alpha}, rho={self.rho}): they set the same rate, alpha = lr * rho; give"
                " alpha for a fixed rate, or rho for one that follows the learning rate."
            )
        if self.alpha is not None and not -1 < self.alpha <= 1:
            raise ValueError(
                f"EASGDStrategy(alpha={self.alpha}): the worker's moving rate lies in (-1, 1]; 0.9 divided by the"
                " number of workers is the paper's choice."
            )
        if self.beta is not None and not 0 < self.beta < 2:
            raise ValueError(
                f"EASGDStrategy(beta={self.beta}): the center's moving rate lies in (0, 2); 0.9 is the paper's choice."
            )
        if self.rho is not None and not 0 < self.rho < math.inf:
            raise ValueError(
                f"EASGDStrategy(rho={self.rho}): the elastic penalty is positive and finite; rho = alpha / lr gives the"
                " moving rate alpha."
            )

    @property
    def is_asymmetric(self) -> bool:
        """Whether an exchange may move worker and center by different amounts, or the worker by nothing."""
        return (self.beta is not None and (self.alpha is not None or self.rho is not None)) or self.alpha == 0

    @property
    def follows_lr(self) -> bool:
        """Whether both rates follow the learning rate, which workers need not have in common at all times."""
        return self.rho is not None and self.beta is None

    def of_groups(self, optimizer: Optimizer, workers: int) -> list[tuple[float, float]]:
        """The pair (α, β) in force for each of an optimizer's parameter groups.

        Raises:
            TypeError: If ``rho`` is given and a group has no learning rate.
        """
        if self.rho is None:  # an optimizer without learning rates will do
            return [self.resolve(workers, lr=0.0)] * len(optimizer.param_groups)
        rates = []
        for group in optimizer.param_groups:
            if group.get("lr") is None:
                raise TypeError(
                    f"EASGDStrategy(rho={self.rho}): alpha = lr * rho needs a learning rate, and"
                    f" {type(optimizer).__name__} has none; give alpha."
                )
            rates.append(self.resolve(workers, float(group["lr"])))
        return rates

    def resolve(self, workers: int, lr: float) -> tuple[float, float]:
        """The pair (α, β) in force.

        Args:
            workers: The number of workers p.
            lr: The learning rate, which ``rho`` scales with.
        """
        if self.alpha is None and self.rho is None:
            beta = DEFAULT_BETA if self.beta is None else self.beta
            return moving_rate_from_center_rate(beta, workers), beta
        alpha = self.alpha if self.rho is None else moving_rate_from_penalty(self.rho, lr)
        assert alpha is not None
        return alpha, workers * alpha if self.beta is None else self.beta

    def instability(self, workers: int) -> str | None:
        r"""What is wrong with these rates at every learning rate, as one sentence, or None.

        The limits are those of :mod:`lightning_easgd.stability.synchronous` for ηh → 0: α + β ≤ 2, which for β = pα
        is α ≤ 2/(p + 1). Rates given by ``rho`` depend on the learning rate and are not judged here.
        """
        if self.rho is not None:
            return None
        alpha, beta = self.resolve(workers, lr=0.0)
        if alpha < 0:
            return (
                f"EASGDStrategy(alpha={alpha:g}): a negative moving rate pushes the workers apart; only the curvature"
                " of the loss can hold them. Use alpha >= 0 unless that is what you study."
            )
        if alpha > synchronous.largest_alpha(beta) + 1e-9:
            return (
                f"EASGDStrategy(alpha={alpha:g}, beta={beta:g}) with {workers} workers is unstable: it needs"
                f" alpha + beta <= 2, which for beta = p * alpha is alpha <= 2/(p+1) ="
                f" {synchronous.largest_moving_rate(workers):.4g}. Leave alpha unset for beta/p"
                f" = {DEFAULT_BETA / workers:.4g}."
            )
        return None


def check_number(owner: str, name: str, value: object) -> None:
    """Raise unless a value is a real number or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{owner}({name}={value!r}): this is no number; give a float, or leave it out.")
