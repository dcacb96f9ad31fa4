"""Whether a choice of hyper-parameters is stable on a quadratic, by what margin, and which moving rate is best."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from lightning_easgd.stability import center_error, round_robin, synchronous
from lightning_easgd.stability.spectra import Array, first_unstable, is_contraction

__all__ = ["Setting", "moving_rates_by_rule", "round_robin_is_stable", "variance_optimal_alpha"]

_PAPER_BETA = 0.9
_CURVATURES = 64
_MOST_STEPS = 100_000
_MOST_TURNS = 64
"""A round-robin map of p workers takes time p³; from here on only the closed form is used."""


@final
@dataclass(frozen=True)
class Setting:
    """A choice of hyper-parameters, and the quadratic on which it is judged.

    Args:
        lr: Learning rate η > 0.
        curvature: Largest curvature h > 0 of the loss; all curvatures in (0, h] have to be stable.
        workers: p ≥ 1.
        tau: Communication period τ ≥ 1.
        alpha: The worker's moving rate; β / p if left out.
        beta: The center's moving rate; pα if left out, 0.9 if ``alpha`` is left out, too.
        momentum: δ in [0, 1).
        steps: Steps after which the error of the center counts.
        noise: Standard deviation of a gradient, in units of the first gradient.

    Raises:
        ValueError: If a value is out of its range.
    """

    lr: float
    curvature: float
    workers: int
    tau: int = 10
    alpha: float | None = None
    beta: float | None = None
    momentum: float = 0.0
    steps: int = 1000
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lr", "curvature", "workers", "tau", "steps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Setting({name}={value}): it has to be positive and finite.")
        if self.steps > _MOST_STEPS:
            raise ValueError(f"Setting(steps={self.steps}): the recursion is made step by step, at most {_MOST_STEPS}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Setting(momentum={self.momentum}): Nesterov momentum lies in [0, 1); 0 is plain EASGD.")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"Setting(noise={self.noise}): a standard deviation is not negative, and finite.")
        if not -1 < self.rates[0] <= 1:
            raise ValueError(
                f"Setting(alpha={self.rates[0]}): the worker's moving rate lies in (-1, 1]; 0.9 / workers is the"
                " paper's choice."
            )

    @property
    def scaled_lr(self) -> float:
        """ηh."""
        return self.lr * self.curvature

    @property
    def rates(self) -> tuple[float, float]:
        """The pair (α, β) in force."""
        if self.alpha is None:
            beta = _PAPER_BETA if self.beta is None else self.beta
            return beta / self.workers, beta
        return self.alpha, self.workers * self.alpha if self.beta is None else self.beta

    @property
    def is_symmetric(self) -> bool:
        """Whether β = pα."""
        alpha, beta = self.rates
        return math.isclose(beta, self.workers * alpha)

    def with_alpha(self, alpha: float) -> "Setting":
        """The same setting with another symmetric moving rate."""
        return Setting(
            self.lr, self.curvature, self.workers, self.tau, alpha, None, self.momentum, self.steps, self.noise
        )

    @property
    def is_stable(self) -> bool:
        """Whether synchronous EASGD or EAMSGD is stable for every curvature up to ``curvature``."""
        return self.scaled_lr <= self.largest_lr * self.curvature * (1 + 1e-9)

    @cached_property
    def radius_per_step(self) -> float:
        """The factor by which errors shrink in a step at ``curvature``, in the long run (synchronous mode)."""
        alpha, beta = self.rates
        radius = synchronous.radius(
            self.scaled_lr, alpha, beta, workers=self.workers, momentum=self.momentum, tau=self.tau
        )
        return math.pow(float(radius), 1 / self.tau)

    @cached_property
    def largest_lr(self) -> float:
        """The learning rate below which all is stable with these moving rates (synchronous mode)."""
        limit = synchronous.largest_scaled_lr(*self.rates, workers=self.workers, momentum=self.momentum, tau=self.tau)
        return limit / self.curvature

    @cached_property
    def largest_alpha(self) -> float:
        """The symmetric moving rate below which all is stable with this learning rate (synchronous mode)."""
        curvatures = self.scaled_lr * np.arange(1, _CURVATURES + 1) / _CURVATURES

        def radii(alphas: Array) -> Array:
            alpha = alphas[:, None]
            of_each = synchronous.radius(
                curvatures, alpha, self.workers * alpha, workers=self.workers, momentum=self.momentum, tau=self.tau
            )
            return np.asarray(of_each.max(axis=1))

        return first_unstable(radii, end=2.0)

    def center_errors(self, alphas: Array, betas: Array) -> Array:
        """Root mean square error of the center after ``steps`` steps, in units of the first error.

        Args:
            alphas: α, of shape (n,).
            betas: β, of shape (n,).
        """
        bias, variance = center_error.moments(
            self.steps, scaled_lr=self.scaled_lr, alpha=alphas, beta=betas, workers=self.workers,
            momentum=self.momentum, tau=self.tau,
        )  # fmt: skip
        return np.sqrt(bias**2 + self.noise**2 * variance)

    @cached_property
    def center_error(self) -> float:
        """:meth:`center_errors` of the setting's own rates."""
        alpha, beta = self.rates
        with np.errstate(over="ignore", invalid="ignore"):
            error = float(self.center_errors(np.array([alpha]), np.array([beta]))[0])
        return math.inf if math.isnan(error) else error  # the difference of what has overflowed


def moving_rates_by_rule(setting: Setting) -> dict[str, float]:
    r"""The moving rate α that each rule would choose.

    ====================  ========================================================================================
    ``0.9/p``             the paper's
    ``2/(p+2)``           minimizes :math:`\max(|1 - \alpha|, |1 - (p + 1)\alpha|)`, the contraction without gradients
                          (Wang and Joshi, *Cooperative SGD*, 2018)
    ``variance-optimal``  :func:`variance_optimal_alpha`
    ====================  ========================================================================================
    """
    p = setting.workers
    return {"0.9/p": _PAPER_BETA / p, "2/(p+2)": 2 / (p + 2), "variance-optimal": variance_optimal_alpha(setting)}


def variance_optimal_alpha(setting: Setting) -> float:
    """The symmetric α with the least mean squared error of the center after ``setting.steps`` steps.

    Bias counts, too: for α → 0 the variance vanishes as the center stops moving. The longer the run, the smaller the
    best α. It is found on a logarithmic grid of 2 % width; NaN if no α is stable.
    """
    most = min(1.0, setting.largest_alpha)
    if most <= 0:
        return math.nan
    alphas = most * np.geomspace(1e-4, 1, 465)
    return float(alphas[np.argmin(setting.center_errors(alphas, setting.workers * alphas))])


def round_robin_is_stable(setting: Setting) -> bool | None:
    """Whether the setting is stable for all curvatures up to its own when the workers act in turn.

    Returns:
        None where it was not computed: for β ≠ pα, and with more than 64 workers unless τ = 1 and δ = 0.
    """
    alpha, _ = setting.rates
    if not setting.is_symmetric:
        return None
    if alpha < 0:  # unstable at small curvatures
        return False
    if setting.tau == 1 and setting.momentum == 0:
        within = setting.scaled_lr <= 2 and alpha <= float(round_robin.largest_moving_rate(setting.scaled_lr))
        if within or setting.workers > _MOST_TURNS:
            return within
    elif setting.workers > _MOST_TURNS:
        return None
    radii = [
        round_robin.radius(setting.workers, scaled_lr, alpha, momentum=setting.momentum, tau=setting.tau)
        for scaled_lr in setting.scaled_lr * np.arange(1, 17) / 16
    ]
    return bool(is_contraction(np.array(radii)).all())
