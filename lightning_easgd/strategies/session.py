"""The averaging of one training, as the strategies of a Trainer and of Fabric both use it."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.averagers import Averager, Averaging, Meeting
from lightning_easgd.averagers.astray import begin_anew, drop_gradients
from lightning_easgd.averagers.common_values import CommonValues
from lightning_easgd.strategies.handed_values import HandedValues, take_over
from lightning_easgd.strategies.outside_values import OutsideValues
from lightning_easgd.strategies.shown_weights import ShownWeights
from lightning_easgd.strategies.spectral_norm import iterate_power_method
from lightning_easgd.strategies.steps import Steps, averagers_of
from lightning_easgd.tensors.buffers import FiniteValues, load_buffers
from lightning_easgd.tensors.shards import local, reshard

__all__ = ["CenterSession", "Owner"]


class Owner(Protocol):
    """What a session asks of the strategy that owns it."""

    on_nonfinite: str

    @property
    def has_common_buffers(self) -> bool: ...  # noqa: D102
    def prepare_optimizer(self, optimizer: Optimizer) -> None: ...  # noqa: D102
    def is_prepared(self, optimizer: Optimizer) -> bool: ...  # noqa: D102


@final
class CenterSession:
    """A worker and its center, from the start of a training to its end.

    In this order: :meth:`start`; around every optimizer step :meth:`before_step` and :meth:`after_step`; where all
    ranks come together :meth:`meet`, and after it, if the center is to be read, :meth:`show_center` and then
    :meth:`show_worker`; at last :meth:`close`.

    Args:
        owner: The strategy; its class's name stands in errors.
        averaging: Made, and not started.
        module: Gives the module; several as one.
        optimizers: Gives the optimizers that the module is trained with.
        ignored: Gives the names of the parameters and buffers that stay each worker's own.

    Attributes:
        averaging: As given.
        common: Of the last meeting: what belongs to the center beside what the averagers hold.
        steps_made: The steps of each averager's optimizer in this training.
        outside: What no averager holds; None before the start.
    """

    def __init__(
        self,
        owner: Owner,
        averaging: Averaging,
        module: Callable[[], nn.Module],
        optimizers: Callable[[], list[Optimizer]],
        ignored: Callable[[], frozenset[str]],
    ) -> None:
        self._owner = owner
        self._name = type(owner).__name__
        self.averaging = averaging
        self._module = module
        self._optimizers = optimizers
        self._ignored = ignored
        self._steps: Steps | None = None
        self._finite: FiniteValues | None = None
        self._shown: ShownWeights | None = None  # while the module shows the center
        self.outside: OutsideValues | None = None
        self.common = CommonValues()
        self._same: frozenset[str] = frozenset()  # of the last meeting
        self.steps_made: dict[Averager, int] = {}

    def start(self, steps: Steps, trained: Collection[str] = ()) -> None:
        """Let the center begin where the workers are, and the clocks at 0; all ranks call it at the same point.

        Args:
            steps: Knows which steps are under way.
            trained: Names of parameters that have been trained before, frozen now or not.
        """
        for optimizer in self._optimizers():  # once more: a loaded one has the settings of the run that saved it
            self._owner.prepare_optimizer(optimizer)
        ignored, parameters, module = self._ignored(), dict(self.module.named_parameters()), self._module
        self.averaging.start(
            self._optimizers(),
            ignored=[parameter for name, parameter in parameters.items() if name in ignored],
            trained=[parameter for name, parameter in parameters.items() if name in trained],
            # Not through this object: what a circle holds open would stay open until it is found.
            names=lambda: {parameter: name for name, parameter in reshard(module()).named_parameters()},
        )
        self._steps = steps
        self._shown = None
        self._look_outside(ignored)
        self.steps_made = dict.fromkeys(self.averagers, 0)

    def take_in(self) -> None:
        """Take notice of modules that have come; with them each tensor may have another name."""
        self.check_outside()
        self._look_outside(self._ignored())
        self.common, self._same = CommonValues(), frozenset()

    def _look_outside(self, ignored: frozenset[str]) -> None:
        self.outside = outside = OutsideValues(
            self.module,
            self.averagers,
            self._optimizers,
            ignored=ignored,
            with_buffers=self._owner.has_common_buffers,
            strategy=self._name,
        )
        self._finite = (
            FiniteValues(lambda: {name: local(tensor) for name, tensor in outside.tensors().items()})
            if self._owner.on_nonfinite == "reset"
            else None
        )

    # What a worker that comes to others gets from them

    def handed_values(self) -> HandedValues:
        """What of the module no averager holds, for another worker."""
        assert self.outside is not None
        return HandedValues(self.outside, sum(p.nbytes for averager in self.averagers for p in averager.parameters))

    def take_over(self, handed: Mapping[str, Any]) -> None:
        """Take what another worker has handed over; before the first step."""
        assert self.outside is not None
        values = take_over(self.outside, handed, self._name)
        if self._finite is not None:
            self._finite.update(values)

    # What there is

    @property
    def module(self) -> nn.Module:
        """The module; several as one. Its parameters are those of the optimizers."""
        return reshard(self._module())

    @property
    def averagers(self) -> list[Averager]:
        """The averager of each optimizer."""
        return list(self.averaging.averagers.values())

    @property
    def is_started(self) -> bool:
        """Whether there is a center."""
        return self.outside is not None

    @property
    def shows_center(self) -> bool:
        """Whether the module holds the center now."""
        return self._shown is not None

    def named_center(self, instead: Mapping[Tensor, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        """The center of each averaged parameter, by the parameter's name or else its place in the optimizers.

        Args:
            instead: What is to stand for the center of some parameters.
        """
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.module.named_parameters()}
        return {
            names.get(parameter, f"optimizers.{number}.{index}"): instead.get(parameter, value).to(value.dtype)
            for number, averager in enumerate(self.averagers)
            for index, (parameter, value) in enumerate(zip(averager.parameters, averager.center_values(), strict=True))
        }

    def described(self) -> list[str]:
        """The averaged parameters by name, dtype and shape, in the order in which their vectors are laid out."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.module.named_parameters()}
        return [
            f"{names.get(parameter, 'a parameter')} ({parameter.dtype}, {tuple(parameter.shape)})"
            for averager in self.averagers
            for parameter in averager.parameters
        ]

    def settled_center(self) -> Mapping[str, Tensor]:
        """The same with the exchange under way; read-only."""
        for averager in self.averagers:
            averager.settle()
        return MappingProxyType(self.named_center())

    def elastic_distance(self) -> float | None:
        """The worker's distance from the center at its last exchange, over all optimizers; None before the first."""
        distances = [averager.elastic_distance() for averager in self.averagers]
        known = [distance for distance in distances if distance is not None]
        return math.hypot(*known) if known else None

    @property
    def center_has_moved(self) -> bool:
        """Whether the center holds something of what the workers have learnt; asked after all have met."""
        return self.averaging.has_exchanged

    @property
    def is_center_in_module(self) -> bool:
        """Whether the module's state at a meeting says all about the center; asked after all have met."""
        holds = self._shown is None or self._shown.holds_center
        return holds and self.center_has_moved and self.averaging.is_in_parameters

    # A step

    def averager_of(self, optimizer: Optimizer) -> Averager | None:
        """The averager of an optimizer, which may have been made anew since training started."""
        if optimizer not in self.averaging.averagers and any(optimizer is known for known in self._optimizers()):
            for each in self._optimizers():
                self._owner.prepare_optimizer(each)
            self.averaging.follow(self._optimizers())
        return self.averaging.averagers.get(optimizer)

    def before_step(self, optimizer: Optimizer, *, remedy: str) -> None:
        """Begin an exchange if this optimizer's clock says so; called before every step, however it is made.

        Args:
            optimizer: Any optimizer of this process.
            remedy: What to do about a step at the center, for the error.

        Raises:
            RuntimeError: If the module shows the center: the step would be lost with it.
        """
        averagers = self._averagers_of_step(optimizer)
        if averagers and self.shows_center:
            raise RuntimeError(
                f"{self._name}: an optimizer step in a validation, or inside center_weights(), would be taken at the"
                f" center and lost with it; {remedy}."
            )
        if averagers and not self._owner.is_prepared(optimizer):  # its settings have been loaded or changed
            self._owner.prepare_optimizer(optimizer)
        for averager in averagers:
            averager.begin()

    def after_step(self, optimizer: Optimizer, *, gradient_comes_after: bool) -> bool:
        """Finish what the worker needs of the exchange; called after every step, however it was made.

        Args:
            optimizer: Any optimizer of this process.
            gradient_comes_after: Whether the next gradient is taken inside the next step.

        Returns:
            Whether it was a step of a worker's.
        """
        averagers = self._averagers_of_step(optimizer)
        if not averagers and self.outside is not None:
            self.outside.note_step(optimizer)
        for averager in averagers:
            averager.finish()
            self.steps_made[averager] += 1
            if not gradient_comes_after:
                averager.look_ahead()
        return bool(averagers)

    def _averagers_of_step(self, optimizer: Optimizer) -> Sequence[Averager]:
        self.averager_of(optimizer)  # it may have been made anew
        assert self._steps is not None
        return averagers_of(optimizer, self.averaging.averagers, self._steps)

    def mend(self) -> None:
        """Put right what of a worker that starts again is not one optimizer's: nothing of where it was may stay."""
        for optimizer, averager in self.averaging.averagers.items():
            if not averager.is_finite():
                averager.start_at_center()
                begin_anew(optimizer)
            drop_gradients(averager.parameters)
        if self._finite is not None:
            self._finite.mend()

    # A meeting

    def check_outside(self) -> None:
        """Raise if parameters have been trained that nothing averages."""
        if self.outside is not None:
            self.outside.check()

    def meet(self, meeting: Meeting) -> None:
        """Wait for all ranks, and find what belongs to the center beside what the averagers hold of it.

        Raises:
            WorkersStoppedError: If all stop before.
            ExchangeError: If a rank came to another meeting, or is lost.
        """
        self.check_outside()
        self.averaging.meet(meeting)
        assert self.outside is not None
        self.common = self.outside.in_common(self.averaging, self._finite)
        self._same = self.common.same & self.outside.tensors().keys()

    @property
    def same_everywhere(self) -> frozenset[str]:
        """Parameters and buffers that no averager has and that are the same on all ranks, and in the center."""
        return self._same if self._shown is None else self._same - self._shown.altered

    def agree_on_writes(self, gather: Callable[[Any], list[Any]]) -> None:
        """Let all ranks know which buffers of what is shown are written to: a validation may do it on one of them.

        Args:
            gather: Gives what each rank gives; all ranks call this at the same point.
        """
        if self._shown is not None:
            self._shown.note_writes_elsewhere(frozenset().union(*gather(self._shown.altered)))

    def show_center(self, *, keeps_writes: bool = False) -> None:
        """Show the center in the module, with the common values of the last meeting.

        Args:
            keeps_writes: As for :class:`ShownWeights`.
        """
        self._shown = ShownWeights(self.module, self.averagers, keeps_writes=keeps_writes)
        self._shown.show_center(self.common.values)

    def show_worker(self) -> None:
        """Go back to the worker's own values, bit for bit."""
        shown, self._shown = self._shown, None
        if shown is not None:
            shown.show_worker()
            self._same -= shown.altered  # a checkpoint of what was shown may yet be written

    @contextmanager
    def worker(self) -> Iterator[None]:
        """Context in which the module shows the worker; afterwards exactly what it showed before."""
        if self._shown is None:
            yield
            return
        with self._shown.worker():
            yield

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context in which the module shows what it does outside of :meth:`worker`, also inside of that."""
        assert self._shown is not None
        with self._shown.shown():
            yield

    def calibrate(self, calibrate: Callable[[], None]) -> None:
        """Let a function change the buffers of the center that is shown; they are then the mean over the ranks."""
        assert self.outside is not None
        calibrate()
        self.averaging.assemble()
        load_buffers(self.module, self.outside.common_values(self.averaging, self.outside.buffers()).values)
        assert self._shown is not None
        self._shown.note_calibration()

    @torch.no_grad()
    def share_what_is_shown(self) -> None:
        """Replace what each rank shows, an average of its own worker (EMA, SWA), by the mean over the ranks.

        Both averages are linear: the mean of the workers' averages is the average of the workers' mean.
        """
        assert self.outside is not None
        self.averaging.assemble()
        tensors = self.outside.parameters() | self.outside.buffers()
        values = self.outside.common_values(self.averaging, tensors).values
        for name, value in values.items():
            local(tensors[name]).copy_(value)
        iterate_power_method(self.module, values)

    # The end

    def final_center(self) -> dict[str, Tensor]:
        """The center as it is to be read when all has ended: what is shown of it, on the host, and no view."""
        instead = {} if self._shown is None else self._shown.values()
        return {name: tensor.detach().cpu().clone() for name, tensor in self.named_center(instead).items()}

    def end(self) -> None:
        """Training has ended: there is nothing to show any more."""
        self._shown = self.outside = self._finite = None
        self.steps_made = {}

    def close(self) -> None:
        """Let go of the averaging."""
        self.end()
        self.averaging.close()
