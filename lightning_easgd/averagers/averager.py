"""What every way of averaging has in common: one averager per optimizer, and workers that meet."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.averagers.astray import AstrayPolicy
from lightning_easgd.averagers.averaged_parameters import Names
from lightning_easgd.averagers.common_values import CommonValues, common_values
from lightning_easgd.averagers.exchange_order import Header, Meeting, Statistics
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.tensors.shards import is_shard, local
from lightning_easgd.transport.channel import Channel

__all__ = ["Averager", "Averaging", "follow", "versions_for"]


class Averager(ABC):
    """Averages one optimizer's parameters with their center, on the optimizer's own clock.

    Attributes:
        clock: t, the optimizer's steps so far.
        has_exchanged: Whether this center has taken an exchange of any worker, also in the run that is resumed; as far
            as this worker knows.
    """

    clock: int
    has_exchanged: bool = False

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """The averaged parameters, in the order of the optimizer's groups."""

    @property
    def laid_out(self) -> list[Tensor]:
        """The parameters in the order of the averager's flat vectors; some may not be averaged, or not yet."""
        return self.parameters

    @property
    def has_departed(self) -> bool:
        """Whether some of :attr:`parameters` are not its optimizer's any more; another one's averager may have them."""
        return False

    @abstractmethod
    def follow(self, optimizer: Optimizer) -> None:
        """Go on with another optimizer in place of the one before, on the same clock."""

    @abstractmethod
    def is_finite(self) -> bool:
        """Whether all of the worker's parameters are finite."""

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

    def go_on_at(self, clock: int) -> None:
        """Go on at this clock, where the worker's own state is not known: schedules are functions of it."""
        self.clock = clock

    @abstractmethod
    def start_at_center(self) -> None:
        """Put the worker where the center is; called before the first step only."""

    @abstractmethod
    def show_center(self) -> None:
        """Put the center into the parameters, and keep the worker's own values."""

    @abstractmethod
    def show_worker(self) -> None:
        """Put the values kept by :meth:`show_center` back into the parameters, bit for bit."""

    def close(self) -> None:  # noqa: B027 - most own nothing
        """Give back what it holds."""


class Averaging(ABC):
    """The averaging of one fit: an averager for each optimizer, and the points at which all workers meet.

    Attributes:
        control: A channel for the few numbers that all ranks compare; it reduces CPU tensors.
        worker: This worker's ranks.
        statistics: What this worker has spent on communication.
        on_astray: What a worker at a non-finite point means to the run.
        strategy: Name of the strategy, for errors.
        averagers: The averager of each optimizer; empty before :meth:`start`.
    """

    control: Channel
    worker: WorkerRanks
    statistics: Statistics
    on_astray: AstrayPolicy
    strategy: str = "EASGDStrategy"
    averagers: Mapping[Optimizer, Averager] = MappingProxyType({})

    @property
    @abstractmethod
    def waits_for_all(self) -> bool:
        """Whether a worker that waits for the others elsewhere would stop them."""

    @abstractmethod
    def start(
        self,
        optimizers: Sequence[Optimizer],
        ignored: Collection[Tensor] = (),
        trained: Collection[Tensor] = (),
        names: Names = dict,
    ) -> None:
        """Let the center begin where the workers are, and all clocks at 0. All workers call this at the same point.

        Args:
            optimizers: The worker's optimizers.
            ignored: Parameters that stay each worker's own.
            trained: Parameters that have been trained before, frozen now or not.
            names: The module's parameters.

        Raises:
            RuntimeError: If the workers' optimizers have different parameters.
        """

    @abstractmethod
    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        """Go on with other optimizers in place of those given to :meth:`start`, in their order.

        Raises:
            RuntimeError: If there are more or fewer of them.
        """

    def enter(self) -> None:  # noqa: B027 - a fixed world begins together
        """After :meth:`start` and what is resumed: come to workers that may be training already."""

    @property
    def has_exchanged(self) -> bool:
        """Whether the center of every optimizer has taken an exchange; asked on all workers after they have met."""
        return all(averager.has_exchanged for averager in self.averagers.values())

    @property
    def reaches_all(self) -> bool:
        """Whether what all workers have in common can be found."""
        return True

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
        """What the center is, beside the module's state; called after all workers have met.

        ``stores``: for each store of the center (the center first) one flat tensor for each averager; and ``versions``
        of the averagers' centers, or of a served center's chunks.
        """

    @property
    @abstractmethod
    def is_in_parameters(self) -> bool:
        """Whether the parameters' values at the center say all that :meth:`center_state_dict` does."""

    @abstractmethod
    def load_center_state_dict(self, state: dict[str, Any]) -> None:
        """Let the center begin at a state; all workers call it after :meth:`start`."""

    def assemble(self) -> None:  # noqa: B027 - where a collective operation of its own tells who is missing
        """Wait until all workers have come here, before what all do together without a meeting."""

    def common_values(self, tensors: Mapping[str, Tensor]) -> CommonValues:
        """What the workers' values have in common; called on all workers after they have met.

        Of shards that is for each rank what the workers' parts of its coordinate have in common, in parts.
        """
        whole = {name: tensor for name, tensor in tensors.items() if not is_shard(tensor)}
        common = common_values(whole, self.control)
        if len(whole) == len(tensors):
            return common
        parts = common_values({n: local(t) for n, t in tensors.items() if n not in whole}, self.worker.across)
        return CommonValues({**common.values, **parts.values}, common.same | parts.same, common.own | parts.own)

    def check_finite(self) -> None:
        """Let the run end if a worker is not at a finite point; called on all workers after they have met.

        Raises:
            NonFiniteError: If it ends.
        """
        finite = all(averager.is_finite() for averager in self.averagers.values())
        header = Header(self.control, finite=finite, strategy=self.strategy)
        header.wait()
        if header.astray is not None:
            self.on_astray.hear(header.astray, max((each.clock for each in self.averagers.values()), default=0))

    def note_progress(self) -> None:  # noqa: B027 - where nobody asks
        """Show the other workers that this one gets on; called where it does, and costs next to nothing."""

    def fail(self, reason: str = "") -> None:  # noqa: B027 - where the others notice by themselves
        """Tell the other workers that an error ends this one, and which."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the averaging holds."""


_Averager = TypeVar("_Averager", bound=Averager)


def follow(
    averagers: Mapping[Optimizer, _Averager], optimizers: Sequence[Optimizer], strategy: str
) -> dict[Optimizer, _Averager]:
    """Have each averager go on with the optimizer that stands in its optimizer's place.

    Raises:
        RuntimeError: If there are more or fewer of them.
    """
    if len(optimizers) != len(averagers):
        raise RuntimeError(
            f"{strategy}: training started with {len(averagers)} optimizers and now there are {len(optimizers)}; an"
            " optimizer that comes later has no center. Set up all of them in configure_optimizers."
        )
    for averager, optimizer in zip(averagers.values(), optimizers, strict=True):
        averager.follow(optimizer)
    return dict(zip(optimizers, averagers.values(), strict=True))


def versions_for(state: Mapping[str, Any], parts: int) -> list[int]:
    """The version of each part of a center that is loaded; of one that was cut otherwise the highest for all."""
    versions = list(state.get("versions", ()))
    return versions if len(versions) == parts else [max(versions, default=0)] * parts
