"""The sum of the workers' differences in synchronous mode: the interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.tensors.flat_tensors import FlatTensors

__all__ = ["DifferenceSum", "Restored"]


@final
@dataclass(frozen=True)
class Restored:
    """The center is now that of the other workers, which have moved it without this one.

    Attributes:
        clock: t of a worker that has been there.
        restarts: Whether this worker starts again at the center.
    """

    clock: int
    restarts: bool


class DifferenceSum(ABC):
    r"""Adds up how far the workers are from their center, exchange after exchange, and lets the center move by it.

    It gives :meth:`ReplicatedCenter.move_` the sum :math:`\sum_i \Delta^i`, part by part, and the share s of each; when
    all parts have been moved it calls :meth:`ReplicatedCenter.end_exchange`, once.

    An exchange of a worker is, in this order: :meth:`make_room`; :math:`\Delta^i` is written into ``wire``;
    :meth:`start`; ``given`` is read, at the latest before the first :meth:`advance`; :meth:`advance` after each of the
    worker's optimizer steps, which does what can be done without waiting; :meth:`finish`, which waits for the rest.
    All workers make the same exchanges in the same order, each when it gets there. The center comes out bitwise the
    same on all of them.

    On a GPU all of this is put into the current stream, but for what a process group does in its own. Wire, center and
    messages live as long as the sum, so that no stream uses memory that has been given away (``record_stream``), and
    they keep their addresses, as parameters do: a graph that was captured (``torch.compile(mode="reduce-overhead")``)
    finds them. The optimizer's step and a gradient scaler are outside of it; a step that the scaler skips is no step.

    Args:
        center: The center, which only this object moves while an exchange is under way.
        wire: A buffer with the center's layout.

    Attributes:
        center: As given.
        wire: Where a worker writes its :math:`\Delta^i`; between two exchanges it may hold anything else.
        is_lost: Whether the last exchange has come to nothing: the center has not moved.
    """

    is_lost: bool = False

    def __init__(self, center: ReplicatedCenter, wire: FlatTensors) -> None:
        self.center = center
        self.wire = wire
        self._norms: list[Tensor] | None = None

    @abstractmethod
    def renewed(self, center: ReplicatedCenter, origins: Sequence[int | None]) -> "DifferenceSum":
        """The sum that takes this one's place when the center has got another layout; with no exchange under way.

        Each worker makes it when it gets there, without waiting for one that has not. This one is closed.

        Args:
            center: The new center.
            origins: For each view of the new center the number of its view in this one's; None for a new one.
        """

    @property
    def given(self) -> list[list[Tensor]]:
        r"""This worker's :math:`\Delta^i` of the exchange that has been started, in the groups of ``wire``."""
        return self.wire.groups

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that this worker sends for an exchange."""

    def make_room(self) -> None:
        """Return when ``wire`` may be written to.

        Raises:
            ExchangeError: If a worker that still reads it is lost.
        """
        self._norms = None

    @property
    def has_room(self) -> bool:
        """Whether ``wire`` may be written to now."""
        return True

    @abstractmethod
    def start(self, shares: Sequence[float]) -> None:
        """Give the difference in ``wire`` to the sum.

        Args:
            shares: s for each group.
        """

    @abstractmethod
    def advance(self) -> None:
        """Do what the exchange under way can do without waiting; without one, nothing."""

    @abstractmethod
    def finish(self) -> None:
        """Wait for the exchange under way, and move the center by it, unless :meth:`advance` has done so.

        Raises:
            ExchangeError: If a worker is lost.
        """

    # Where workers come and go

    @property
    def workers(self) -> int | None:
        """p, the number of workers of the exchange that is due; None where it is always the same."""
        return None

    def is_due(self, clock: int, tau: int) -> bool:
        """Whether an exchange begins at this clock."""
        return clock % tau == 0

    def look_ahead(self, clock: int, complete: Callable[[], None]) -> None:  # noqa: B027 - a fixed world needs no word
        """After a step: prepare the next exchange, for which ``complete`` ends the one under way."""

    def is_expected(self) -> bool:
        """Whether the other workers count on this one for an exchange, wherever it is."""
        return False

    def enter(self, clock: int) -> bool:  # noqa: ARG002
        """Come to workers that may be training already; False where all begin together.

        With True an exchange is due, of a worker that gives nothing.
        """
        return False

    @property
    def must_enter_again(self) -> bool:
        """Whether the exchange that :meth:`enter` has begun has failed, and the others may be ahead."""
        return False

    def take_restored(self) -> Restored | None:
        """Let the center be the others', where this worker was behind; None if it was not."""
        return None

    def norms(self) -> list[Tensor]:
        r"""The norm of each group of the last :math:`\Delta^i`, each a tensor of shape (); taken once for each."""
        if self._norms is None:
            self._norms = [torch.linalg.vector_norm(segment) for segment in self.wire.segments]
        return self._norms

    def state_dict(self) -> dict[str, Any]:
        """What a resumed worker must know, in tensors and primitives; with no exchange under way."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have no memory
        """Go on where :meth:`state_dict` was taken."""

    def close(self) -> None:  # noqa: B027 - most own nothing
        """Give back what it holds."""
