"""Workers under Fabric, whose training loop is the user's own; free of a class tree."""

import contextlib
import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.averagers import Averager, Averaging, Meeting, Statistics
from lightning_easgd.strategies.center_readings import CenterReadings, named_center
from lightning_easgd.strategies.kept_states import KEY, Kept, KeptStates, edited_tensors
from lightning_easgd.strategies.outside_values import OutsideValues, ignored_names
from lightning_easgd.strategies.processes import WorkerProcesses
from lightning_easgd.strategies.shown_weights import ShownWeights
from lightning_easgd.strategies.steps import Steps, averagers_of
from lightning_easgd.strategies.worker_state import EditedState, StateSums, fingerprints, random_state, set_random_state
from lightning_easgd.tensors.buffers import FiniteValues

if TYPE_CHECKING:
    from lightning.fabric.strategies.ddp import DDPStrategy as _Base
else:
    _Base = object

__all__ = ["FabricCenterWorkers", "FabricWorkers"]


class FabricWorkers(WorkerProcesses, _Base):
    """p workers that train without any communication; mixed into the ``DDPStrategy`` of one of Fabric's class trees."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._backward_sync_control: Any = _NoBackwardSync()

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]  # DDPStrategy's is wrapped
        """Leave the module as it is, but give all ranks rank 0's weights."""
        self._share_start(module)
        return module


class FabricCenterWorkers(CenterReadings, KeptStates, FabricWorkers):
    """Workers that are averaged with a center now and then; a subclass says how.

    The center begins where rank 0 is, at the first optimizer step. Checkpoints hold the center, and so does the module
    in :meth:`center_weights` and after :meth:`finalize`, with which every training ends. A checkpoint that has an
    optimizer in it also holds each worker's own state: parameters, buffers, optimizer states, clocks, and the states of
    the random number generators.
    """

    on_nonfinite: str
    _finite_values: FiniteValues | None

    def __init__(
        self, *arguments: Any, evaluate: str = "center", recalibrate_batchnorm: int = 0, **keywords: Any
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
        self._modules: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._averaging: Averaging | None = None  # from the first step to finalize
        self._shown: ShownWeights | None = None  # while the modules show the center
        self._outside: OutsideValues | None = None  # as long as the averaging
        self._steps: Steps | None = None  # from the first optimizer's setup to finalize
        self._final_center: dict[str, Tensor] | None = None  # a view of it could not be pickled
        self._resumed = Kept()  # what to go on from at the next step
        self._statistics = Statistics()

    @abstractmethod
    def _make_averaging(self, optimizers: Sequence[Optimizer]) -> Averaging:
        """Make the averaging; all ranks do it at the same point."""

    @abstractmethod
    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Check an optimizer, and make it what a worker trains with, in place."""

    @abstractmethod
    def is_prepared(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer still is what :meth:`prepare_optimizer` has made it; asked before every step."""

    @property
    def center(self) -> Mapping[str, Tensor]:
        """The center as it is now: read-only, parameter name → tensor of the parameter's shape.

        The tensors are float32 (float64 for double parameters). Reading waits for the exchange under way; the next
        one may change the tensors. With several modules the names begin with a module's place in the order of their
        setup, as in ``"0.weight"``. After :meth:`finalize` it is the final center.

        Raises:
            RuntimeError: If training has not started in this process.
        """
        if self._averaging is not None:
            for averager in self._averagers:
                averager.settle()
            return MappingProxyType(self._named_center())
        if self._final_center is None:
            raise RuntimeError(f"{type(self).__name__}.center: there is no center before the first optimizer step.")
        return MappingProxyType(self._final_center)

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
        if self._optimizers and module is not None and not self._has(module):
            raise ValueError(
                f"{type(self).__name__}.center_weights({type(module).__name__}): this module has no center; give the"
                " one that fabric.setup took or returned."
            )
        with self._at_center(Meeting.CENTER_WEIGHTS):
            yield

    def finalize(self) -> None:
        """End the training: wait for all ranks, and leave the center in the modules.

        All ranks call it, after any number of steps each. To train on, set up modules and optimizers anew.

        Raises:
            ExchangeError: If another rank failed.
        """
        if not self._optimizers:
            return
        averaging = self._started()
        self._meet(averaging, Meeting.TRAINING_END)
        assert self._shown is not None
        named = self._named_center(self._shown.values())
        self._final_center = {name: tensor.cpu().clone() for name, tensor in named.items()}
        self._shown = None
        self._modules.clear()
        self._optimizers.clear()
        if self._steps is not None:
            self._steps.close()
            self._steps = None
        self._end()

    # Fabric's hooks

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Leave the module as it is, but give all ranks rank 0's weights."""
        self._modules.append(module)
        return super().setup_module(module)

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Check an optimizer, and make it what a worker trains with, in place.

        Raises:
            TypeError: If this strategy cannot work with it.
            RuntimeError: If training has begun without it.
        """
        if self._averaging is not None:
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
        if optimizer not in self._optimizers:
            raise RuntimeError(
                f"{type(self).__name__}: a step of a {type(optimizer).__name__} that is not being trained with; set it"
                " up with fabric.setup, after strategy.finalize() anew."
            )
        assert self._steps is not None
        # Until a step without a closure the worker is where its gradient was taken.
        step = partial(super().optimizer_step, optimizer, **kwargs)
        return self._steps.make(optimizer, step, had_closure="closure" in kwargs)

    def before_step(self, optimizer: Optimizer) -> None:
        """Begin an exchange if this optimizer's clock says so; called before every step, however it is made."""
        averagers = self._averagers_of_step(optimizer)
        if averagers and self._shown is not None:
            raise RuntimeError(
                f"{type(self).__name__}: an optimizer step inside center_weights() would be taken at the center, not at"
                " the worker; leave the context first."
            )
        if averagers and not self.is_prepared(optimizer):  # its settings have been loaded or changed
            self.prepare_optimizer(optimizer)
        for averager in averagers:
            averager.begin()

    def after_step(self, optimizer: Optimizer, had_closure: bool) -> None:
        """Finish what the worker needs of the exchange; called after every step, however it was made."""
        averagers = self._averagers_of_step(optimizer)
        if not averagers and self._outside is not None:
            self._outside.note_step(optimizer)
        for averager in averagers:
            averager.finish()
            if not had_closure:
                averager.look_ahead()

    def _averagers_of_step(self, optimizer: Optimizer) -> list[Averager]:
        if self._steps is None or not self._optimizers:
            return []
        if self._averaging is None and not _share_parameters(optimizer, self._optimizers):
            return []  # of something else, before training starts
        return averagers_of(optimizer, self._started().averagers, self._steps)

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """A module's state at the center. All ranks ask for it at the same point of their work."""
        if module not in self._modules:
            return super().get_module_state_dict(module)
        with self._at_center(Meeting.CHECKPOINT):
            # A copy: the module goes back to the worker, and an asynchronous writer may still be reading.
            return copy.deepcopy(super().get_module_state_dict(module))

    def save_checkpoint(self, path: Any, state: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
        """Save a state whose modules are at the center. All ranks call it at the same point of their work."""
        with self._at_center(Meeting.CHECKPOINT):
            if self._shown is None or not any(isinstance(value, Optimizer) for value in state.values()):
                super().save_checkpoint(path, state, *arguments, **keywords)
                return
            states = self._states()
            kept = self._common_state() | states.save(self._own_state(), str(path))
            with self._written_or_discarded(states, str(path)):
                super().save_checkpoint(path, state | {KEY: kept}, *arguments, **keywords)

    def load_checkpoint(self, path: Any, state: Any = None, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Load a checkpoint on all ranks: each worker goes on where it was, if there are as many as before."""
        remainder = super().load_checkpoint(path, state, *arguments, **keywords)
        saved = remainder.pop(KEY, None)
        if isinstance(state, dict) and any(isinstance(value, Optimizer) for value in state.values()):
            self._resumed = self._find(saved, str(path), keywords.get("weights_only"))
            if self._optimizers:  # else it was loaded before it was set up
                self._started()
        return remainder

    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load a module's state on all ranks; the center begins anew there, and the clocks at 0."""
        if self._averaging is not None and module in self._modules:
            self._averaging.meet(Meeting.CHECKPOINT)
            self._end()
        super().load_module_state_dict(module, state_dict, strict)

    # The parts of the above

    def _started(self) -> Averaging:
        if self._averaging is None:
            averaging = self._make_averaging(self._optimizers)
            for optimizer in self._optimizers:  # once more: a loaded one has the settings of the run that saved it
                self.prepare_optimizer(optimizer)
            modules = self._all_modules
            parameters = dict(modules.named_parameters())
            kept, self._resumed = self._resumed, Kept()
            averaging.start(
                self._optimizers,
                ignored=[parameter for name, parameter in parameters.items() if name in self._ignored_names],
                trained=[parameter for name, parameter in parameters.items() if name in kept.trained],
                names=self._names,
            )
            self._statistics = averaging.statistics
            self._averaging = averaging
            self._outside = OutsideValues(
                modules,
                self._averagers,
                lambda: self._optimizers,
                ignored=self._ignored_names,
                with_buffers=self.has_common_buffers,
                strategy=type(self).__name__,
            )
            self._finite_values = FiniteValues(self._outside.tensors) if self.on_nonfinite == "reset" else None
            self._resume(averaging, kept)
        return self._averaging

    def _common_state(self) -> dict[str, Any]:
        assert self._averaging is not None
        modules = self._all_modules
        in_module = self._center_has_moved and self._averaging.is_in_parameters
        center = {} if in_module else self._averaging.center_state_dict()
        common = self._common_part(modules, self._averagers, center)
        if self.is_global_zero:
            state = modules.state_dict()
            common["sums"] = StateSums(state).saved(state)
            common["fingerprints"] = fingerprints(self._optimizer_states())
        return common

    def _own_state(self) -> dict[str, Any]:
        assert self._shown is not None
        with self._shown.worker():
            tensors = {name: tensor.clone() for name, tensor in self._own_tensors(self._all_modules).items()}
        return {
            "tensors": tensors,
            "averagers": [averager.state_dict() for averager in self._averagers],
            **self._optimizer_states(),
            "random": random_state(self.root_device),
        }

    def _optimizer_states(self) -> dict[str, Any]:
        return {"optimizer_states": [optimizer.state_dict() for optimizer in self._optimizers]}

    def _resume(self, averaging: Averaging, kept: Kept) -> None:
        modules = self._all_modules
        edited: set[str] = set()
        if kept.sums is not None:
            state = modules.state_dict()
            edited = edited_tensors(modules, EditedState(kept.sums, {}, state).names(state))
            edited = set(self.broadcast(edited))
        self._start_center(kept, modules, averaging, edited)
        kept = self._with_edits(kept, self._optimizer_states())
        if kept.own is not None:
            for optimizer, own in zip(self._optimizers, kept.own["optimizer_states"], strict=False):
                optimizer.load_state_dict(own)
        self._restore(kept, modules, averaging, edited)
        if kept.own is not None:
            set_random_state(kept.own["random"], self.root_device)

    def _end(self) -> None:
        averaging, self._averaging = self._averaging, None
        self._outside = self._finite_values = None
        if averaging is not None:
            averaging.close()

    def _names(self) -> dict[Tensor, str]:
        """The modules' parameters, in their order, with their names."""
        return {parameter: name for name, parameter in self._all_modules.named_parameters()}

    @property
    def _ignored_names(self) -> frozenset[str]:
        if len(self._modules) == 1:
            return ignored_names(self._modules[0])
        return frozenset(
            f"{number}.{name}" for number, each in enumerate(self._modules) for name in ignored_names(each)
        )

    def _has(self, module: nn.Module) -> bool:
        return module in self._modules or getattr(module, "module", None) in self._modules

    @property
    def _all_modules(self) -> nn.Module:
        return self._modules[0] if len(self._modules) == 1 else nn.ModuleList(self._modules)

    def _named_center(self, replaced: Mapping[Tensor, Tensor] = MappingProxyType({})) -> dict[str, Tensor]:
        return named_center(self._all_modules.named_parameters(), self._averagers, replaced)

    @property
    def _center_has_moved(self) -> bool:
        """Whether the center holds something of what the workers have learnt; asked after all have met."""
        return self._averaging is not None and self._averaging.has_exchanged

    def _meet(self, averaging: Averaging, meeting: Meeting) -> None:
        """Wait for all ranks, and show the center."""
        assert self._outside is not None
        self._outside.check()
        averaging.meet(meeting)
        common = self._outside.in_common(averaging, self._finite_values)
        self._same_everywhere = common.same & self._outside.tensors().keys()
        self._shown = ShownWeights(self._all_modules, self._averagers)
        self._shown.show_center(common.values)

    @contextlib.contextmanager
    def _at_center(self, meeting: Meeting) -> Iterator[None]:
        if not self._optimizers or self._shown is not None:  # nothing is averaged, or the center is there already
            yield
            return
        averaging = self._started()
        self._meet(averaging, meeting)
        try:
            yield
        finally:
            shown, self._shown = self._shown, None
            if shown is not None:
                shown.show_worker()


class _NoBackwardSync:
    """There are no gradients to reduce, so that nothing must be held back while they accumulate."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        return contextlib.nullcontext()


def _share_parameters(optimizer: Optimizer, others: Sequence[Optimizer]) -> bool:
    own, *theirs = (
        {id(parameter) for group in each.param_groups for parameter in group["params"]} for each in (optimizer, *others)
    )
    return any(not own.isdisjoint(each) for each in theirs)
