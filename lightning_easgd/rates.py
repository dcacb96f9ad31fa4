r"""The moving rates α and β: which of them are given, which follow, and when they are stable."""

from dataclasses import dataclass
from typing import final

from lightning_easgd.elastic import moving_rate_from_center_rate, moving_rate_from_penalty

__all__ = ["DEFAULT_BETA", "MovingRates"]

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
        if self.rho is not None and not self.rho > 0:
            raise ValueError(
                f"EASGDStrategy(rho={self.rho}): the elastic penalty is positive; rho = alpha / lr gives the moving"
                " rate alpha."
            )

    @property
    def is_asymmetric(self) -> bool:
        """Whether an exchange may move worker and center by different amounts, or the worker by nothing."""
        return (self.beta is not None and (self.alpha is not None or self.rho is not None)) or self.alpha == 0

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

        Without gradients the gap between the workers' mean and the center shrinks by 1 - α - β at each exchange, so
        that α + β ≤ 2 is needed; for β = pα this is α ≤ 2/(p + 1), the limit ηh → 0 of the synchronous region
        α ≤ (4 - 2ηh) / (2(p + 1) - pηh). A worker's distance from the workers' mean shrinks by 1 - α. Rates given by
        ``rho`` depend on the learning rate and are not judged here.
        """
        if self.rho is not None:
            return None
        alpha, beta = self.resolve(workers, lr=0.0)
        if alpha < 0:
            return (
                f"EASGDStrategy(alpha={alpha:g}): a negative moving rate pushes the workers apart; only the curvature"
                " of the loss can hold them. Use alpha >= 0 unless that is what you study."
            )
        if alpha + beta > 2 * (1 + 1e-9):
            return (
                f"EASGDStrategy(alpha={alpha:g}, beta={beta:g}) with {workers} workers is unstable: it needs"
                f" alpha + beta <= 2, which for beta = p * alpha is alpha <= 2/(p+1) = {2 / (workers + 1):.4g}. Leave"
                f" alpha unset for beta/p = {DEFAULT_BETA / workers:.4g}."
            )
        return None
