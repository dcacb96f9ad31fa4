r"""Schedules of the moving rate α or of the elastic penalty ρ, as functions of the optimizer's own clock.

A schedule is a pure function: a run that is resumed at clock t goes on with the value of clock t, and nothing has to be
saved. Coupling that grows while training goes on is called *scoping* by Chaudhari et al., *Parle: parallelizing
stochastic gradient descent* (2017, arXiv:1707.00424), and *focusing* by Pittorino et al., *Entropic gradient descent
algorithms and wide flat minima* (ICLR 2021, arXiv:2006.07897): the workers first search far apart, and end as one.
Replicated SGD of the latter is synchronous EASGD with β = 1 and an exponentially growing ρ.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from typing_extensions import override

__all__ = ["ConstantSchedule", "CosineSchedule", "ExponentialSchedule", "LinearSchedule", "Schedule"]


class Schedule(ABC):
    """A value for each clock t, the number of steps that an optimizer has made."""

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The value at clock t.

        Args:
            step: t ≥ 0, in steps of the worker's own optimizer.
        """

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest value at any clock; both are checked before training starts."""


@final
@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same value at every clock.

    Args:
        value: The value.

    Raises:
        TypeError: If the value is no number.
        ValueError: If it is not finite.
    """

    value: float

    def __post_init__(self) -> None:
        _check_finite(self, "value", self.value)

    @override
    def __call__(self, step: int) -> float:
        return self.value

    @property
    @override
    def extremes(self) -> tuple[float, float]:
        return self.value, self.value


@dataclass(frozen=True)
class _Ramp(Schedule):
    """Goes from one value to another without turning back, and stays there."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_finite(self, "start", self.start)
        _check_finite(self, "end", self.end)
        owner = type(self).__name__
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"{owner}(steps={self.steps!r}): it counts optimizer steps; give an int.")
        if self.steps < 1:
            raise ValueError(
                f"{owner}(steps={self.steps}): the way from start to end takes a step or more; give the number of"
                " optimizer steps that a worker makes, or a number of your own for a constant rate."
            )

    @override
    def __call__(self, step: int) -> float:
        # The end itself, and no rounding of it: runs of any length beyond it have one rate.
        return self.end if step >= self.steps else self._between(step / self.steps)

    @abstractmethod
    def _between(self, progress: float) -> float:
        """The value after this share of the steps, in [0, 1)."""

    @property
    @override
    def extremes(self) -> tuple[float, float]:
        return min(self.start, self.end), max(self.start, self.end)


@final
@dataclass(frozen=True)
class LinearSchedule(_Ramp):
    r"""Equal differences: :math:`s + (e - s)\, t / T` until t = T, then e.

    Args:
        start: s, the value at t = 0.
        end: e, the value from t = T on.
        steps: T ≥ 1, in steps of the worker's own optimizer.

    Raises:
        TypeError: If ``start`` or ``end`` is no number, or ``steps`` no int.
        ValueError: If ``start`` or ``end`` is not finite, or ``steps`` < 1.
    """

    @override
    def _between(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


@final
@dataclass(frozen=True)
class CosineSchedule(_Ramp):
    r"""Half a wave, flat at both ends: :math:`s + (e - s)\,(1 - \cos(\pi t / T)) / 2` until t = T, then e.

    Args:
        start: s, the value at t = 0.
        end: e, the value from t = T on.
        steps: T ≥ 1, in steps of the worker's own optimizer.

    Raises:
        TypeError: If ``start`` or ``end`` is no number, or ``steps`` no int.
        ValueError: If ``start`` or ``end`` is not finite, or ``steps`` < 1.
    """

    @override
    def _between(self, progress: float) -> float:
        return self.start + (self.end - self.start) * (1 - math.cos(math.pi * progress)) / 2


@final
@dataclass(frozen=True)
class ExponentialSchedule(_Ramp):
    r"""Equal ratios: :math:`s\,(e / s)^{t / T}` until t = T, then e.

    It is the rule γ ← γ(1 + r) of Parle and of replicated SGD with :math:`(1 + r)^T = e / s`.

    Args:
        start: s, the value at t = 0; not 0, and of the sign of ``end``.
        end: e, the value from t = T on.
        steps: T ≥ 1, in steps of the worker's own optimizer.

    Raises:
        TypeError: If ``start`` or ``end`` is no number, or ``steps`` no int.
        ValueError: If ``start`` or ``end`` is not finite, one of them is 0, they differ in sign, or ``steps`` < 1.
    """

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 in (self.start, self.end) or (self.start > 0) != (self.end > 0):
            raise ValueError(
                f"ExponentialSchedule(start={self.start}, end={self.end}): no constant ratio leads from one to the"
                " other; give two values of one sign, or take LinearSchedule."
            )

    @override
    def _between(self, progress: float) -> float:
        return float(self.start * (self.end / self.start) ** progress)


def _check_finite(schedule: Schedule, name: str, value: object) -> None:
    owner = type(schedule).__name__
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}({name}={value!r}): this is no number; give a float.")
    if not math.isfinite(value):
        raise ValueError(f"{owner}({name}={value}): a rate is finite; give a finite number.")
