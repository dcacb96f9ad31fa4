"""Workers around a center that is the model: what Lightning sees of it, free of a class tree."""

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd._compat import is_without_steps
from lightning_easgd.averagers import Averaging, ExchangeError, Meeting, Statistics, WorkersStoppedError
from lightning_easgd.buffers import load_buffers
from lightning_easgd.service import CenterError, WorkerLostError
from lightning_easgd.shown_weights import ShownWeights
from lightning_easgd.strategies.center_hooks import CenterHooks
from lightning_easgd.strategies.center_readings import CenterReadings, named_center
from lightning_easgd.strategies.failures import first_line
from lightning_easgd.strategies.meeting_workers import MeetingWorkers

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CenterWorkers"]


class CenterWorkers(CenterReadings, MeetingWorkers):
    """Workers that are averaged with a center now and then; a subclass says how.

    The center is the model: validation, checkpoints and the module after ``fit`` hold it.
    """

    _callback_class: ClassVar[type[CenterHooks]]

    tau: int

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
        self._center_buffers: list[Tensor] = []
        self._calibrate: Callable[[], None] | None = None
        self._final_center: Mapping[str, Tensor] | None = None
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
        return self._final_center

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
        trainable = [optimizer for optimizer in self.optimizers if optimizer.param_groups]
        if not trainable:  # Lightning's stand-in where configure_optimizers returns None
            return
        self._averaging.start(trainable)
        self._shown = ShownWeights(self.lightning_module, self._averagers)
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
        if self._averaging is None or self._shown is None or is_without_steps(self._trainer):  # nothing is averaged
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        averager = self._averaging.averagers.get(optimizer)
        if averager is None:
            raise RuntimeError(
                f"{type(self).__name__}: this {type(optimizer).__name__} was not there when training started, so that"
                " it has no center; set up all optimizers in configure_optimizers."
            )
        averager.begin()
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        averager.finish()
        if not self._trainer.lightning_module.automatic_optimization:
            averager.look_ahead()
        self._stop_if_agreed()
        return output

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
        super().on_train_epoch_end()

    def on_train_end(self) -> None:
        """Let all ranks finish, and leave the center in the module, or what callbacks want there, the same on all."""
        super().on_train_end()
        if self._training:
            self._warn_without_exchange()
            self._meet(Meeting.TRAINING_END)
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
            super().teardown()

    # The parts of the above

    def _warn_without_exchange(self) -> None:
        steps = max((averager.clock for averager in self._averagers), default=0)
        if steps and not self._statistics.exchanges and not self._trainer.fast_dev_run:
            rank_zero_warn(
                f"{type(self).__name__}(tau={self.tau}): this fit ended after {steps} optimizer steps, before the first"
                " exchange, so that the center, which the module holds now, is still where training began; make more"
                f" than {self.tau} steps, or lower tau."
            )

    def _leave(self) -> None:
        if self._shown is None:
            return
        # After an error the other ranks may be anywhere, and a served center out of reach.
        with contextlib.suppress(CenterError):
            if not (self._shown.center or self._replaced):
                self._keep_buffers()
                self._show_center()
            named = {name: tensor.cpu() for name, tensor in self._named_center().items()}
            self._final_center = MappingProxyType(named)
        ended_well = not self._training and not self._interrupted
        self._shown = None
        self._training = self._validating = False
        if ended_well:  # a rank that failed in the last hooks is noticed here
            self._wait_for_all(Meeting.TEARDOWN)

    def _named_center(self) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        return named_center(self.lightning_module.named_parameters(), self._averagers)

    def _state_dict_of_center(self) -> dict[str, Any]:
        """The module's state at the center, which the module is not touched for; buffers are this rank's."""
        centers = {
            parameter.data_ptr(): center
            for averager in self._averagers
            for parameter, center in zip(averager.parameters, averager.center_values(), strict=True)
        }
        state = super().lightning_module_state_dict()
        for name, value in state.items():
            if isinstance(value, Tensor) and value.data_ptr() in centers:
                state[name] = centers[value.data_ptr()].to(value.dtype, copy=True).view_as(value)
        return copy.deepcopy(state)

    def _meet(self, meeting: Meeting) -> None:
        """Wait for all ranks, and make what belongs to the center beside its parameters."""
        self._wait_for_all(meeting)
        assert self._averaging is not None
        assert self.lightning_module is not None
        self._center_buffers = self._averaging.common_values(list(self.lightning_module.buffers()))

    def _keep_buffers(self) -> None:
        """In place of a meeting that cannot be: this rank's buffers stand for the center's."""
        assert self.lightning_module is not None
        self._center_buffers = [buffer.detach().clone() for buffer in self.lightning_module.buffers()]

    @contextlib.contextmanager
    def _at_center(self, meeting: Meeting) -> Iterator[None]:
        assert self._shown is not None or not self._training
        if self._shown is None or self._shown.center:
            yield
            return
        if self._interrupted:
            self._keep_buffers()
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
        assert self._shown is not None
        assert self.lightning_module is not None
        changed = not self._shown.is_center(self._center_buffers)
        (share,) = self._averaging.common_values([torch.tensor(float(changed))])
        if share > 0:
            tensors = [*self.lightning_module.parameters(), *self.lightning_module.buffers()]
            torch._foreach_copy_(tensors, self._averaging.common_values(tensors))

    def _show_calibrated_center(self) -> None:
        """Show the center after a meeting: here all ranks may communicate."""
        self._show_center()
        if self._calibrate is None:
            return
        assert self._averaging is not None
        assert self.lightning_module is not None
        self._calibrate()
        self._center_buffers = self._averaging.common_values(list(self.lightning_module.buffers()))
        load_buffers(self.lightning_module, self._center_buffers)

    def _show_center(self) -> None:
        assert self._shown is not None
        self._shown.show_center(self._center_buffers)
