"""Workers held together by elastic averaging: the body of the EASGD strategies, free of a class tree."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd._compat import request_stop
from lightning_easgd.averagers import (
    ExchangeLine,
    Meeting,
    ProcessGroupChannel,
    Statistics,
    SynchronousAverager,
)
from lightning_easgd.buffers import common_buffers, copy_buffers, load_buffers
from lightning_easgd.momentum import LookAheadPosition, ParameterPosition, make_nesterov
from lightning_easgd.rates import MovingRates
from lightning_easgd.strategies.workers import DEFAULT_TIMEOUT, LocalWorkers, StartMethod

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["CenterHooks", "ElasticWorkers"]


class ElasticWorkers(LocalWorkers):
    r"""Elastic Averaging SGD: workers train on their own and are pulled together with a center every ``tau`` steps.

    .. math::
        x^i_{t+1} &= x^i_t - \eta\, g^i(x^i_t) - \alpha\,(x^i_t - \tilde x_t) \\
        \tilde x_{t+1} &= \tilde x_t + \tfrac{\beta}{p}\,\textstyle\sum_i (x^i_t - \tilde x_t)

    Rank i is worker :math:`x^i` with the user's own optimizer (the gradient step :math:`\eta g`); the elastic terms
    :math:`\alpha, \beta` are added at the steps t = ``tau``, 2·``tau``, … of the optimizer, with the values of before
    the step (Zhang, Choromanska, LeCun, *Deep learning with Elastic Averaging SGD*, 2015, eqs 3-6). The all-reduce of
    the workers' differences runs while the following steps compute. Each optimizer has a clock of its own.

    The center :math:`\tilde x` is the model: validation, checkpoints and the module after ``fit`` hold it. Floating
    point buffers (BatchNorm's statistics) of the center are the workers' mean, integer buffers are rank 0's.

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        tau: Communication period τ ≥ 1, in steps of the worker's optimizer (not batches).
        beta: The center's moving rate β in (0, 2); 0.9 unless ``alpha`` or ``rho`` is given, then p·α.
        alpha: The worker's moving rate α in (-1, 1]; β/p unless given. It does not change with the learning rate.
        rho: Elastic penalty ρ > 0 in place of ``alpha``: α = lr·ρ follows the learning rate.
        mode: "sync": all workers exchange at the same clock, by an all-reduce.
        momentum: δ in (0, 1) makes this EAMSGD: the worker's ``torch.optim.SGD`` becomes Nesterov with this momentum
            (an SGD that has momentum keeps its own), and the point before the look-ahead is what is averaged.
        evaluate: Weights that validation during ``fit`` uses: "center" or "worker" (each rank its own).
        process_group_backend: As for ``DDPStrategy``.
        timeout: How long a collective operation may wait for the slowest rank before it fails.
        start_method: As for ``DDPStrategy``: "popen", "spawn", "fork" or "forkserver".
        **ddp_arguments: Arguments of the DDP wrapper. ``find_unused_parameters``, ``static_graph``,
            ``gradient_as_bucket_view`` and ``broadcast_buffers`` are accepted and have no effect.

    Raises:
        TypeError: If ``tau`` is not an int, an argument is unknown, changes how DDP reduces gradients, or
            ``momentum`` is given and the optimizer is not SGD.
        ValueError: If a value is out of its range, or ``alpha`` and ``rho`` are both given.
    """

    _callback_class: ClassVar[type["CenterHooks"]]

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        tau: int = 10,
        beta: float | None = None,
        alpha: float | None = None,
        rho: float | None = None,
        mode: Literal["sync"] = "sync",
        momentum: float | None = None,
        evaluate: Literal["center", "worker"] = "center",
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
        **ddp_arguments: Any,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **ddp_arguments,
        )
        _check_arguments(tau, mode, momentum, evaluate)
        self.tau = tau
        self.rates = MovingRates(alpha=alpha, beta=beta, rho=rho)
        self.mode = mode
        self.momentum = momentum
        self.evaluate = evaluate
        self._line: ExchangeLine | None = None
        self._callback: Any = None
        self._averagers: dict[Optimizer, SynchronousAverager] = {}
        self._averaging = False
        self._even_batches = True
        self._validating = False
        self._center_shown = False
        self._center_buffers: list[Tensor] = []
        self._worker_buffers: list[Tensor] = []
        self._final_center: Mapping[str, Tensor] | None = None
        self._statistics = Statistics()

    # What users read

    @property
    def center(self) -> Mapping[str, Tensor]:
        """The center as it is now: read-only, parameter name → tensor of the parameter's shape.

        The tensors are float32 (float64 for double parameters) and live: the next exchange changes them. Reading
        waits for the exchange under way. After ``fit`` it is the final center.

        Raises:
            RuntimeError: If training has not started in this process.
        """
        if self._averagers:
            return MappingProxyType(self._named_center())
        if self._final_center is None:
            raise RuntimeError(
                f"{type(self).__name__}.center: there is no center before training starts, nor in the process that"
                " only spawned the ranks; there, read the module's parameters after fit: they are the center."
            )
        return self._final_center

    @property
    def communication(self) -> Statistics:
        """What this rank has spent on communication in the latest fit."""
        return self._statistics

    def elastic_distance(self) -> float | None:
        r"""The distance :math:`\|x^i - \tilde x\|_2` of this worker at its last exchange, None before the first.

        It makes no communication and waits for none.
        """
        distances = [averager.elastic_distance() for averager in self._averagers.values()]
        known = [distance for distance in distances if distance is not None]
        return math.hypot(*known) if known else None

    @contextlib.contextmanager
    def center_weights(self) -> Iterator[None]:
        """Context in which the module holds the center; afterwards each worker's own values, bit for bit.

        During training all ranks enter it at the same point of their work.
        """
        with self._at_center(Meeting.CENTER_WEIGHTS):
            yield

    @contextlib.contextmanager
    def worker_weights(self) -> Iterator[None]:
        """Context in which the module holds this worker's own values, where it holds the center otherwise.

        That is in validation and, until the strategy is torn down, at the end of training.
        """
        if not self._center_shown:
            yield
            return
        assert self.lightning_module is not None
        shown = [tensor for averager in self._averagers.values() for tensor in averager.parameters]
        values = [tensor.detach().clone() for tensor in shown]
        buffers = copy_buffers(self.lightning_module)
        self._load_worker()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(shown, values)
            load_buffers(self.lightning_module, buffers)

    # Lightning's hooks, in the order in which it calls them

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        problem = self.rates.instability(self.num_nodes * self.num_processes)
        if problem is not None:
            rank_zero_warn(problem)

    def setup_optimizers(self, trainer: "Trainer") -> None:
        """Create the optimizers; make them Nesterov for EAMSGD."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if hasattr(optimizer, "consolidate_state_dict"):
                raise TypeError(
                    f"{type(self).__name__}: {type(optimizer).__name__} shards its state over ranks that have the same"
                    " parameters, and workers do not; use the optimizer that it wraps."
                )
            if self.momentum is not None:
                make_nesterov(optimizer, self.momentum)

    def setup(self, trainer: "Trainer") -> None:
        """Set up the workers; for a fit, open the line on which they exchange."""
        super().setup(trainer)
        if trainer.state.fn != "fit":
            return
        if self._layer_sync is not None:
            rank_zero_warn(
                "Trainer(sync_batchnorm=True): SyncBatchNorm communicates in every forward pass, so that the workers"
                " run in lock-step; without it the center's statistics are the workers' mean."
            )
        assert self._timeout is not None
        control = ProcessGroupChannel("gloo", self._timeout)
        data = ProcessGroupChannel(self._get_process_group_backend(), self._timeout)
        self._statistics = Statistics()
        self._line = ExchangeLine(control, data, statistics=self._statistics)
        self._callback = self._callback_class(self)
        trainer.callbacks.insert(0, self._callback)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Let the center begin where the workers are, and the clocks at 0."""
        super().on_train_start()
        assert self._line is not None
        position = ParameterPosition if self.momentum is None else LookAheadPosition
        self._averagers = {
            optimizer: SynchronousAverager(
                optimizer, self._line, number=number, tau=self.tau, rates=self.rates, position=position
            )
            for number, optimizer in enumerate(self.optimizers)
        }
        self._averaging = True
        self._validating = self._center_shown = False
        batches = self._trainer.num_training_batches
        same = batches == self.broadcast(batches) and math.isfinite(batches)
        self._even_batches = self.reduce_boolean_decision(same)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "LightningModule | Any | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Make one step of the worker, with an exchange around it if this optimizer's clock says so."""
        averager = self._averagers[optimizer]
        averager.begin()
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        averager.finish()
        self._stop_if_agreed()
        return output

    def on_validation_start(self) -> None:
        """Let all ranks meet, and show the center to a validation that is part of a fit."""
        super().on_validation_start()
        if not self._averaging or self._validating:
            return
        self._validating = True
        self._meet(Meeting.VALIDATION)
        if self.evaluate == "center":
            self._show_center()

    def on_validation_end(self) -> None:
        """Go back to the worker's own weights."""
        super().on_validation_end()
        if not self._validating:
            return
        self._validating = False
        if self._center_shown:
            self._show_worker()

    def on_train_epoch_end(self) -> None:
        """Let ranks whose epochs have different lengths meet, before Lightning's own collectives of the epoch's end."""
        if self._averaging and not self._even_batches:
            self._meet(Meeting.EPOCH_END)

    def on_train_end(self) -> None:
        """Let all ranks finish, and leave the center in the module."""
        super().on_train_end()
        if not self._averaging:
            return
        self._meet(Meeting.TRAINING_END)
        self._show_center()
        self._averaging = False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state at the center. During training all ranks ask for it at the same point of their work."""
        if not self._averaging:
            return super().lightning_module_state_dict()
        with self._at_center(Meeting.CHECKPOINT):
            # A copy: the module goes back to the worker, and an asynchronous writer may still be reading.
            return copy.deepcopy(super().lightning_module_state_dict())

    def teardown(self) -> None:
        """Leave the center in the module, also when an error ended the run, and close the line."""
        if self._averaging and not self._center_shown:  # no collective here: the other ranks may be anywhere
            assert self.lightning_module is not None
            self._center_buffers = copy_buffers(self.lightning_module)
            self._show_center()
        if self._averagers:
            named = {name: tensor.cpu() for name, tensor in self._named_center(wait=False).items()}
            self._final_center = MappingProxyType(named)
        self._averagers = {}
        self._averaging = self._validating = self._center_shown = False
        if self._callback is not None:
            with contextlib.suppress(ValueError):
                self._trainer.callbacks.remove(self._callback)
            self._callback = None
        if self._line is not None:
            self._line.close()
            self._line = None
        super().teardown()

    # The parts of the above

    def _on_sigterm(self) -> None:
        if self._line is not None:
            self._line.stop_requested = True
        else:
            super()._on_sigterm()

    def _stop_if_agreed(self) -> None:
        assert self._line is not None
        if self._line.stop_agreed:
            request_stop(self._trainer)

    def _named_center(self, wait: bool = True) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        center: dict[str, Tensor] = {}
        for number, averager in enumerate(self._averagers.values()):
            if wait:
                averager.complete()
            for index, (parameter, view) in enumerate(zip(averager.parameters, averager.center.views, strict=True)):
                center[names.get(parameter, f"optimizers.{number}.{index}")] = view
        return center

    def _meet(self, meeting: Meeting) -> None:
        """Wait for all ranks, apply every exchange, and make the center's buffers."""
        assert self._line is not None
        assert self.lightning_module is not None
        self._line.meet(meeting, list(self._averagers.values()))
        self._stop_if_agreed()
        self._center_buffers = common_buffers(self.lightning_module, self._line.control)

    @contextlib.contextmanager
    def _at_center(self, meeting: Meeting) -> Iterator[None]:
        if not self._averaging or self._center_shown:
            yield
            return
        if self._interrupted:
            assert self.lightning_module is not None
            self._center_buffers = copy_buffers(self.lightning_module)
        else:
            self._meet(meeting)
        self._show_center()
        try:
            yield
        finally:
            self._show_worker()

    def _show_center(self) -> None:
        assert self.lightning_module is not None
        for averager in self._averagers.values():
            averager.show_center()
        self._worker_buffers = copy_buffers(self.lightning_module)
        load_buffers(self.lightning_module, self._center_buffers)
        self._center_shown = True

    def _show_worker(self) -> None:
        self._load_worker()
        self._center_shown = False

    def _load_worker(self) -> None:
        assert self.lightning_module is not None
        for averager in reversed(self._averagers.values()):  # a parameter that two optimizers share was kept twice
            averager.show_worker()
        load_buffers(self.lightning_module, self._worker_buffers)


class CenterHooks:
    """Calls the strategy before all other callbacks; Lightning calls a strategy's own hooks after them."""

    def __init__(self, strategy: ElasticWorkers) -> None:
        self._strategy = strategy

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Show the center before other callbacks look at the module."""
        self._strategy.on_validation_start()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Meet before other callbacks communicate."""
        self._strategy.on_train_epoch_end()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Leave the center in the module before other callbacks write or read it."""
        self._strategy.on_train_end()


def _check_arguments(tau: object, mode: object, momentum: float | None, evaluate: object) -> None:
    if not isinstance(tau, int) or isinstance(tau, bool):
        raise TypeError(
            f"EASGDStrategy(tau={tau!r}): the communication period is a number of optimizer steps; give an int."
        )
    if tau < 1:
        raise ValueError(
            f"EASGDStrategy(tau={tau}): the communication period is at least 1 optimizer step; for no communication"
            " use LocalStrategy."
        )
    if mode != "sync":
        raise ValueError(f"EASGDStrategy(mode={mode!r}): unknown mode; use 'sync'.")
    if momentum is not None and not 0 < momentum < 1:
        raise ValueError(
            f"EASGDStrategy(momentum={momentum}): Nesterov momentum lies in (0, 1); leave it None for plain EASGD."
        )
    if evaluate not in ("center", "worker"):
        raise ValueError(f"EASGDStrategy(evaluate={evaluate!r}): unknown weights; use 'center' or 'worker'.")
