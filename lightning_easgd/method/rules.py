r"""The center's side of an exchange: how a difference moves it, and what a served one answers to a message.

A :class:`CenterRule` moves the center, in synchronous mode by the sum of all workers' differences, in asynchronous mode
by one worker's. A :class:`ServedExchange` is what a served center does around that: it makes the message a difference,
lets the rule move the center, and leaves the answer in the message.

A rule of one's own is a class with one method, and an argument of the strategy::

    class Halving(CenterRule):
        def move_(self, stores, difference, rate, version):
            elastic_push_([stores[0]], [difference], rate * 0.5**version)

    EASGDStrategy(center_rule=Halving())
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.method.downpour import nesterov_push_, polyak_rate, running_average_
from lightning_easgd.method.elastic import elastic_difference_, elastic_push_
from lightning_easgd.method.outer import heavy_ball_push_

__all__ = [
    "AsymmetricExchange",
    "AveragedRule",
    "AveragingRate",
    "CenterRule",
    "ConstantRate",
    "HeavyBallRule",
    "NesterovRule",
    "PlainRule",
    "PolyakRate",
    "PushExchange",
    "ServedExchange",
    "SymmetricExchange",
    "TowardsNewCenter",
    "outer_rule",
]


class CenterRule(ABC):
    r"""How a difference moves the center :math:`\tilde x`: one object for both modes, on parts of the flat vector.

    A rule has no state of its own: what it keeps lies in the stores, so that any process can apply it. It is picklable,
    and its ``repr`` shows its values: rules of all ranks are compared by it.

    Attributes:
        stores: How many tensors of the center's size the rule keeps: the center itself, then what else it needs.
        names: What each store is, for checkpoints.
        shown: The number of the store that is the model: that is evaluated, and in checkpoints.
        has_memory: Whether a move depends on the moves before, by the stores or the version.
    """

    names: Sequence[str] = ("center",)
    shown: int = 0
    has_memory: bool = True

    @property
    def stores(self) -> int:
        """How many tensors of the center's size the rule keeps."""
        return len(self.names)

    @abstractmethod
    def move_(self, stores: Sequence[Tensor], difference: Tensor, rate: float, version: int) -> None:
        r"""Move a part of the center, in place: by :math:`r \Delta` or by what the rule makes of this product.

        Args:
            stores: The same part of each store, the center first; float32 or float64, each of shape (n,).
            difference: :math:`\Delta`, of one worker or the sum of all; of their shape and dtype, only read.
            rate: :math:`r`: synchronously β/p, asynchronously α; 1 where the difference has been scaled.
            version: How many differences this part of the center has taken before.
        """

    def initial_stores(self, center: Tensor) -> list[Tensor]:
        """The stores at the start, given the center's initial value: the others start at zero."""
        return [center] + [torch.zeros_like(center) for _ in range(self.stores - 1)]

    def __repr__(self) -> str:
        return _shown(self)


def _shown(value: object) -> str:
    values = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(value).items()))
    return f"{type(value).__module__}.{type(value).__qualname__}({values})"


@final
@dataclass(frozen=True)
class PlainRule(CenterRule):
    r"""The center of EASGD (eq. 6 of the paper) and of DOWNPOUR adds what it is given.

    .. math:: \tilde x \leftarrow \tilde x + r \Delta
    """

    has_memory = False

    @override
    def move_(self, stores: Sequence[Tensor], difference: Tensor, rate: float, version: int) -> None:
        elastic_push_(stores, [difference], rate)


def _check_momentum(rule: "NesterovRule | HeavyBallRule") -> None:
    momentum: object = rule.momentum
    if not (isinstance(momentum, int | float) and 0 <= momentum < 1):
        raise ValueError(
            f"{type(rule).__name__}(momentum={momentum!r}): the center's momentum is a float in [0, 1), such as 0.9."
        )


@final
@dataclass(frozen=True)
class NesterovRule(CenterRule):
    r"""Nesterov's momentum at the center: MDOWNPOUR, and the outer optimizer of DiLoCo (arXiv:2311.08105).

    .. math:: v \leftarrow \delta v + r \Delta, \qquad \tilde x \leftarrow \tilde x + \delta v + r \Delta

    Store 1 is :math:`v`. With :math:`r \Delta = \beta \bar D`, of the workers' mean difference, it is
    :math:`\beta` times the buffer of ``torch.optim.SGD(lr=beta, momentum=delta, nesterov=True)`` on :math:`-\bar D`.

    Args:
        momentum: :math:`\delta`, or :math:`\mu` of an outer optimizer, in [0, 1).
    """

    momentum: float
    names = ("center", "momentum")

    def __post_init__(self) -> None:
        _check_momentum(self)

    @override
    def move_(self, stores: Sequence[Tensor], difference: Tensor, rate: float, version: int) -> None:
        center, velocity = stores
        nesterov_push_([center], [velocity], [difference], self.momentum, rate)


@final
@dataclass(frozen=True)
class HeavyBallRule(CenterRule):
    r"""Polyak's momentum at the center: BMUF (Chen, Huo 2016) and SlowMo (arXiv:1910.00643).

    .. math:: v \leftarrow \mu v + r \Delta, \qquad \tilde x \leftarrow \tilde x + v

    Store 1 is :math:`v`.

    Args:
        momentum: :math:`\mu` in [0, 1), BMUF's block momentum and SlowMo's :math:`\beta`.
    """

    momentum: float
    names = ("center", "momentum")

    def __post_init__(self) -> None:
        _check_momentum(self)

    @override
    def move_(self, stores: Sequence[Tensor], difference: Tensor, rate: float, version: int) -> None:
        center, velocity = stores
        heavy_ball_push_([center], [velocity], [difference], self.momentum, rate)


def outer_rule(momentum: float | None, nesterov: bool) -> CenterRule:
    r"""The center's rule of an outer momentum :math:`\mu`; without one the paper's."""
    if not momentum:
        return PlainRule()
    return NesterovRule(momentum) if nesterov else HeavyBallRule(momentum)


class AveragingRate(ABC):
    r"""The rate :math:`a` of a running average, which may depend on the center's version."""

    @abstractmethod
    def after(self, updates: int) -> float:
        """The rate to use after the center's change number ``updates``, counted from 1."""

    def __repr__(self) -> str:
        return _shown(self)


@final
@dataclass(frozen=True)
class PolyakRate(AveragingRate):
    r""":math:`a = 1/(t+1)`: the average is the plain mean of all centers, the initial one included."""

    @override
    def after(self, updates: int) -> float:
        return polyak_rate(updates)


@final
@dataclass(frozen=True)
class ConstantRate(AveragingRate):
    """The same rate at every change; the paper uses 0.001.

    Args:
        rate: The rate, 0 < a ≤ 1.
    """

    rate: float = 0.001

    def __post_init__(self) -> None:
        rate: object = self.rate
        if not (isinstance(rate, int | float) and 0 < rate <= 1):
            raise ValueError(
                f"ConstantRate(rate={rate!r}): a running average's rate is a float in (0, 1], such as 0.001."
            )

    @override
    def after(self, updates: int) -> float:
        return self.rate


@final
@dataclass(frozen=True)
class AveragedRule(CenterRule):
    r"""Another rule, with a running average of the center beside it, which is what is shown.

    .. math:: z \leftarrow (1 - a) z + a \tilde x

    at every change of the center, with :math:`\tilde x` of after the change. The last store is :math:`z`. With
    :class:`PlainRule` DOWNPOUR becomes ADOWNPOUR (:class:`PolyakRate`) or MVADOWNPOUR (:class:`ConstantRate`).

    Args:
        rule: What moves the center.
        rate: :math:`a`.
    """

    rule: CenterRule
    rate: AveragingRate
    names: Sequence[str] = field(init=False, repr=False)
    shown: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (*self.rule.names, "average"))
        object.__setattr__(self, "shown", self.rule.stores)

    @override
    def move_(self, stores: Sequence[Tensor], difference: Tensor, rate: float, version: int) -> None:
        *stores, average = stores
        self.rule.move_(stores, difference, rate, version)
        running_average_([average], [stores[0]], self.rate.after(version + 1))

    @override
    def initial_stores(self, center: Tensor) -> list[Tensor]:
        return [*self.rule.initial_stores(center), center]


@dataclass(frozen=True)
class ServedExchange(ABC):
    """What a served center does with a message.

    Args:
        rule: How it moves.
    """

    rule: CenterRule = field(default_factory=PlainRule)

    @abstractmethod
    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:
        """Update the stores of one chunk and replace the message by the answer, both in place.

        Args:
            stores: The chunk's part of each store, the center first.
            message: What the worker sent; on return, what it gets back.
            rate: The rate of this message; its meaning is the exchange's.
            version: How many messages the chunk has taken before this one.
        """


@final
@dataclass(frozen=True)
class SymmetricExchange(ServedExchange):
    r"""Elastic averaging with equal and opposite forces (Algorithm 1 of the paper).

    .. math:: d = \alpha (x - \tilde x), \qquad \tilde x \leftarrow \tilde x + d

    The message is :math:`x`, the rate :math:`\alpha`, and the answer :math:`d`, which the worker subtracts. It is
    rounded once: what the worker loses is what the center gains.
    """

    @override
    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:
        elastic_difference_([message], [stores[0]])
        message.mul_(rate)
        self.rule.move_(stores, message, 1.0, version)


@final
@dataclass(frozen=True)
class AsymmetricExchange(ServedExchange):
    r"""Elastic averaging whose worker moves at another rate than the center.

    .. math:: \Delta = x - \tilde x, \qquad \tilde x \leftarrow \tilde x + \alpha_c \Delta

    The message is :math:`x`, the rate :math:`\alpha_c`, and the answer the unscaled :math:`\Delta`: the worker
    subtracts :math:`\alpha \Delta` with its own :math:`\alpha`.
    """

    @override
    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:
        elastic_difference_([message], [stores[0]])
        self.rule.move_(stores, message, rate, version)


@final
@dataclass(frozen=True)
class TowardsNewCenter(ServedExchange):
    r"""Elastic averaging whose worker is pulled towards the center of after the exchange.

    .. math:: \Delta = x - \tilde x, \qquad \tilde x' = \tilde x + \alpha_c \Delta

    The message is :math:`x`, the rate :math:`\alpha_c`, and the answer :math:`x - \tilde x'`: the worker subtracts
    :math:`\alpha` times that, with its own :math:`\alpha`.
    """

    @override
    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:
        self.rule.move_(stores, message - stores[0], rate, version)
        elastic_difference_([message], [stores[0]])


@final
@dataclass(frozen=True)
class PushExchange(ServedExchange):
    r"""DOWNPOUR: the center moves by what a worker has accumulated, and the worker takes it over.

    The message is the worker's update :math:`v`, with the rate :math:`r = 1` (or a gradient, with :math:`r = -\eta`);
    the answer is :math:`\tilde x`.
    """

    @override
    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:
        self.rule.move_(stores, message, rate, version)
        message.copy_(stores[0])
