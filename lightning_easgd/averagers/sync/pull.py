r"""The worker's side of a synchronous exchange: towards which center it is pulled, and when."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, final

from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.difference_sum import DifferenceSum
from lightning_easgd.method.elastic import elastic_difference_
from lightning_easgd.tensors.flat_tensors import FlatTensors

__all__ = ["Pull", "PullToNew", "PullToOld"]

Groups = Sequence[Sequence[Tensor]]


class Pull(ABC):
    """What a worker still has to do for the exchange that it has begun.

    Attributes:
        follows_step: Whether an exchange begins after an optimizer step, when its numbers count for the next one;
            else before a step, whose gradient is taken where the worker is.
        waits_for_center: Whether the center must have moved before :meth:`take`.
    """

    follows_step: ClassVar[bool]
    waits_for_center: ClassVar[bool]

    @abstractmethod
    def begin(
        self,
        given: DifferenceSum,
        factors: Sequence[float],
        write: Callable[[FlatTensors], None],
        rates: Sequence[float],
        clock: int,
    ) -> None:
        """An exchange has begun.

        Args:
            given: The sum, which has been started.
            factors: For each group, what its differences in the sum are to be multiplied by to be the paper's pull.
            write: Writes the worker's position.
            rates: α for each group.
            clock: t.
        """

    @abstractmethod
    def is_due(self, clock: int) -> bool:
        """Whether the worker is to be pulled now, at this clock."""

    @property
    @abstractmethod
    def is_pending(self) -> bool:
        """Whether the worker is still to be pulled."""

    @abstractmethod
    def take(self) -> tuple[Groups, Sequence[float]]:
        """What is to be subtracted from the worker: the differences of each group, and α; no more pending."""

    def keep(self) -> None:  # noqa: B027 - most keep a copy anyway
        """The center is about to move: keep what the sum may overwrite."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what is pending: the worker is at the center."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed worker must know, in tensors and primitives; with the center up to date."""
        return {}

    def load_state_dict(self, state: dict[str, Any], center: FlatTensors) -> None:  # noqa: B027 - most have no memory
        """Go on where :meth:`state_dict` was taken."""


@final
class PullToOld(Pull):
    r"""The paper's: towards the center of before the exchange, which every worker holds; it waits for nothing.

    .. math:: x^i_{t+1} = x^i_t - \eta g(x^i_t) - \alpha (x^i_t - \tilde x_t)
    """

    follows_step = False
    waits_for_center = False

    def __init__(self) -> None:
        self._due: tuple[Groups, Sequence[float]] | None = None

    @override
    def begin(
        self,
        given: DifferenceSum,
        factors: Sequence[float],
        write: Callable[[FlatTensors], None],
        rates: Sequence[float],
        clock: int,
    ) -> None:
        self._due = given.given, factors

    @override
    def is_due(self, clock: int) -> bool:
        return self._due is not None

    @property
    @override
    def is_pending(self) -> bool:
        return self._due is not None

    @override
    def take(self) -> tuple[Groups, Sequence[float]]:
        assert self._due is not None
        due, self._due = self._due, None
        return due

    @override
    def keep(self) -> None:
        if self._due is not None:
            differences, factors = self._due
            self._due = [[each.clone() for each in group] for group in differences], factors

    @override
    def forget(self) -> None:
        self._due = None


@final
class PullToNew(Pull):
    r"""Towards the center of after the exchange, k steps later, so that the workers' sum has k steps to arrive.

    .. math:: x^i_{t+k} \leftarrow x^i_{t+k} - \alpha (x^i_t - \tilde x')

    after the gradient step that leads to :math:`x^i_{t+k}`; with k = 0 the next gradient is taken at the pulled point.
    It keeps one vector of the center's size, :math:`x^i_t`.

    Args:
        delay: k.
    """

    follows_step = True
    waits_for_center = True

    def __init__(self, delay: int = 0) -> None:
        self._delay = delay
        self._kept: FlatTensors | None = None
        self._is_taken = False  # whether the center has been subtracted from what is kept
        self._center: FlatTensors | None = None
        self._rates: Sequence[float] | None = None
        self._due_at = 0

    @override
    def begin(
        self,
        given: DifferenceSum,
        factors: Sequence[float],
        write: Callable[[FlatTensors], None],
        rates: Sequence[float],
        clock: int,
    ) -> None:
        self._lay_out(given.center.values)
        assert self._kept is not None
        write(self._kept)
        self._is_taken = False
        self._rates = rates
        self._due_at = clock + self._delay

    @override
    def is_due(self, clock: int) -> bool:
        return self.is_pending and clock >= self._due_at

    @property
    @override
    def is_pending(self) -> bool:
        return self._rates is not None

    @override
    def take(self) -> tuple[Groups, Sequence[float]]:
        assert self._rates is not None
        assert self._kept is not None
        assert self._center is not None
        rates, self._rates = self._rates, None
        if not self._is_taken:
            elastic_difference_([self._kept.flat], [self._center.flat])
        return self._kept.groups, rates

    @override
    def forget(self) -> None:
        self._rates = None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._rates is None:
            return {}
        assert self._kept is not None
        assert self._center is not None
        differences = self._kept.flat.clone()
        if not self._is_taken:
            elastic_difference_([differences], [self._center.flat])
        return {"differences": differences, "rates": list(self._rates), "due_at": self._due_at}

    @override
    def load_state_dict(self, state: dict[str, Any], center: FlatTensors) -> None:
        self._rates = state.get("rates")
        if self._rates is None or len(self._rates) != len(center.groups):
            self.forget()
            return
        self._lay_out(center)
        assert self._kept is not None
        self._kept.flat.copy_(state["differences"])
        self._is_taken = True
        self._due_at = state["due_at"]

    def _lay_out(self, center: FlatTensors) -> None:
        if self._center is not center:
            self._center = center
            self._kept = center.like()
