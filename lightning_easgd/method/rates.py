r"""The moving rates α and β: which of them are given, which follow, and when they are stable."""

import math
from dataclasses import dataclass, field
from typing import Any, final

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_easgd.method.elastic import moving_rate_from_center_rate, moving_rate_from_penalty
from lightning_easgd.method.schedules import Schedule
from lightning_easgd.stability import synchronous
from lightning_easgd.tensors.group_numbers import GroupNumbers

__all__ = ["DEFAULT_BETA", "MovingRates", "check_number"]

DEFAULT_BETA = 0.9
"""β of all experiments of the paper."""

_ROUNDING = 1e-9


@dataclass
class _Watch:
    """Whether a warning is still to come; the one mutable thing about rates."""

    is_over: bool = False

    def warn(self, problem: str | None) -> None:
        if problem is not None:
            self.is_over = True
            rank_zero_warn(problem)


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
        in_turn: Whether the center is moved by one worker at a time, as a served one is, and not by all at once.
        is_judged: Whether rates that are unstable with the paper's center are warned of.
        owner: The class of which these are arguments, for errors and warnings.

    Raises:
        TypeError: If a value is neither a number nor, as ``alpha`` and ``rho`` may be, a schedule.
        ValueError: If a value is out of its range, or both ``alpha`` and ``rho`` are given.
    """

    alpha: float | Schedule | None = None
    beta: float | None = None
    rho: float | Schedule | None = None
    in_turn: bool = False
    is_judged: bool = field(default=True, compare=False)
    owner: str = field(default="EASGDStrategy", compare=False)
    _watch: _Watch = field(default_factory=_Watch, init=False, repr=False, compare=False)
    _numbers: GroupNumbers = field(default_factory=GroupNumbers, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._watch.is_over = not self.is_judged
        for name in ("alpha", "rho"):
            _check_rate(self.owner, name, getattr(self, name))
        check_number(self.owner, "beta", self.beta)
        if self.alpha is not None and self.rho is not None:
            raise ValueError(
                f"{self.owner}(alpha={self.alpha}, rho={self.rho}): they set the same rate, alpha = lr * rho; give"
                " alpha for a fixed rate, or rho for one that follows the learning rate."
            )
        if self.alpha is not None and not all(-1 < alpha <= 1 for alpha in _extremes(self.alpha)):
            raise ValueError(
                f"{self.owner}(alpha={self.alpha}): the worker's moving rate lies in (-1, 1]; 0.9 divided by the"
                " number of workers is the paper's choice."
            )
        if self.beta is not None and not 0 < self.beta < 2:
            raise ValueError(
                f"{self.owner}(beta={self.beta}): the center's moving rate lies in (0, 2); 0.9 is the paper's choice."
            )
        if self.rho is not None and not all(0 < rho < math.inf for rho in _extremes(self.rho)):
            raise ValueError(
                f"{self.owner}(rho={self.rho}): the elastic penalty is positive and finite; rho = alpha / lr gives the"
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

    def largest(self, workers: int) -> tuple[float, float] | None:
        """The pair (α, β) of a schedule's largest value; None where it depends on the learning rate."""
        if self.rho is not None:
            return None
        return self.resolve(workers, 0.0) if self.alpha is None else self._with_beta(_extremes(self.alpha)[1], workers)

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

        Rates that follow the learning rate warn where they first become unstable, once.

        Args:
            optimizer: The worker's optimizer.
            workers: The number of workers p.
            clock: t, the optimizer's steps so far.

        Raises:
            TypeError: If ``rho`` is given and a group has no learning rate.
        """
        if self.rho is None:  # an optimizer without learning rates will do
            return [self.resolve(workers, lr=0.0, clock=clock)] * len(optimizer.param_groups)
        lrs = self._learning_rates(optimizer)
        if not self._watch.is_over:
            self._watch.warn(
                self._instability_at(max(lrs, default=0.0), _at(self.rho, clock), workers, f" at t={clock}")
            )
        return [self.resolve(workers, lr, clock) for lr in lrs]

    def warn_of(self, optimizer: Optimizer, workers: int) -> None:
        """Warn, unless it is done already, if α = lr·ρ is unstable with the learning rates that an optimizer has now.

        Of a scheduled ρ the largest value is judged.

        Raises:
            TypeError: If ``rho`` is given and a group has no learning rate.
        """
        if self.rho is None or self._watch.is_over:
            return
        where = f", the largest of {self.rho}," if self._is_scheduled else ""
        largest = max(self._learning_rates(optimizer), default=0.0)
        self._watch.warn(self._instability_at(largest, _extremes(self.rho)[1], workers, where))

    def _learning_rates(self, optimizer: Optimizer) -> list[float]:
        if any(group.get("lr") is None for group in optimizer.param_groups):
            raise TypeError(
                f"{self.owner}(rho={self.rho}): alpha = lr * rho needs a learning rate, and"
                f" {type(optimizer).__name__} has none; give alpha."
            )
        return [self._numbers.of(group["lr"]) for group in optimizer.param_groups]

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
        is α ≤ 2/(p + 1). Where workers move the center in turn, an exchange concerns one of them: α + β/p ≤ 2, which
        for β = pα is α ≤ 1. Of a schedule the smallest and the largest value are judged. Rates given by ``rho`` depend
        on the learning rate and are judged by :meth:`warn_of` and :meth:`of_groups`.
        """
        if self.rho is not None or not self.is_judged:
            return None
        if self.alpha is None:
            alpha, beta = self.resolve(workers, lr=0.0)
        else:
            lowest, highest = _extremes(self.alpha)
            if lowest < 0:
                return (
                    f"{self.owner}(alpha={lowest:g}): a negative moving rate pushes the workers apart; only the"
                    " curvature of the loss can hold them. Use alpha >= 0 unless that is what you study."
                )
            alpha, beta = self._with_beta(highest, workers)
        if self._is_stable(alpha, beta, workers):
            return None
        where = f" (the largest of {self.alpha})" if self._is_scheduled else ""
        return (
            f"{self.owner}(alpha={alpha:g}, beta={beta:g}){where} with {workers} workers is unstable: it needs"
            f" {self._condition(workers)}. Leave alpha unset for beta/p = {DEFAULT_BETA / workers:.4g}."
        )

    def _instability_at(self, lr: float, rho: float, workers: int, where: str) -> str | None:
        """The same for α = lr·ρ at one learning rate; of several groups the largest is the first to be unstable."""
        alpha, beta = self._with_beta(moving_rate_from_penalty(rho, lr), workers)
        if self._is_stable(alpha, beta, workers):
            return None
        return (
            f"{self.owner}(rho={rho:g}){where} with lr={lr:g} and {workers} workers is unstable: alpha = lr * rho ="
            f" {alpha:g} and beta = {beta:g}, and it needs {self._condition(workers)}. At this learning rate take rho"
            f" <= {self._largest_alpha(workers) / lr:.4g}, or give beta alone for alpha = beta/p."
        )

    def _is_stable(self, alpha: float, beta: float, workers: int) -> bool:
        pushing = 1 if self.in_turn else workers
        return alpha <= float(synchronous.largest_alpha(beta * pushing / workers)) + _ROUNDING

    def _largest_alpha(self, workers: int) -> float:
        pushing = 1 if self.in_turn else workers
        if self.beta is None:
            return float(synchronous.largest_moving_rate(pushing))
        return float(synchronous.largest_alpha(self.beta * pushing / workers))

    def _condition(self, workers: int) -> str:
        if self.in_turn:
            return "alpha + beta/p <= 2, which for beta = p * alpha is alpha <= 1"
        limit = synchronous.largest_moving_rate(workers)
        return f"alpha + beta <= 2, which for beta = p * alpha is alpha <= 2/(p+1) = {limit:.4g}"

    @property
    def _is_scheduled(self) -> bool:
        return isinstance(self.alpha, Schedule) or isinstance(self.rho, Schedule)

    def _with_beta(self, alpha: float, workers: int) -> tuple[float, float]:
        return alpha, workers * alpha if self.beta is None else self.beta


def _at(rate: float | Schedule, clock: int) -> float:
    return rate(clock) if isinstance(rate, Schedule) else rate


def _extremes(rate: float | Schedule) -> tuple[float, float]:
    return rate.extremes if isinstance(rate, Schedule) else (rate, rate)


def _check_rate(owner: str, name: str, value: object) -> None:
    if callable(value) and not isinstance(value, Schedule):
        raise TypeError(
            f"{owner}({name}={value!r}): a rate that changes is a lightning_easgd.method.schedules.Schedule, whose"
            " smallest and largest value are known before training; derive a class from it, or take"
            " ExponentialSchedule, LinearSchedule or CosineSchedule."
        )
    if not isinstance(value, Schedule):
        check_number(owner, name, value)


def check_number(owner: str, name: str, value: object) -> None:
    """Raise unless a value is a real number or None."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{owner}({name}={value!r}): this is no number; give a float, or leave it out.")
