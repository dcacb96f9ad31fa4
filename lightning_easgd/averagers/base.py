"""What every way of averaging has in common: one averager per optimizer, and workers that meet."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.averagers.channel import Channel
from lightning_easgd.averagers.line import Meeting, Statistics
from lightning_easgd.buffers import common_values

__all__ = ["Averager", "Averaging"]


class Averager(ABC):
    """Averages one optimizer's parameters with their center, on the optimizer's own clock.

    Attributes:
        clock: t, the optimizer's steps so far.
    """

    clock: int

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """The averaged parameters, in the order of the optimizer's groups."""

    @abstractmethod
    def begin(self) -> None:
        """Before an optimizer step, at the point where its gradient is taken: begin an exchange if one is due."""

    @abstractmethod
    def finish(self) -> None:
        """After an optimizer step: finish what the worker needs of the exchange, and count the step."""

    def look_ahead(self) -> None:  # noqa: B027 - an elastic exchange may begin when the gradient has been taken
        """After :meth:`finish`, where the next gradient is taken before :meth:`begin`: do what must precede it."""

    @abstractmethod
    def complete(self) -> None:
        """Wait for the exchange under way, if any, and apply it."""

    def settle(self) -> None:  # noqa: B027 - a served center is always up to date
        """Wait until the center is up to date; the worker is not touched."""

    @abstractmethod
    def center_values(self) -> list[Tensor]:
        """The center of each parameter, as far as it is known without waiting."""

    @abstractmethod
    def elastic_distance(self) -> float | None:
        """The norm of this worker's distance from the center at the last exchange; None before the first."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This worker's own part of the averaging, in tensors and primitives; with no exchange under way."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the parameters hold the worker's values of that point."""

    @abstractmethod
    def start_at_center(self) -> None:
        """Put the worker where the center is; called before the first step only."""

    @abstractmethod
    def show_center(self) -> None:
        """Put the center into the parameters, and keep the worker's own values."""

    @abstractmethod
    def show_worker(self) -> None:
        """Put the values kept by :meth:`show_center` back into the parameters, bit for bit."""


class Averaging(ABC):
    """The averaging of one fit: an averager for each optimizer, and the points at which all workers meet.

    Attributes:
        control: A channel for the few numbers that all workers compare; it reduces CPU tensors.
        statistics: What this worker has spent on communication.
        averagers: The averager of each optimizer; empty before :meth:`start`.
    """

    control: Channel
    statistics: Statistics
    averagers: Mapping[Optimizer, Averager] = MappingProxyType({})

    @property
    @abstractmethod
    def waits_for_all(self) -> bool:
        """Whether a worker that waits for the others elsewhere would stop them."""

    @abstractmethod
    def start(self, optimizers: Sequence[Optimizer]) -> None:
        """Let the center begin where the workers are, and all clocks at 0. All workers call this at the same point."""

    @abstractmethod
    def meet(self, meeting: Meeting) -> None:
        """Return when all workers have come to this meeting, with every exchange applied.

        Raises:
            WorkersStoppedError: If all stop before, as one of them asked.
            ExchangeError: If a worker came to another meeting, or is lost.
        """

    @abstractmethod
    def request_stop(self) -> None:
        """Ask all workers to stop; may be called by a signal handler."""

    @property
    @abstractmethod
    def stop_agreed(self) -> bool:
        """Whether to stop here, because some worker asked."""

    @abstractmethod
    def center_state_dict(self) -> dict[str, Any]:
        """What the center is beyond the parameters' values at the center; called after all workers have met.

        It is empty where those values say it all. Else ``stores``: for each store of the center (the center first)
        one flat tensor for each averager; and ``versions`` of a served center's chunks.
        """

    @abstractmethod
    def load_center_state_dict(self, state: dict[str, Any]) -> None:
        """Let the center begin at a state that is not empty; all workers call it after :meth:`start`."""

    def common_values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The workers' mean of each tensor, of integers rank 0's; called on all workers after they have met."""
        return common_values(tensors, self.control)

    def note_progress(self) -> None:  # noqa: B027 - where nobody asks
        """Show the other workers that this one gets on; called where it does, and costs next to nothing."""

    def fail(self, reason: str = "") -> None:  # noqa: B027 - where the others notice by themselves
        """Tell the other workers that an error ends this one, and which."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the averaging holds."""
