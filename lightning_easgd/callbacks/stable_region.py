"""In which region of learning rate times curvature a run is stable, as far as the analysis of its method reaches."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import numpy as np
from torch.optim import SGD, Optimizer

from lightning_easgd.stability import downpour, outer, round_robin, synchronous
from lightning_easgd.stability.advice import Setting
from lightning_easgd.stability.spectra import Array, first_unstable
from lightning_easgd.strategies.downpour_family import DownpourMethod
from lightning_easgd.strategies.easgd import EASGDMethod

__all__ = ["NotJudgedError", "StableRegion", "region_of"]

_MOST_TURNS = 64
"""The map of p workers that act in turn takes time p³."""

_SCAN = 50


class NotJudgedError(Exception):
    """The analysis does not cover a run; the message says what."""


@final
@dataclass(frozen=True)
class StableRegion:
    """The curvatures h at which a method is stable on a quadratic: ηh up to a limit.

    Attributes:
        method: The method with its rates, for a message.
        source: The function of :mod:`lightning_easgd.stability` that has found the limit.
        limit: The ηh below which every curvature is stable.
        rates: (α, β, p, τ, δ) where the workers exchange synchronously, else None.
    """

    method: str
    source: str
    limit: float
    rates: tuple[float, float, int, int, float] | None = None

    def holds(self, scaled_lr: float) -> bool:
        """Whether this ηh is inside, up to rounding."""
        return scaled_lr <= self.limit * (1 + 1e-9)

    def remedy(self, lr: float, curvature: float) -> str:
        """What to change at this learning rate and curvature, in one sentence."""
        if self.limit > 0:
            advice = f"Lower the learning rate below {self.limit / curvature:.3g}"
        else:
            advice = "These rates are unstable at every learning rate; change them"
        if self.rates is None:
            return f"{advice}."
        alpha, beta, workers, tau, momentum = self.rates
        setting = Setting(lr, curvature, workers, tau, alpha, beta, momentum)
        largest = setting.largest_alpha
        if 0 < largest < alpha:
            advice += f", or alpha below {largest:.3g} (with beta = p * alpha)"
        return f"{advice}."


def region_of(strategy: object, optimizer: Optimizer, workers: int, clock: int = 0) -> StableRegion:
    """The stable region of a run with its rates of now.

    ===================================  ===========================================================================
    strategy                             judged by
    ===================================  ===========================================================================
    ``EASGDStrategy(mode="sync")``       :func:`lightning_easgd.stability.synchronous.largest_scaled_lr`
    the same with ``outer_momentum``     :func:`lightning_easgd.stability.outer.largest_scaled_lr`
    or ``pull_to="new"``
    ``EASGDStrategy(mode="async")``      :func:`lightning_easgd.stability.round_robin.radius`, as if workers took turns
    ``DownpourStrategy()``               :func:`lightning_easgd.stability.downpour.radius`, as if workers took turns
    any other                            the worker alone, α = β = 0
    ===================================  ===========================================================================

    Args:
        strategy: The Trainer's strategy.
        optimizer: The worker's optimizer.
        workers: p.
        clock: The optimizer's steps so far, which scheduled rates follow.

    Raises:
        NotJudgedError: If the optimizer is not ``torch.optim.SGD``, its momentum is not the one that the analysis has,
            or the rates are outside of it.
    """
    momentum = _momentum(optimizer)
    if isinstance(strategy, DownpourMethod):
        if momentum or strategy.momentum is not None:
            raise NotJudgedError("the analysis of DOWNPOUR has no momentum")
        _check_turns(workers)
        text = f"DOWNPOUR with {workers} workers, tau={strategy.tau}"
        return StableRegion(text, "downpour.radius", _downpour_limit(workers, strategy.tau))
    if not isinstance(strategy, EASGDMethod):
        text = f"SGD with Nesterov momentum={momentum:g}" if momentum else "SGD"
        return StableRegion(text, "synchronous.largest_scaled_lr", _synchronous_limit(0.0, 0.0, 1, 1, momentum))
    if momentum and strategy.momentum is None:
        raise NotJudgedError(
            "the optimizer has momentum and EASGDStrategy has not been told (momentum=..., the strategy 'eamsgd'):"
            " the analysis is that of EAMSGD"
        )
    if strategy.center_rule is not None:
        raise NotJudgedError("the analysis has no center_rule")
    of_groups = strategy.rates.of_groups(optimizer, workers, clock)
    alpha, beta = max(alpha for alpha, _ in of_groups), max(beta for _, beta in of_groups)
    tau = strategy.tau
    name = "EAMSGD" if momentum else "EASGD"
    with_momentum = f", momentum={momentum:g}" if momentum else ""
    text = f"{name} with alpha={alpha:.4g}, beta={beta:.4g}, {workers} workers, tau={tau}{with_momentum}"
    if not strategy.rates.is_judged:
        if strategy.is_served:
            raise NotJudgedError(
                "the analysis of workers that take turns has neither outer_momentum, pull_to nor delay"
            )
        family = tuple((strategy.family | {"momentum": momentum}).items())
        text += f", outer_momentum={strategy.outer_momentum or 0:g}, pull_to={strategy.pull_to}"
        limit = _outer_limit(alpha, beta, workers, family)
        return StableRegion(f"synchronous {text}", "outer.largest_scaled_lr", limit)
    if not strategy.is_served:
        limit = _synchronous_limit(alpha, beta, workers, tau, momentum)
        rates = alpha, beta, workers, tau, momentum
        return StableRegion(f"synchronous {text}", "synchronous.largest_scaled_lr", limit, rates)
    if not np.isclose(beta, workers * alpha):
        raise NotJudgedError("the analysis of workers that take turns has beta = p * alpha")
    _check_turns(workers)
    return StableRegion(f"asynchronous {text}", "round_robin.radius", _turns_limit(alpha, workers, tau, momentum))


def _momentum(optimizer: Optimizer) -> float:
    """δ of Nesterov's momentum, 0 for plain SGD."""
    if not isinstance(optimizer, SGD):
        raise NotJudgedError(f"a step of {type(optimizer).__name__} is not the learning rate times the gradient")
    momenta = {float(group["momentum"]) for group in optimizer.param_groups}
    if len(momenta) > 1:
        raise NotJudgedError("the parameter groups have different momenta")
    (momentum,) = momenta
    if momentum and not all(group["nesterov"] for group in optimizer.param_groups):
        raise NotJudgedError("the analysis has Nesterov momentum (SGD(nesterov=True), the strategy 'eamsgd')")
    return momentum


def _check_turns(workers: int) -> None:
    if workers > _MOST_TURNS:
        raise NotJudgedError(f"the region of {workers} workers that take turns takes too long to compute")


@lru_cache
def _synchronous_limit(alpha: float, beta: float, workers: int, tau: int, momentum: float) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return synchronous.largest_scaled_lr(alpha, beta, workers=workers, momentum=momentum, tau=tau)


@lru_cache
def _outer_limit(alpha: float, beta: float, workers: int, family: tuple[tuple[str, Any], ...]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return outer.largest_scaled_lr(alpha, beta, workers=workers, **dict(family))


@lru_cache
def _turns_limit(alpha: float, workers: int, tau: int, momentum: float) -> float:
    def radii(scaled: Array) -> Array:
        return np.array([round_robin.radius(workers, s, alpha, momentum=momentum, tau=tau) for s in scaled])

    with np.errstate(over="ignore", invalid="ignore"):
        return first_unstable(radii, end=2.5, points=_SCAN)


@lru_cache
def _downpour_limit(workers: int, tau: int) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return first_unstable(
            lambda scaled: np.array([downpour.radius(workers, s, tau) for s in scaled]), end=2.5, points=_SCAN
        )
