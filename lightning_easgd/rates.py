r"""The moving rates α and β: which of them are given, which follow, and when they are stable."""

import math
from dataclasses import dataclass
from typing import Any, final

from torch.optim import Optimizer

from lightning_easgd.elastic import moving_rate_from_center_rate, moving_rate_from_penalty
from lightning_easgd.schedules import Schedule
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

    α and ρ may be schedules: an exchange has their value at the worker's clock t, and what follows from it.

    Args:
        alpha: The worker's moving rate, -1 < α ≤ 1 at every clock.
        beta: The center's moving rate, 0 < β < 2.
        rho: The elastic penalty ρ > 0; the moving rate then follows the learning rate.

    Raises:
        TypeError: If a value is neither a number nor, as ``alpha`` and ``rho`` may be, a schedule.
        ValueError: If a value is out of its range, or both ``alpha`` and ``rho`` are given.
    """

    alpha: float | Schedule | None = None
    beta: float | None = None
    rho: float | Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "rho"):
            _check_rate(name, getattr(self, name))
        check_number("EASGDStrategy", "beta", self.beta)
        if self.alpha is not None and self.rho is not None:
            raise ValueError(
                f"EASGDStrategy(alpha={self.alpha}, rho={self.rho}): they set the same rate, alpha = lr * rho; give"
                " alpha for a fixed rate, or rho for one that follows the learning rate."
            )
        if self.alpha is not None and not all(-1 < alpha <= 1 for alpha in _extremes(self.alpha)):
            raise ValueError(
                f"EASGDStrategy(alpha={self.alpha}): the worker's moving rate lies in (-1, 1]; 0.9 divided by the"
                " number of workers is the paper's choice."
            )
        if self.beta is not None and not 0 < self.beta < 2:
            raise ValueError(
                f"EASGDStrategy(beta={self.beta}): the center's moving rate lies in (0, 2); 0.9 is the paper's choice."
            )
        if self.rho is not None and not all(0 < rho < math.inf for rho in _extremes(self.rho)):
            raise ValueError(
                f"EASGDStrategy(rho={self.rho}): the elastic penalty is positive and finite; rho = alpha / lr gives the"
                " moving rate alpha."
            )

    @property
    def is_asymmetric(self) -> bool:
        """Whether an exchange may move worker and center by different amounts, or the worker by nothing."""
        if self.beta is not None and (self.alpha is not None or self.rho is not None):
            return True
        if self.alpha is None:
            return False
        lowest, highest = _extremes(self.alpha)
        return lowest <= 0 <= highest

    @property
    def are_each_workers_own(self) -> bool:
        """Whether both rates follow what workers need not have in common at one exchange.

        That is the learning rate, which α = lr·ρ follows, and the clock, which a schedule follows: workers with
        different numbers of batches exchange at different clocks.
        """
        return self.beta is None and (self.rho is not None or self._is_scheduled)

    def common(self, rates: list[tuple[float, float]]) -> list[Any]:
        """What all workers have in common of the rates of one synchronous exchange.

        Args:
            rates: The worker's pairs, of :meth:`of_groups`.
        """
        if self.are_each_workers_own:
            return []
        return [beta for _, beta in rates] if self._is_scheduled else list(rates)

    def of_groups(self, optimizer: Optimizer, workers: int, clock: int) -> list[tuple[float, float]]:
        """The pair (α, β) in force for each of an optimizer's parameter groups.

        Args:
            optimizer: The worker's optimizer.
            workers: The number of workers p.
            clock: t, the optimizer's steps so far.

        Raises:
            TypeError: If ``rho`` is given and a group has no learning rate.
        """
        if self.rho is None:  # an optimizer without learning rates will do
            return [self.resolve(workers, lr=0.0, clock=clock)] * len(optimizer.param_groups)
        rates = []
        for group in optimizer.param_groups:
            if group.get("lr") is None:
                raise TypeError(
                    f"EASGDStrategy(rho={self.rho}): alpha = lr * rho needs a learning rate, and"
                    f" {type(optimizer).__name__} has none; give alpha."
                )
            rates.append(self.resolve(workers, float(group["lr"]), clock))
        return rates

    def resolve(self, workers: int, lr: float, clock: int = 0) -> tuple[float, float]:
        """The pair (α, β) in force.

        Args:
            workers: The number of workers p.
            lr: The learning rate, which ``rho`` scales with.
            clock: t, which schedules are functions of.
        """
        if self.rho is not None:
            return self._with_beta(moving_rate_from_penalty(_at(self.rho, clock), lr), workers)
        if self.alpha is not None:
            return self._with_beta(_at(self.alpha, clock), workers)
        beta = DEFAULT_BETA if self.beta is None else self.beta
        return moving_rate_from_center_rate(beta, workers), beta

    def instability(self, workers: int) -> str | None:
        r"""What is wrong with these rates at every learning rate, as one sentence, or None.

        The limits are those of :mod:`lightning_easgd.stability.synchronous` for ηh → 0: α + β ≤ 2, which for β = pα
        is α ≤ 2/(p + 1). Of a schedule the smallest and the largest value are judged. Rates given by ``rho`` depend on
        the learning rate and are not judged here.
        """
        if self.rho is not None:
            return None
        if self.alpha is None:
            alpha, beta = self.resolve(workers, lr=0.0)
        else:
            lowest, highest = _extremes(self.alpha)
            if lowest < 0:
                return (
                    f"EASGDStrategy(alpha={lowest:g}): a negative moving rate pushes the workers apart; only the"
                    " curvature of the loss can hold them. Use alpha >= 0 unless that is what you study."
                )
            alpha, beta = self._with_beta(highest, workers)
        if alpha > synchronous.largest_alpha(beta) + 1e-9:
            where = f" (the largest of {self.alpha})" if self._is_scheduled else ""
            return (
                f"EASGDStrategy(alpha={alpha:g}, beta={beta:g}){where} with {workers} workers is unstable: it needs"
                f" alpha + beta <= 2, which for beta = p * alpha is alpha <= 2/(p+1) ="
                f" {synchronous.largest_moving_rate(workers):.4g}. Leave alpha unset for beta/p"
                f" = {DEFAULT_BETA / workers:.4g}."
            )
        return None

    @property
    def _is_scheduled(self) -> bool:
        return isinstance(self.alpha, Schedule) or isinstance(self.rho, Schedule)

    def _with_beta(self, alpha: float, workers: int) -> tuple[float, float]:
        return alpha, workers * alpha if self.beta is None else self.beta


def _at(rate: float | Schedule, clock: int) -> float:
    return rate(clock) if isinstance(rate, Schedule) else rate


def _extremes(rate: float | Schedule) -> tuple[float, float]:
    return rate.extremes if isinstance(rate, Schedule) else (rate, rate)


def _check_rate(name: str, value: object) -> None:
    if callable(value) and not isinstance(value, Schedule):
        raise TypeError(
            f"EASGDStrategy({name}={value!r}): a rate that changes is a lightning_easgd.schedules.Schedule, whose"
            " smallest and largest value are known before training; derive a class from it, or take"
            " ExponentialSchedule, LinearSchedule or CosineSchedule."
        )
    if not isinstance(value, Schedule):
        check_number("EASGDStrategy", name, value)


def check_number(owner: str, name: str, value: object) -> None:
    """Raise unless a value is a real number or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{owner}({name}={value!r}): this is no number; give a float, or leave it out.")
