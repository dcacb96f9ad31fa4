"""The body of the strategies of a Trainer: what happens at each of Lightning's hooks, free of a class tree."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_easgd.averagers import ExchangeError, Meeting, Statistics, WorkersStoppedError
from lightning_easgd.averagers.common_values import CommonValues
from lightning_easgd.served_center import CenterError, WorkerLostError
from lightning_easgd.strategies.failures import first_line
from lightning_easgd.strategies.outside_values import ignored_names
from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.shown_weights import at_known_center
from lightning_easgd.strategies.steps import Steps
from lightning_easgd.strategies.trainer.checkpoints import TrainerCheckpoints
from lightning_easgd.strategies.trainer.free_ranks import FreeRanks
from lightning_easgd.strategies.trainer.lightning_private import (
    is_search,
    is_without_steps,
    linking_what_is_saved,
    request_stop,
)
from lightning_easgd.strategies.trainer.meetings import Meetings
from lightning_easgd.strategies.trainer.refusals import (
    check_callbacks,
    check_sharded_callbacks,
    warn_of_callbacks,
    warn_of_layer_sync,
    warn_without_exchange,
)
from lightning_easgd.strategies.worker_group import forget_buckets
from lightning_easgd.strategies.worker_process import WorkerProcess
from lightning_easgd.strategies.worker_state import remove_sidecar
from lightning_easgd.strategies.worker_state.keeper import StateKeeper
from lightning_easgd.transport.store_client import store_server

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object

__all__ = ["TrainerStrategy", "TrainerTree"]

_LAST_WORDS = 1.0  # seconds: three looks of a control plane


@dataclass(frozen=True)
class TrainerTree:
    """What of a class tree of Lightning's the strategies need beside its ``DDPStrategy``.

    Attributes:
        callback: Makes the callback that acts before all others.
        launcher: The launcher of spawned and forked ranks.
        stop: What ends a fit that all ranks have agreed to stop.
    """

    callback: Callable[[Any], Any]
    launcher: Callable[..., Any]
    stop: type[BaseException]


class TrainerStrategy(WorkerProcess, _Base):
    """Workers that run freely, each with its own model, and of which a method says how they are averaged.

    The center is the model: validation, checkpoints and the module after ``fit`` hold it. A method without a center
    leaves the workers alone. Lightning's hooks stand in the order in which it calls them.
    """

    tree: ClassVar[TrainerTree]

    may_come_and_go = True

    tau: int

    def __init__(
        self,
        *arguments: Any,
        evaluate: str = "center",
        recalibrate_batchnorm: int = 0,
        worker_state: str = "none",
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        name = type(self).__name__
        if evaluate not in ("center", "worker"):
            raise ValueError(f"{name}(evaluate={evaluate!r}): unknown weights; use 'center' or 'worker'.")
        _check_batches(name, recalibrate_batchnorm)
        assert self._timeout is not None
        self.evaluate = evaluate
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self.worker_state = worker_state
        self._keeper = StateKeeper(self, self.method, worker_state, self._timeout)
        # From setup to teardown:
        self._ranks: FreeRanks | None = None
        self._session: CenterSession | None = None
        self._meetings: Meetings | None = None  # from the start of training
        self._steps: Steps | None = None  # from the start of training
        self._own_callbacks: list[Any] = []
        self._training = False  # while exchanges may happen
        self._validating = False
        self._replaced = False  # whether a callback has put other weights in place of the worker's, for good
        self._checkpoints: TrainerCheckpoints | None = None  # of the latest fit
        self._calibrate: Callable[[], None] | None = None
        self._final_center: dict[str, Tensor] | None = None  # a view of it could not be pickled
        self._statistics = Statistics()

    # What users read

    @property
    def known_center(self) -> Mapping[str, Tensor]:
        """The center as far as this rank knows it without waiting for another, by parameter name; read-only.

        In synchronous mode that is :attr:`center` with the exchange under way or without it, as far as the others are;
        a served center is read where it is. The next exchange may change the tensors.

        Raises:
            RuntimeError: If there is no training under way in this process.
        """
        self._check_center("known_center")
        if self._session is None or not self._session.is_started:
            raise RuntimeError(f"{type(self).__name__}.known_center: it is there while training is; use center.")
        return MappingProxyType(self._session.named_center())

    @contextlib.contextmanager
    def center_weights(self) -> Iterator[None]:
        """Context in which the module holds the center; afterwards each worker's own values, bit for bit.

        During training all ranks enter it at the same point of their work.

        Raises:
            RuntimeError: If the workers have no center.
        """
        self._check_center("center_weights()")
        with self._at_center(Meeting.CENTER_WEIGHTS):
            yield

    @contextlib.contextmanager
    def worker_weights(self) -> Iterator[None]:
        """Context in which the module holds this worker's own values, where it holds the center otherwise.

        That is in validation and, until the strategy is torn down, at the end of training.
        """
        with contextlib.nullcontext() if self._session is None else self._session.worker():
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

    # Setup

    def _make_launcher(self) -> Any:
        if self.is_served and self._layer_sync is not None:
            raise ValueError(
                f"{type(self).__name__} with Trainer(sync_batchnorm=True): SyncBatchNorm communicates in every forward"
                " pass and asynchronous workers do not run in step; leave it out, the center's statistics are the"
                " workers' mean."
            )
        return None if self._start_method == "popen" else self.tree.launcher(self, start_method=self._start_method)

    def setup_optimizers(self, trainer: Any) -> None:
        """Create the optimizers."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self.prepare_optimizer(optimizer)

    def configure_ddp(self) -> None:
        """Give all ranks rank 0's weights, as DDP's constructor does; wrap the module where workers have several ranks.

        With one rank there are no gradients to reduce. It comes before the optimizers, which may copy the parameters.
        """
        module = self.lightning_module
        assert module is not None
        self._share_start(module)
        if self.layout.per_worker > 1:
            self._wrap()

    def _wrap(self) -> None:
        """Let DDP reduce the gradients of what is not frozen now; the ranks of a worker do it at the same point."""
        if isinstance(self.model, DistributedDataParallel):
            assert self._inside is not None
            self.model = self.model.module
            self._inside.unwrap()
            forget_buckets(self._ddp_comm_state)
        assert self.lightning_module is not None
        with self._wrapping(self.lightning_module):
            super().configure_ddp()

    def _register_ddp_hooks(self) -> None:
        """Register a communication hook, on a CPU too; it reduces inside of the worker."""
        if self._ddp_comm_hook is None:
            return
        assert self._inside is not None
        assert isinstance(self.model, DistributedDataParallel)
        self._inside.register_hook(self.model, self._ddp_comm_hook, self._ddp_comm_state, self._ddp_comm_wrapper)

    def setup(self, trainer: Any) -> None:
        """Set up as DDPStrategy does; for a fit, let the ranks run freely, and make what averages them.

        Raises:
            ValueError: If a callback such as ``BackboneFinetuning`` adds parameters to a served center, or
                ``StochasticWeightAveraging`` would average shards.
        """
        fits = trainer.state.fn == "fit"
        if fits and self.is_served:
            check_callbacks(type(self).__name__, trainer, self.synchronous)
        if fits and self.is_sharded:
            check_sharded_callbacks(type(self).__name__, trainer)
        super().setup(trainer)
        self._had_sigterm = False
        self._ranks = FreeRanks(trainer, self.root_device, self._on_sigterm)
        if not fits:
            return
        self._assemble()
        averaging = self.make_averaging(self.optimizers)
        if averaging is None:
            return
        assert self.lightning_module is not None
        if self._layer_sync is not None:
            warn_of_layer_sync(type(self).__name__, per_worker=self.layout.per_worker, is_sharded=self.is_sharded)
        warn_of_callbacks(type(self).__name__, trainer, self.is_served)
        module = self.lightning_module
        self._session = CenterSession(
            self, averaging, lambda: module, self._trained_optimizers, lambda: ignored_names(module)
        )
        self._statistics = averaging.statistics
        self._checkpoints = TrainerCheckpoints(self, self._keeper, self._session, self._ranks)
        if self.elastic is not None:
            self._end_linking = linking_what_is_saved(trainer, lambda: self._is_saver)
        self._own_callbacks = [self.tree.callback(self), *self._recalibration(trainer)]
        trainer.callbacks[:0] = self._own_callbacks  # before all others

    def _recalibration(self, trainer: Any) -> list[Any]:
        if not self.recalibrate_batchnorm:
            return []
        # It imports lightning.pytorch, whatever the tree of this class is.
        from lightning_easgd.strategies.batchnorm import RecalibrateBatchNorm  # noqa: PLC0415

        callback = RecalibrateBatchNorm(self.recalibrate_batchnorm)
        assert self.lightning_module is not None
        callback.setup(trainer, self.lightning_module, "fit")  # the others' has been called
        return [callback]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How data are shared out: over the ranks, or over the workers that come and go."""
        inside = self._ranks_shares
        if self.elastic is None or self.lightning_module is None:
            return inside
        return self.elastic.sampler_arguments(inside, training=self.lightning_module.trainer.training)

    # Training

    def on_train_start(self) -> None:
        """Let the center begin where the workers are, and the clocks at 0; or all where a checkpoint was saved."""
        super().on_train_start()
        if self._session is None or (self.elastic is not None and is_search(self._trainer)):
            return  # a sweep through learning rates is no part of what the workers do together
        assert self._checkpoints is not None
        if self._steps is not None:  # of the learning rate finder's fit inside this one
            self._steps.close()
        self._steps = Steps(self.before_step, self.after_step)
        self._session.start(self._steps, trained=self._checkpoints.trained)
        self._training = True
        self._validating = self._replaced = False
        assert self._ranks is not None
        self._meetings = Meetings(self._ranks.trainer, self)
        self._checkpoints.resume()
        if self.elastic is not None:
            with self._ending_at_sigterm():
                self.elastic.enter(self._session, self._trainer)

    def on_train_epoch_start(self) -> None:
        """Look again where ranks must meet, where their data is new."""
        if self._training and self._meetings is not None:
            self._meetings.begin_epoch()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Have DDP reduce the gradients of all parameters, also where some were frozen or not there when it wrapped."""
        super().on_train_batch_start(batch, batch_idx)
        if self._inside is not None and self._inside.lacks(self.optimizers):
            self._wrap()

    def on_batch_fetched(self) -> None:
        """Take notice before a batch is trained on, which all ranks of the worker must have."""
        if self._training and self._meetings is not None:
            self._meetings.before_batch()
        if self._checkpoints is not None:
            self._checkpoints.batch_fetched()

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
        assert self._session is not None
        if self._session.averager_of(optimizer) is None:
            raise RuntimeError(
                f"{type(self).__name__}: this {type(optimizer).__name__} was not there when training started, so that"
                " it has no center; set up all optimizers in configure_optimizers."
            )
        return self._steps.make(optimizer, make)

    def before_step(self, optimizer: Optimizer) -> None:
        """Begin an exchange if this optimizer's clock says so; called before every step, however it is made."""
        if self._is_averaging and self._session is not None:
            if self.elastic is not None:
                self.elastic.note_clocks()
            self._session.before_step(optimizer, remedy="make it in training, or use evaluate='worker'")

    def after_step(self, optimizer: Optimizer, had_closure: bool) -> None:
        """Finish what the worker needs of the exchange; called after every step, however it was made."""
        if not self._is_averaging or self._session is None:
            return
        if self._inside is not None:
            remedy = "have the module hold them, and unfreeze them, between two steps, such as in on_train_batch_start"
            self._inside.check_reduced(self.optimizers, remedy)
        automatic = self.lightning_module is not None and self.lightning_module.automatic_optimization
        if self._session.after_step(optimizer, gradient_comes_after=had_closure and automatic):
            self._stop_if_agreed()

    def on_train_batch_end(self) -> None:
        """Let ranks meet before a callback communicates inside the epoch."""
        self.note_progress()
        if self._training and self._meetings is not None and self._meetings.after_batch():
            self._wait_for_all(Meeting.BATCH_END)

    def on_train_epoch_end(self) -> None:
        """See whether the next epoch trains the worker; let ranks that end an epoch at different times meet."""
        self._replaced = is_without_steps(self._trainer)
        if self._training and self._session is not None and self._meetings is not None:
            self._meetings.after_batches()
            self._session.check_outside()
            if self._meetings.at_epoch_end(self._session.averaging):
                self._wait_for_all(Meeting.EPOCH_END)

    def on_train_end(self) -> None:
        """Let all ranks finish, and leave the center in the module, or what callbacks want there, the same on all."""
        super().on_train_end()
        if self._session is None or not self._session.is_started:
            return
        if not self._training:
            self._session.share_what_is_shown()
            return
        self._meet(Meeting.TRAINING_END)
        if not self._trainer.fast_dev_run:
            warn_without_exchange(type(self).__name__, self.tau, self._session)
        if not self._replaced:
            self._show_center()
        self._training = False
        assert self._checkpoints is not None
        self._checkpoints.end_training()

    # Evaluation

    def on_validation_start(self) -> None:
        """Let all ranks meet, and show the center to a validation that is part of a fit."""
        super().on_validation_start()
        if not self._training or self._validating:
            return
        self._validating = True
        self._meet(Meeting.VALIDATION)
        if self.evaluate == "center":
            self._show_center(keeps_writes=True)

    def on_validation_end(self) -> None:
        """Go back to the worker's own weights."""
        super().on_validation_end()
        if self._validating and self._session is not None:
            self._session.show_worker()
        self._validating = False

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state at the center. During training all ranks ask for it at the same point of their work."""
        if self._session is None or not (self._training or self._session.shows_center):
            state = super().lightning_module_state_dict()
        elif self._training and self._is_alone:
            state = at_known_center(self._session.averagers, super().lightning_module_state_dict)
        else:
            with self._at_center(Meeting.CHECKPOINT):
                # A copy: the module goes back to the worker, and an asynchronous writer may still be reading.
                state = copy.deepcopy(super().lightning_module_state_dict())
        if self._checkpoints is not None:
            self._checkpoints.note_state(state if self._training and not self._is_alone else None)
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, with the workers' states unless it is for weights only or cannot wait for all."""
        self._is_saver = self.elastic is None or self.elastic.is_saver
        if not self._is_saver:
            return
        write = partial(self._write_checkpoint, checkpoint, filepath, storage_options)
        if self._checkpoints is None:
            write()
        else:
            self._checkpoints.save(checkpoint, str(filepath), write, training=self._training, alone=self._is_alone)

    def _write_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any) -> None:
        """Write what has been made ready, as Lightning does it."""
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def own_optimizer_states(self, checkpoint: Mapping[str, Any]) -> list[Any]:
        """This worker's own optimizer states, of a checkpoint that Lightning has made on this rank."""
        states: list[Any] = checkpoint["optimizer_states"]
        return states

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, and the files beside it."""
        if self.elastic is not None and not self.elastic.is_saver:
            return
        super().remove_checkpoint(filepath)
        if self.local_rank == 0:
            remove_sidecar(str(filepath))

    def load_checkpoint(self, checkpoint_path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Read a checkpoint: the one that rank 0 means, as its name may hold a step that differs between the ranks."""
        checkpoint_path = self.broadcast(checkpoint_path)
        with self._reading_checkpoint():
            checkpoint = super().load_checkpoint(checkpoint_path, *arguments, **keywords)
        self._read_from = str(checkpoint_path), keywords.get("weights_only")
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's state, in double precision where the Trainer has it so: Lightning converts afterwards."""
        if self.precision_plugin.precision == "64-true":
            assert self.lightning_module is not None
            self.precision_plugin.convert_module(self.lightning_module)
        super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what this worker had where the checkpoint was saved, else what worker 0 had."""
        if self._session is None or self._checkpoints is None:
            super().load_optimizer_state_dict(checkpoint)
            return
        super().load_optimizer_state_dict(self._checkpoints.find(checkpoint, *self._read_from))
        self._checkpoints.restore_loops()

    _read_from: tuple[str, bool | None] = ("", None)
    _is_saver = True  # whether it has written the last checkpoint
    _end_linking: Callable[[], None] | None = None
    _had_sigterm = _ends_at_sigterm = False

    # Errors, signals, and the end

    def on_exception(self, exception: BaseException) -> None:
        """Meet the others once more if all stop together, else tell them that this rank has failed, and why."""
        super().on_exception(exception)
        if self._ranks is not None:
            self._ranks.has_failed = True
        self._groups.fail(exception)
        if self._session is None:
            return
        averaging = self._session.averaging
        if self._training and averaging.stop_agreed:
            with contextlib.suppress(ExchangeError, CenterError, WorkersStoppedError):  # the first error counts
                averaging.meet(Meeting.TRAINING_END)
        elif not isinstance(exception, WorkerLostError):  # the first to fail is the one to be named
            averaging.fail(first_line(exception))

    def end_rank(self, error: BaseException) -> None:
        """Do what Lightning leaves out when an error ends a spawned or forked rank: tell the others, and tear down."""
        if self._ranks is not None:
            self._ranks.trainer.state.status = "interrupted"
            self.on_exception(error)
            self.teardown()

    def teardown(self) -> None:
        """Leave the center in the module, also when an error ended the run, and let go of the averaging.

        After an error the others read why, before the store goes with this process.
        """
        ranks, session = self._ranks, self._session
        try:
            if self._checkpoints is not None:
                self._checkpoints.close()
            self._leave_center()
        finally:
            callbacks, self._own_callbacks = self._own_callbacks, []
            for callback in callbacks:
                with contextlib.suppress(ValueError):
                    self._trainer.callbacks.remove(callback)
            for callback in callbacks[1:]:
                callback.teardown(self._trainer, self.lightning_module, "fit")
            if self._end_linking is not None:
                self._end_linking()
                self._end_linking = None
            self._session = None
            if session is not None:
                session.close()
            if self._steps is not None:
                self._steps.close()
            self._steps = self._meetings = None
            if ranks is not None:
                if ranks.has_failed and dist.is_initialized() and self.world_size > 1:
                    time.sleep(_LAST_WORDS if self.global_rank == store_server() else 0.0)
                ranks.end()
            self._ranks = None
            self._groups.leave()
            super().teardown()
            self._leave_inside()

    def _leave_center(self) -> None:
        session = self._session
        if session is None or not session.is_started:
            return
        # After an error the other ranks may be anywhere, and a served center out of reach.
        with contextlib.suppress(CenterError):
            if not (session.shows_center or self._replaced):
                session.common = CommonValues()  # there can be no meeting: what no averager holds is this rank's
                session.show_center()
            self._final_center = session.final_center()
        ended_well = not self._training and not self._is_interrupted
        session.end()
        self._training = self._validating = False
        if ended_well:  # a rank that failed in the last hooks is noticed here
            self._wait_for_all(Meeting.TEARDOWN)

    @contextlib.contextmanager
    def _ending_at_sigterm(self) -> Iterator[None]:
        """Context in which SIGTERM, then or before, ends this rank at once: it waits for others that may never come."""
        self._ends_at_sigterm = True
        try:
            if self._had_sigterm:
                raise self.tree.stop
            yield
        finally:
            self._ends_at_sigterm = False

    def _on_sigterm(self) -> None:
        self._had_sigterm = True
        if self._ends_at_sigterm:
            raise self.tree.stop
        if self._session is not None and (self.elastic is None or self.world_size > 1):
            self._session.averaging.request_stop()
        else:
            request_stop(self._trainer)

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; not while an error ends the run.

        Where they make their data loaders anew they meet before: others may still be in their epoch.
        """
        if self._is_alone:
            return
        meeting = Meetings.at_barrier(name) if self._training else None
        if meeting is not None:
            self._wait_for_all(meeting)
        with self._groups.naming_the_missing("barrier"):
            super().barrier(name, *args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object; while an error ends the run every rank keeps its own."""
        if self._is_alone:
            return obj
        with self._groups.naming_the_missing("broadcast"):
            return super().broadcast(obj, src)

    def gather(self, obj: Any) -> list[Any]:
        """What each rank gives, in the order of the ranks; while an error ends the run what this one gives."""
        if self._is_alone or not dist.is_initialized():
            return [obj]
        return self._groups.gather(obj)

    def gather_inside(self, obj: Any) -> list[Any]:
        """What each rank of this worker, which has several, gives, in their order."""
        return self._groups.gather_inside(obj)

    @property
    def ranks_inside(self) -> list[int]:
        """The ranks of this worker."""
        return self.layout.inside[self.layout.worker_of(self.global_rank)]

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor; while an error ends the run every rank keeps its own."""
        if self._is_alone:
            return tensor
        with self._groups.naming_the_missing("reduction"):
            return super().reduce(tensor, *args, **kwargs)

    def note_progress(self) -> None:
        """Show the other ranks that this one gets on."""
        if self._session is not None:
            self._session.averaging.note_progress()

    # The parts of the above

    @property
    def _trainer(self) -> Any:
        return None if self._ranks is None else self._ranks.trainer

    @property
    def _is_interrupted(self) -> bool:
        return self._ranks is not None and self._ranks.are_interrupted

    @property
    def _is_alone(self) -> bool:
        return self._ranks is not None and self._ranks.is_alone

    @property
    def _is_averaging(self) -> bool:
        """Whether a step is one of a worker's, which counts."""
        return self._training and not self._is_saving and not is_without_steps(self._trainer)

    def _trained_optimizers(self) -> list[Optimizer]:
        """The optimizers, without Lightning's stand-in where configure_optimizers returns None."""
        return [optimizer for optimizer in self.optimizers if optimizer.param_groups]

    def _stop_if_agreed(self) -> None:
        assert self._session is not None
        if self._session.averaging.stop_agreed:
            request_stop(self._trainer)

    def _wait_for_all(self, meeting: Meeting) -> None:
        """Wait for all ranks, and apply every exchange."""
        assert self._session is not None
        with self._stopping():
            self._session.averaging.meet(meeting)

    def _meet(self, meeting: Meeting) -> None:
        """The same, and find what belongs to the center beside what the averagers hold of it."""
        assert self._session is not None
        with self._stopping():
            self._session.meet(meeting)

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """Context of a meeting at which all ranks may stop."""
        try:
            yield
        except WorkersStoppedError:
            raise self.tree.stop from None
        self._stop_if_agreed()

    @contextlib.contextmanager
    def _at_center(self, meeting: Meeting) -> Iterator[None]:
        session = self._session
        if session is None or not session.is_started:
            yield
            return
        if session.shows_center:
            with session.shown():  # also inside of worker_weights()
                yield
            return
        if self._is_interrupted:
            session.common = CommonValues()
            session.show_center()
        else:
            self._meet(meeting)
            self._show_center()
        try:
            yield
        finally:
            session.show_worker()

    def _show_center(self, *, keeps_writes: bool = False) -> None:
        """Show the center after a meeting: here all ranks may communicate."""
        assert self._session is not None
        self._session.show_center(keeps_writes=keeps_writes)
        if self._calibrate is not None:
            self._session.calibrate(self._calibrate)


def _check_batches(strategy: str, batches: object) -> None:
    if not isinstance(batches, int) or isinstance(batches, bool):
        raise TypeError(
            f"{strategy}(recalibrate_batchnorm={batches!r}): give the number of mini-batches of each worker, an int."
        )
    if batches < 0:
        raise ValueError(
            f"{strategy}(recalibrate_batchnorm={batches}): give the number of mini-batches of each worker, or 0 to keep"
            " the mean of the workers' statistics."
        )
