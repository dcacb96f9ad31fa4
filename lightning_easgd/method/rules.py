r"""What the center does with a message: small immutable objects, one for each method."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_easgd.method.downpour import downpour_push_, nesterov_push_, polyak_rate, running_average_
from lightning_easgd.method.elastic import elastic_push_

__all__ = [
    "AsymmetricElasticRule",
    "AveragedRule",
    "AveragingRate",
    "CenterRule",
    "ConstantRate",
    "DownpourRule",
    "ElasticRule",
    "NesterovDownpourRule",
    "PolyakRate",
]


class CenterRule(ABC):
    """How one message changes one chunk of the center, and what is answered.

    A rule has no state of its own: what it keeps lies in the chunk's stores, so that any process can apply it. Rules
    are picklable and compare by value.
    """

    @property
    @abstractmethod
    def stores(self) -> int:
        """How many center-sized tensors the rule keeps: the center itself, then what else it needs."""

    @abstractmethod
    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:
        """Update the stores of one chunk and replace the message by the answer, both in place.

        Args:
            stores: The chunk's part of each store, the center first.
            message: What the worker sent; on return, what it gets back.
            rate: The rate of this message; its meaning is the rule's.
            version: How many messages the chunk has taken before this one.
        """

    def initial_stores(self, center: Tensor) -> list[Tensor]:
        """The stores at the start, given the center's initial value: the others start at zero."""
        return [center] + [torch.zeros_like(center) for _ in range(self.stores - 1)]


@final
@dataclass(frozen=True)
class ElasticRule(CenterRule):
    r"""Elastic averaging with equal and opposite forces (Algorithm 1 of the paper).

    .. math:: d = \alpha (x - \tilde x), \qquad \tilde x \leftarrow \tilde x + d

    The message is :math:`x`, the rate :math:`\alpha`, and the answer :math:`d`, which the worker subtracts. It is
    rounded once: what the worker loses is what the center gains.
    """

    @property
    def stores(self) -> int:  # noqa: D102
        return 1

    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:  # noqa: ARG002, D102
        (center,) = stores
        message.sub_(center).mul_(rate)
        center.add_(message)


@final
@dataclass(frozen=True)
class AsymmetricElasticRule(CenterRule):
    r"""Elastic averaging whose worker moves at another rate than the center.

    .. math:: \Delta = x - \tilde x, \qquad \tilde x \leftarrow \tilde x + \alpha_c \Delta

    The message is :math:`x`, the rate :math:`\alpha_c`, and the answer the unscaled :math:`\Delta`: the worker
    subtracts :math:`\alpha \Delta` with its own :math:`\alpha`.
    """

    @property
    def stores(self) -> int:  # noqa: D102
        return 1

    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:  # noqa: ARG002, D102
        (center,) = stores
        message.sub_(center)
        elastic_push_([center], [message], rate)


@final
@dataclass(frozen=True)
class DownpourRule(CenterRule):
    r"""DOWNPOUR: the center adds what a worker has accumulated.

    .. math:: \tilde x \leftarrow \tilde x + r\, v

    The message is :math:`v`, the rate :math:`r` is 1 (or :math:`-\eta` if the message is a sum of gradients), and the
    answer is :math:`\tilde x`.
    """

    @property
    def stores(self) -> int:  # noqa: D102
        return 1

    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:  # noqa: ARG002, D102
        (center,) = stores
        downpour_push_([center], [message], rate)
        message.copy_(center)


@final
@dataclass(frozen=True)
class NesterovDownpourRule(CenterRule):
    r"""MDOWNPOUR: Nesterov's momentum at the center, in look-ahead coordinates.

    .. math:: v \leftarrow \delta v + r\, u, \qquad \tilde x \leftarrow \tilde x + \delta v + r\, u

    The message is the worker's update :math:`u = -\eta g` with the rate :math:`r = 1`, or :math:`g` with
    :math:`r = -\eta`; the answer is :math:`\tilde x`. Store 1 is :math:`v`.

    Args:
        momentum: :math:`\delta`.
    """

    momentum: float

    @property
    def stores(self) -> int:  # noqa: D102
        return 2

    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:  # noqa: ARG002, D102
        center, velocity = stores
        nesterov_push_([center], [velocity], [message], self.momentum, rate)
        message.copy_(center)


class AveragingRate(ABC):
    r"""The rate :math:`a` of a running average, which may depend on the center's version."""

    @abstractmethod
    def after(self, updates: int) -> float:
        """The rate to use after the center's change number ``updates``, counted from 1."""


@final
@dataclass(frozen=True)
class PolyakRate(AveragingRate):
    r""":math:`a = 1/(t+1)`: the average is the plain mean of all centers, the initial one included."""

    def after(self, updates: int) -> float:  # noqa: D102
        return polyak_rate(updates)


@final
@dataclass(frozen=True)
class ConstantRate(AveragingRate):
    """The same rate at every change; the paper uses 0.001.

    Args:
        rate: The rate, 0 < a ≤ 1.
    """

    rate: float = 0.001

    def after(self, updates: int) -> float:  # noqa: ARG002, D102
        return self.rate


@final
@dataclass(frozen=True)
class AveragedRule(CenterRule):
    r"""Another rule, with a running average of the center beside it.

    .. math:: z \leftarrow (1 - a) z + a \tilde x

    at every change of the center, with :math:`\tilde x` of after the change. The last store is :math:`z`. With
    :class:`DownpourRule` this is ADOWNPOUR (:class:`PolyakRate`) or MVADOWNPOUR (:class:`ConstantRate`).

    Args:
        rule: What changes the center and answers.
        rate: :math:`a`.
    """

    rule: CenterRule
    rate: AveragingRate

    @property
    def stores(self) -> int:  # noqa: D102
        return self.rule.stores + 1

    def apply_(self, stores: Sequence[Tensor], message: Tensor, rate: float, version: int) -> None:  # noqa: D102
        *stores, average = stores
        self.rule.apply_(stores, message, rate, version)
        running_average_([average], [stores[0]], self.rate.after(version + 1))

    def initial_stores(self, center: Tensor) -> list[Tensor]:  # noqa: D102
        return [*self.rule.initial_stores(center), center]
