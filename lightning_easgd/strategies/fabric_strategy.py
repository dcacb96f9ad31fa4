"""The body of the strategies for Fabric, whose training loop is the user's own; free of a class tree."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_easgd.averagers import Meeting, Statistics
from lightning_easgd.strategies.fabric_modules import FabricModules
from lightning_easgd.strategies.failures import first_line
from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.sharded_workers import load_parts, parts_of
from lightning_easgd.strategies.steps import Steps
from lightning_easgd.strategies.worker_process import WorkerProcess
from lightning_easgd.strategies.worker_state import EditedState, StateSums, fingerprints, random_state, set_random_state
from lightning_easgd.strategies.worker_state.keeper import KEY, Kept, StateKeeper, edited_tensors
from lightning_easgd.transport.errors import WorkerLostError

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp import DDPStrategy as _Base
else:
    _Base = object

__all__ = ["FabricStrategy"]

_OF_HOOK = ("hook", "state", "wrapper")


class FabricStrategy(WorkerProcess, _Base):
    """Workers in a loop of the user's own, of which a method says how they are averaged.

    The center begins where rank 0 is, at the first optimizer step. Checkpoints hold the center, and so does the module
    in :meth:`center_weights` and after :meth:`finalize`, with which every training ends. A checkpoint that has an
    optimizer in it also holds each worker's own state: parameters, buffers, optimizer states, clocks, and the states of
    the random number generators. A method without a center leaves the workers alone.
    """

    def __init__(
        self,
        *arguments: Any,
        evaluate: str = "center",
        recalibrate_batchnorm: int = 0,
        worker_state: str = "none",
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        if evaluate != "center":
            raise ValueError(
                f"{type(self).__name__}(evaluate={evaluate!r}): Fabric has no validation; outside of"
                " strategy.center_weights(module) the module holds the worker's own weights."
            )
        if recalibrate_batchnorm != 0:
            raise ValueError(
                f"{type(self).__name__}(recalibrate_batchnorm={recalibrate_batchnorm!r}): Fabric does not know the"
                " forward pass of a training step; call torch.optim.swa_utils.update_bn inside of"
                " strategy.center_weights(module)."
            )
        assert self._timeout is not None
        # Fabric's strategy hands all that it is given to DDP's constructor.
        self._hook, *self._of_hook = (self._ddp_kwargs.pop(f"ddp_comm_{name}", None) for name in _OF_HOOK)
        self.worker_state = worker_state
        self._keeper = StateKeeper(self, self.method, worker_state, self._timeout)
        self._modules = FabricModules()
        self._come_at_center: list[nn.Module] = []  # set up while the modules show it
        self._optimizers: list[Optimizer] = []  # none where there is no center
        self._session: CenterSession | None = None  # from the first step to finalize
        self._steps: Steps | None = None  # from the first optimizer's setup to finalize
        self._final_center: dict[str, Tensor] | None = None  # a view of it could not be pickled
        self._resumed = Kept()  # what to go on from at the next step
        self._statistics = Statistics()

    # What users call

    @contextlib.contextmanager
    def center_weights(self, module: nn.Module | None = None) -> Iterator[None]:
        """Context in which all modules hold the center; afterwards the worker's own values, bit for bit.

        All ranks enter it at the same point of their work. A rank that comes first takes part in the others'
        exchanges until they come.

        Args:
            module: The module to be evaluated, as ``fabric.setup`` took or returned it.

        Raises:
            ValueError: If this module has not been set up.
        """
        self._check_center("center_weights()")
        if self._optimizers and module is not None and not self._has(module):
            raise ValueError(
                f"{type(self).__name__}.center_weights({type(module).__name__}): this module has no center; give the"
                " one that fabric.setup took or returned."
            )
        with self._at_center(Meeting.CENTER_WEIGHTS):
            yield

    def finalize(self) -> None:
        """End the training: wait for all ranks, and leave the center in the modules.

        All ranks call it, after any number of steps each. To train on, set up optimizers anew, and modules where they
        are others.

        Raises:
            ExchangeError: If another rank failed.
        """
        if not self._optimizers:
            return
        session = self._started()
        session.meet(Meeting.TRAINING_END)
        session.show_center()
        self._final_center = session.final_center()
        self._modules.end()
        self._optimizers.clear()
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        self._end()

    # Ranks and their errors

    rank_launcher: ClassVar[Callable[..., Any] | None] = None  # of spawned and forked ranks; None where there are none

    def _make_launcher(self) -> Any:
        if self.rank_launcher is None or self._start_method == "popen":
            return None
        return self.rank_launcher(self, start_method=self._start_method)

    def tell_failure(self, error: BaseException) -> None:
        """Tell the other ranks that this one has failed, and why; it takes part in nothing any more."""
        self._groups.fail(error)
        if self._session is not None and not isinstance(error, WorkerLostError):  # the first to fail is to be named
            self._session.averaging.fail(first_line(error))
        self._end()

    # Fabric's hooks

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]  # DDPStrategy's is wrapped
        """Give all ranks rank 0's weights; wrap the module where workers have several ranks.

        What a training that is under way has of it stays each worker's own.
        """
        self._share_start(module, self._trained_tensors)
        if self.has_center:
            self._take_in(module)
        if self.layout.per_worker == 1:
            self._backward_sync_control: Any = _NoBackwardSync()
            return module
        with self._wrapping(module):
            wrapped = super().setup_module(module)
        if self._hook is not None:
            assert self._inside is not None
            assert isinstance(wrapped, DistributedDataParallel)
            self._inside.register_hook(wrapped, self._hook, *self._of_hook)
        return wrapped

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Check an optimizer, and make it what a worker trains with, in place.

        Raises:
            TypeError: If this strategy cannot work with it.
            RuntimeError: If training has begun without it.
        """
        if not self.has_center:
            return super().setup_optimizer(optimizer)
        if self._session is not None:
            raise RuntimeError(
                f"{type(self).__name__}: this {type(optimizer).__name__} was not there when training started, so that"
                " it has no center; set up all optimizers before the first step, or call strategy.finalize() before."
            )
        self.prepare_optimizer(optimizer)
        self._optimizers.append(optimizer)
        self._steps = self._steps or Steps(self.before_step, self.after_step)
        optimizer = super().setup_optimizer(optimizer)
        own = self._resumed.own
        if own is not None and len(self._optimizers) == len(own["optimizer_states"]):
            # All have been loaded before they were set up; the first gradient is to be taken at the worker.
            self._started()
        return optimizer

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Make one step of the worker, with an exchange around it if this optimizer's clock says so.

        With or without a closure: until the step the worker is where its gradient was taken.
        """
        step = partial(super().optimizer_step, optimizer, **kwargs)
        if not self.has_center:
            return step()
        if optimizer not in self._optimizers:
            raise RuntimeError(
                f"{type(self).__name__}: a step of a {type(optimizer).__name__} that is not being trained with; set it"
                " up with fabric.setup, after strategy.finalize() anew."
            )
        assert self._steps is not None
        return self._steps.make(optimizer, step, had_closure="closure" in kwargs)

    def before_step(self, optimizer: Optimizer) -> None:
        """Begin an exchange if this optimizer's clock says so; called before every step, however it is made."""
        session = self._session_of_step(optimizer)
        if session is not None:
            session.before_step(optimizer, remedy="leave the context first")

    def after_step(self, optimizer: Optimizer, had_closure: bool) -> None:
        """Finish what the worker needs of the exchange; called after every step, however it was made."""
        session = self._session_of_step(optimizer)
        if session is not None:
            if self._inside is not None:
                remedy = (
                    "give fabric.setup a module that has them, and freeze them after fabric.setup, with"
                    " find_unused_parameters=True, and not before"
                )
                self._inside.check_reduced(self._optimizers, remedy)
            session.after_step(optimizer, gradient_comes_after=had_closure)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """A module's state at the center. All ranks ask for it at the same point of their work."""
        if not self._has(module):
            return super().get_module_state_dict(module)
        with self._at_center(Meeting.CHECKPOINT):
            # A copy: the module goes back to the worker, and an asynchronous writer may still be reading.
            return copy.deepcopy(super().get_module_state_dict(module))

    def save_checkpoint(self, path: Any, state: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        """Save a state whose modules are at the center. All ranks call it at the same point of their work."""
        with self._at_center(Meeting.CHECKPOINT):
            session = self._session
            has_optimizer = any(isinstance(value, Optimizer) for value in state.values())
            if session is None or not session.shows_center or not has_optimizer:
                self._write_checkpoint(path, state, *arguments, **keywords)
                return
            states = self._keeper.states()
            kept = self._common_state(session) | states.save(self._own_state(session), str(path))
            with self._keeper.written_or_discarded(states, str(path)):
                self._write_checkpoint(path, state | {KEY: kept}, *arguments, **keywords)

    def _write_checkpoint(self, path: Any, state: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        """Write what has been made ready, as Fabric does it."""
        super().save_checkpoint(path, state, *arguments, **keywords)

    def load_checkpoint(self, path: Any, state: Any = None, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Load a checkpoint on all ranks: each worker goes on where it was, if there are as many as before."""
        loaded = state.values() if isinstance(state, dict) else (state,)
        if any(isinstance(each, nn.Module) and self._has(each) for each in loaded):
            self._end_for_other_weights()
        with self._without_steps(), self._reading_checkpoint():
            remainder = super().load_checkpoint(path, state, *arguments, **keywords)
        saved = remainder.pop(KEY, None) if self.has_center else None
        has_optimizer = isinstance(state, dict) and any(isinstance(value, Optimizer) for value in state.values())
        if self.has_center and has_optimizer:
            self._resumed = self._keeper.find(saved, str(path), keywords.get("weights_only"))
            if self._optimizers:  # else it was loaded before it was set up
                self._started()
        return remainder

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load a module's state on all ranks; the center begins anew there, and the clocks at 0."""
        if self._has(module):
            self._end_for_other_weights()
        super().load_module_state_dict(module, state_dict, strict)

    # The parts of the above

    @property
    def _trained_tensors(self) -> tuple[Tensor, ...]:
        """Parameters and buffers of a training that is under way."""
        if self._session is None:
            return ()
        return (*self._session.module.parameters(), *self._session.module.buffers())

    def _take_in(self, *modules: nn.Module) -> None:
        if self._session is not None and self._session.shows_center:
            self._come_at_center += modules  # what is shown goes back to the tensors of before
            return
        if self._modules.add(modules) and self._session is not None:
            self._session.take_in()

    def _end_for_other_weights(self) -> None:
        """End the averaging, as modules are about to be loaded; those that are not are left at their center."""
        if self._session is not None:
            self._session.meet(Meeting.CHECKPOINT)
            self._session.show_center()
            self._end()

    def _session_of_step(self, optimizer: Optimizer) -> CenterSession | None:
        """The session, which the first step of something that is trained starts."""
        if self._steps is None or not self._optimizers or self._is_saving:
            return None
        if self._session is None and not _share_parameters(optimizer, self._optimizers):
            return None  # of something else, before training starts
        return self._started()

    def _started(self) -> CenterSession:
        if self._session is None:
            self._modules.take_up(self._optimizers)
            if self._inside is not None:
                self._inside.leave_out(self._modules.ended)
            self._assemble()
            averaging = self.make_averaging(self._optimizers)
            assert averaging is not None
            assert self._steps is not None
            kept, self._resumed = self._resumed, Kept()
            session = CenterSession(
                self, averaging, self._modules.whole, lambda: self._optimizers, lambda: self._modules.ignored_names
            )
            session.start(self._steps, trained=kept.trained)
            self._statistics = averaging.statistics
            self._session = session
            self._resume(session, kept)
        return self._session

    def _common_state(self, session: CenterSession) -> dict[str, Any]:
        if self.is_sharded:
            return self._keeper.common(session, {})
        common = self._keeper.common(session, self._center_beside(session))
        if self.is_global_zero:
            state = session.module.state_dict()
            common["sums"] = StateSums(state).saved(state)
            common["fingerprints"] = fingerprints(self._optimizer_states())
        return common

    def _center_beside(self, session: CenterSession) -> dict[str, Any]:
        """What the center is beyond the modules' state."""
        return {} if session.is_center_in_module else session.averaging.center_state_dict()

    def _own_state(self, session: CenterSession) -> dict[str, Any]:
        with session.worker():
            tensors = {name: tensor.clone() for name, tensor in self._keeper.own_tensors(session).items()}
        center, layouts = self._center_beside(session), self._keeper.layouts(session)
        return {
            **({"parts": {"center": center, "layouts": layouts}} if self.is_sharded else {}),
            "tensors": tensors,
            "averagers": [averager.state_dict() for averager in session.averagers],
            **self._optimizer_states(),
            "random": random_state(self.root_device),
        }

    def _optimizer_states(self) -> dict[str, Any]:
        return {"optimizer_states": [parts_of(optimizer.state_dict()) for optimizer in self._optimizers]}

    def _resume(self, session: CenterSession, kept: Kept) -> None:
        edited: set[str] = set()
        if kept.sums is not None:
            state = session.module.state_dict()
            edited = edited_tensors(session.module, EditedState(kept.sums, {}, state).names(state))
            edited = set(self.broadcast(edited))
        self._keeper.start_center(kept, session, edited)
        kept = self._keeper.with_edits(kept, self._optimizer_states())
        if kept.own is not None:
            for optimizer, own in zip(self._optimizers, kept.own["optimizer_states"], strict=False):
                load_parts(type(self).__name__, optimizer, own)
        self._keeper.restore(kept, session, edited)
        if kept.own is not None:
            set_random_state(kept.own["random"], self.root_device)

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _has(self, module: nn.Module) -> bool:
        return self._modules.has(module, self._optimizers if self._session is None else ())

    @contextlib.contextmanager
    def _at_center(self, meeting: Meeting) -> Iterator[None]:
        if not self._optimizers or (self._session is not None and self._session.shows_center):
            yield  # nothing is averaged, or the center is there already
            return
        session = self._started()
        session.meet(meeting)
        session.show_center()
        try:
            yield
        finally:
            session.show_worker()
            come, self._come_at_center = self._come_at_center, []
            self._take_in(*come)


class _NoBackwardSync:
    """There are no gradients to reduce, so that nothing must be held back while they accumulate."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        return contextlib.nullcontext()


def _share_parameters(optimizer: Optimizer, others: Sequence[Optimizer]) -> bool:
    own, *theirs = (
        {id(parameter) for group in each.param_groups for parameter in group["params"]} for each in (optimizer, *others)
    )
    return any(not own.isdisjoint(each) for each in theirs)
