"""Workers around a center that is the model: what Lightning sees of it, free of a class tree."""

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.averagers import Averager, Averaging, ExchangeError, Meeting, Statistics, WorkersStoppedError
from lightning_easgd.averagers.common_values import CommonValues
from lightning_easgd.served_center import CenterError, WorkerLostError
from lightning_easgd.strategies.center_hooks import CenterHooks
from lightning_easgd.strategies.center_readings import CenterReadings, named_center
from lightning_easgd.strategies.failures import first_line
from lightning_easgd.strategies.lightning_private import is_without_steps
from lightning_easgd.strategies.meeting_workers import MeetingWorkers
from lightning_easgd.strategies.outside_values import OutsideValues, ignored_names
from lightning_easgd.strategies.shown_weights import ShownWeights
from lightning_easgd.strategies.steps import Steps, averagers_of
from lightning_easgd.tensors.buffers import FiniteValues, load_buffers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CenterWorkers"]


class CenterWorkers(CenterReadings, MeetingWorkers):
    """Workers that are averaged with a center now and then; a subclass says how.

    The center is the model: validation, checkpoints and the module after ``fit`` hold it.
    """

    _callback_class: ClassVar[type[CenterHooks]]

    tau: int
    on_nonfinite: str
    _finite_values: FiniteValues | None

    def __init__(self, *arguments: Any, evaluate: str = "center", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if evaluate not in ("center", "worker"):
            raise ValueError(
                f"{type(self).__name__}(evaluate={evaluate!r}): unknown weights; use 'center' or 'worker'."
            )
        self.evaluate = evaluate
        self._shown: ShownWeights | None = None  # from the start of training to teardown
        self._callback: Any = None
        self._validating = False
        self._replaced = False  # whether a callback has put other weights in place of the worker's, for good
        self._common = CommonValues()  # at the last meeting, of what no averager holds
        self._outside: OutsideValues | None = None  # as long as the shown weights
        self._steps: Steps | None = None  # from the start of training to teardown
        self._steps_made: dict[Averager, int] = {}
        self._trained_before: frozenset[str] = frozenset()  # parameters, in the run that is resumed
        self._calibrate: Callable[[], None] | None = None
        self._final_center: dict[str, Tensor] | None = None  # a view of it could not be pickled
        self._statistics = Statistics()

    @abstractmethod
    def _make_averaging(self, optimizers: Sequence[Optimizer]) -> Averaging:
        """Make the averaging of one fit; all ranks do it at the same point."""

    # What users read

    @property
    def center(self) -> Mapping[str, Tensor]:
        """The center as it is now: read-only, parameter name → tensor of the parameter's shape.

        The tensors are float32 (float64 for double parameters). Reading waits for the exchange under way; the next
        one may change the tensors. After ``fit`` it is the final center.

        Raises:
            RuntimeError: If training has not started in this process.
        """
        if self._shown is not None:
            for averager in self._averagers:
                averager.settle()
            return MappingProxyType(self._named_center())
        if self._final_center is None:
            raise RuntimeError(
                f"{type(self).__name__}.center: there is no center before training starts, nor in the process that"
                " only spawned the ranks; there, read the module's parameters after fit: they are the center."
            )
        return MappingProxyType(self._final_center)

    @property
    def known_center(self) -> Mapping[str, Tensor]:
        """The center as far as this rank knows it without waiting for another, by parameter name; read-only.

        In synchronous mode that is :attr:`center` with the exchange under way or without it, as far as the others are;
        a served center is read where it is. The next exchange may change the tensors.

        Raises:
            RuntimeError: If there is no training under way in this process.
        """
        if self._shown is None:
            raise RuntimeError(f"{type(self).__name__}.known_center: it is there while training is; use center.")
        return MappingProxyType(self._named_center())

    @contextlib.contextmanager
    def center_weights(self) -> Iterator[None]:
        """Context in which the module holds the center; afterwards each worker's own values, bit for bit.

        During training all ranks enter it at the same point of their work.
        """
        with self._at_center(Meeting.CENTER_WEIGHTS):
            yield

    def calibrate_buffers_with(self, calibrate: Callable[[], None] | None) -> None:
        """Have buffers of the center made anew at the center, in place of the mean of the workers' buffers.

        Wherever all ranks have met and the module shows the center (validation, checkpoints, :meth:`center_weights`,
        the end of training) the function is called with that mean in the module's buffers, and may change them. The
        center's buffers are then the mean over the ranks of what it leaves there, of integers rank 0's. Each worker's
        own buffers come back bit for bit.

        Args:
            calibrate: The function, the same on all ranks; None for none any more.
        """
        self._calibrate = calibrate

    @contextlib.contextmanager
    def worker_weights(self) -> Iterator[None]:
        """Context in which the module holds this worker's own values, where it holds the center otherwise.

        That is in validation and, until the strategy is torn down, at the end of training.
        """
        with contextlib.nullcontext() if self._shown is None else self._shown.worker():
            yield

    # Lightning's hooks, in the order in which it calls them

    @abstractmethod
    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Check an optimizer, and make it what a worker trains with, in place."""

    @abstractmethod
    def is_prepared(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer still is what :meth:`prepare_optimizer` has made it; asked before every step."""

    def setup_optimizers(self, trainer: "Trainer") -> None:
        """Create the optimizers."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self.prepare_optimizer(optimizer)

    def setup(self, trainer: "Trainer") -> None:
        """Set up the workers, and for a fit what averages them."""
        super().setup(trainer)
        if trainer.state.fn != "fit":
            return
        if self._layer_sync is not None:
            rank_zero_warn(
                "Trainer(sync_batchnorm=True): SyncBatchNorm communicates in every forward pass, so that the workers"
                " run in lock-step; without it the center's statistics are the workers' mean."
            )
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if any(cls.__name__ == "ModelPruning" for each in callbacks for cls in type(each).__mro__):
            rank_zero_warn(
                f"{type(self).__name__} with ModelPruning: each worker prunes by its own weights, so that the center,"
                " their mean, is not sparse; prune the center after fit."
            )
        self._averaging = self._make_averaging(self.optimizers)
        self._statistics = self._averaging.statistics
        self._callback = self._callback_class(self)
        callbacks.insert(0, self._callback)

    def on_train_start(self) -> None:
        """Let the center begin where the workers are, and the clocks at 0."""
        super().on_train_start()
        assert self._averaging is not None
        assert self.lightning_module is not None
        for optimizer in self.optimizers:  # once more: a resumed one has the settings of the run that saved it
            self.prepare_optimizer(optimizer)
        module, ignored = self.lightning_module, ignored_names(self.lightning_module)
        parameters = dict(module.named_parameters())
        self._averaging.start(
            self._trained_optimizers(),
            ignored=[parameter for name, parameter in parameters.items() if name in ignored],
            trained=[parameter for name, parameter in parameters.items() if name in self._trained_before],
            names=self._names,
        )
        self._shown = ShownWeights(module, self._averagers)
        self._outside = OutsideValues(
            module,
            self._averagers,
            self._trained_optimizers,
            ignored=ignored,
            with_buffers=self.has_common_buffers,
            strategy=type(self).__name__,
        )
        if self._steps is not None:  # of the learning rate finder's fit inside this one
            self._steps.close()
        self._steps = Steps(self.before_step, self.after_step)
        self._steps_made = dict.fromkeys(self._averagers, 0)
        self._finite_values = FiniteValues(self._outside.tensors) if self.on_nonfinite == "reset" else None
        self._training = True
        self._validating = self._replaced = False
        self._look_for_meetings()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "LightningModule | Any | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Make one step of the worker, with an exchange around it if this optimizer's clock says so."""
        make = partial(super().optimizer_step, optimizer, closure, model, **kwargs)
        if self._steps is None or not self._is_averaging or not optimizer.param_groups:  # Lightning's stand-in for none
            return make()
        if self._averager_of(optimizer) is None:
            raise RuntimeError(
                f"{type(self).__name__}: this {type(optimizer).__name__} was not there when training started, so that"
                " it has no center; set up all optimizers in configure_optimizers."
            )
        return self._steps.make(optimizer, make)

    def before_step(self, optimizer: Optimizer) -> None:
        """Begin an exchange if this optimizer's clock says so; called before every step, however it is made.

        Raises:
            RuntimeError: If the module shows the center: the step would be lost with it.
        """
        averagers = self._averagers_of_step(optimizer)
        if averagers and self._shown is not None and self._shown.center:
            raise RuntimeError(
                f"{type(self).__name__}: an optimizer step in a validation, or inside of center_weights(), would be"
                " taken at the center and lost with it; make it in training, or use evaluate='worker'."
            )
        if averagers and not self.is_prepared(optimizer):  # its settings have been loaded or changed
            self.prepare_optimizer(optimizer)
        for averager in averagers:
            averager.begin()

    def after_step(self, optimizer: Optimizer, had_closure: bool) -> None:
        """Finish what the worker needs of the exchange; called after every step, however it was made."""
        averagers = self._averagers_of_step(optimizer)
        if not averagers:
            if self._is_averaging and self._outside is not None:
                self._outside.note_step(optimizer)
            return
        for averager in averagers:
            averager.finish()
            self._steps_made[averager] += 1
            if not (had_closure and self._trainer.lightning_module.automatic_optimization):
                averager.look_ahead()
        self._stop_if_agreed()

    def on_validation_start(self) -> None:
        """Let all ranks meet, and show the center to a validation that is part of a fit."""
        super().on_validation_start()
        if not self._training or self._validating:
            return
        self._validating = True
        self._meet(Meeting.VALIDATION)
        if self.evaluate == "center":
            self._show_calibrated_center()

    def on_validation_end(self) -> None:
        """Go back to the worker's own weights."""
        super().on_validation_end()
        if not self._validating:
            return
        self._validating = False
        if self._shown is not None and self._shown.center:
            self._shown.show_worker()

    def on_batch_fetched(self) -> None:
        """Take notice before a batch is trained on."""

    def on_train_epoch_end(self) -> None:
        """Let ranks that end an epoch at different times meet; see whether the next epoch trains the worker."""
        self._replaced = is_without_steps(self._trainer)
        self._check_outside()
        super().on_train_epoch_end()

    def on_train_end(self) -> None:
        """Let all ranks finish, and leave the center in the module, or what callbacks want there, the same on all."""
        super().on_train_end()
        if self._training:
            self._meet(Meeting.TRAINING_END)
            self._warn_without_exchange()
            if not self._replaced:
                self._show_calibrated_center()
            self._training = False
        elif self._shown is not None:
            self._share_what_callbacks_left()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state at the center. During training all ranks ask for it at the same point of their work."""
        if not self._training:
            return super().lightning_module_state_dict()
        if self._alone:
            return self._state_dict_of_center()
        with self._at_center(Meeting.CHECKPOINT):
            # A copy: the module goes back to the worker, and an asynchronous writer may still be reading.
            return copy.deepcopy(super().lightning_module_state_dict())

    def on_exception(self, exception: BaseException) -> None:
        """Meet the others once more if all stop together, else tell them that this rank has failed."""
        super().on_exception(exception)
        if self._averaging is None:
            return
        if self._training and self._averaging.stop_agreed:
            with contextlib.suppress(ExchangeError, CenterError, WorkersStoppedError):  # the first error counts
                self._averaging.meet(Meeting.TRAINING_END)
        elif not isinstance(exception, WorkerLostError):  # the first to fail is the one to be named
            self._averaging.fail(first_line(exception))

    def teardown(self) -> None:
        """Leave the center in the module, also when an error ended the run, and let go of the averaging."""
        try:
            self._leave()
        finally:
            if self._callback is not None:
                with contextlib.suppress(ValueError):
                    self._trainer.callbacks.remove(self._callback)
                self._callback = None
            averaging, self._averaging = self._averaging, None
            if averaging is not None:
                averaging.close()
            if self._steps is not None:
                self._steps.close()
                self._steps = None
            super().teardown()

    # The parts of the above

    @property
    def _is_averaging(self) -> bool:
        """Whether a step is one of a worker's, which counts."""
        return self._training and not is_without_steps(self._trainer)

    def _trained_optimizers(self) -> list[Optimizer]:
        """The optimizers, without Lightning's stand-in where configure_optimizers returns None."""
        return [optimizer for optimizer in self.optimizers if optimizer.param_groups]

    def _averager_of(self, optimizer: Optimizer) -> Averager | None:
        """The averager of an optimizer, which may have been made anew since training started."""
        assert self._averaging is not None
        averagers = self._averaging.averagers
        if optimizer not in averagers and any(optimizer is known for known in self.optimizers):
            for each in self._trained_optimizers():
                self.prepare_optimizer(each)
            self._averaging.follow(self._trained_optimizers())
        return self._averaging.averagers.get(optimizer)

    def _averagers_of_step(self, optimizer: Optimizer) -> list[Averager]:
        if not self._is_averaging or self._steps is None:
            return []
        self._averager_of(optimizer)  # it may have been made anew
        assert self._averaging is not None
        return averagers_of(optimizer, self._averaging.averagers, self._steps)

    def _names(self) -> dict[Tensor, str]:
        """The module's parameters, in its order, with their names."""
        assert self.lightning_module is not None
        return {parameter: name for name, parameter in self.lightning_module.named_parameters()}

    @property
    def _center_has_moved(self) -> bool:
        """Whether the center holds something of what the workers have learnt; asked after all have met."""
        assert self._averaging is not None
        return self._averaging.has_exchanged

    @property
    def _is_center_in_module(self) -> bool:
        """Whether the module's state at a meeting says all about the center; asked after all have met."""
        assert self._averaging is not None
        return self._center_has_moved and self._averaging.is_in_parameters

    def _warn_without_exchange(self) -> None:
        assert self._averaging is not None
        apart = [steps for averager, steps in self._steps_made.items() if steps and not averager.has_exchanged]
        if not apart or self._trainer.fast_dev_run:
            return
        held = "the mean of their weights" if self._averaging.reaches_all else "what training began with"
        rank_zero_warn(
            f"{type(self).__name__}(tau={self.tau}): this fit ended after {max(apart)} optimizer steps, before the"
            f" first exchange, so that the workers have trained apart; the module holds {held}. Make more than"
            f" {self.tau} steps of every optimizer, or lower tau."
        )

    def _leave(self) -> None:
        if self._shown is None:
            return
        # After an error the other ranks may be anywhere, and a served center out of reach.
        with contextlib.suppress(CenterError):
            if not (self._shown.center or self._replaced):
                self._common = CommonValues()  # there can be no meeting: what no averager holds is this rank's
                self._show_center()
            replaced = self._shown.values() if self._shown.center else {}
            self._final_center = {name: tensor.cpu() for name, tensor in self._named_center(replaced).items()}
        ended_well = not self._training and not self._interrupted
        self._shown = self._outside = self._finite_values = None
        self._steps_made = {}
        self._training = self._validating = False
        if ended_well:  # a rank that failed in the last hooks is noticed here
            self._wait_for_all(Meeting.TEARDOWN)

    def _named_center(self, replaced: Mapping[Tensor, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        return named_center(self.lightning_module.named_parameters(), self._averagers, replaced)

    def _state_dict_of_center(self) -> dict[str, Any]:
        """The module's state at the center, in the middle of anything; buffers are this rank's.

        The parameters only point to the center meanwhile, whatever the module makes of them in its state: a step that
        is under way has noted how often they were written to, and where.
        """
        pairs = [
            (parameter, center.to(parameter.device, parameter.dtype, copy=True))
            for averager in self._averagers
            for parameter, center in zip(averager.parameters, averager.center_values(), strict=True)
        ]
        own = [parameter.data for parameter, _ in pairs]
        try:
            for parameter, center in pairs:
                parameter.data = center
            return copy.deepcopy(super().lightning_module_state_dict())
        finally:
            for (parameter, _), value in zip(pairs, own, strict=True):
                parameter.data = value

    def _meet(self, meeting: Meeting) -> None:
        """Wait for all ranks, and find what belongs to the center beside what the averagers hold of it."""
        self._check_outside()
        self._wait_for_all(meeting)
        assert self._averaging is not None
        assert self._outside is not None
        self._common = self._outside.in_common(self._averaging, self._finite_values)
        self._same_everywhere = self._common.same & self._outside.tensors().keys()

    def _check_outside(self) -> None:
        if self._training and self._outside is not None:
            self._outside.check()

    @contextlib.contextmanager
    def _at_center(self, meeting: Meeting) -> Iterator[None]:
        assert self._shown is not None or not self._training
        if self._shown is None or self._shown.center:
            yield
            return
        if self._interrupted:
            self._common = CommonValues()
            self._show_center()
        else:
            self._meet(meeting)
            self._show_calibrated_center()
        try:
            yield
        finally:
            self._shown.show_worker()

    @torch.no_grad()
    def _share_what_callbacks_left(self) -> None:
        """Replace each rank's own average of its worker (EMA, SWA) by the mean over the ranks.

        Both averages are linear: the mean of the workers' averages is the average of the workers' mean.
        """
        assert self._averaging is not None
        assert self._outside is not None
        self._averaging.assemble()
        tensors = self._outside.parameters() | self._outside.buffers()
        for name, value in self._averaging.common_values(tensors).values.items():
            tensors[name].copy_(value)

    def _show_calibrated_center(self) -> None:
        """Show the center after a meeting: here all ranks may communicate."""
        self._show_center()
        if self._calibrate is None:
            return
        assert self._averaging is not None
        assert self._outside is not None
        assert self.lightning_module is not None
        self._calibrate()
        self._averaging.assemble()
        of_buffers = self._averaging.common_values(self._outside.buffers()).values
        load_buffers(self.lightning_module, of_buffers)

    def _show_center(self) -> None:
        assert self._shown is not None
        self._shown.show_center(self._common.values)
