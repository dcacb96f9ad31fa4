"""Post-local SGD as torch has it, a baseline; evaluated at the workers' mean."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Unpack, final

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers import Statistics
from lightning_easgd.callbacks.recording import ddp_bytes
from lightning_easgd.strategies.center_method import check_period
from lightning_easgd.strategies.ddp_arguments import DDPArguments, check_ddp_arguments, takes_ddp_arguments
from lightning_easgd.strategies.worker_arguments import DEFAULT_TIMEOUT, StartMethod

__all__ = ["PostLocalSGDStrategy"]


@final
class PostLocalSGDStrategy(DDPStrategy):
    r"""DDP for ``warmup_steps`` steps, then local SGD: the workers' weights are replaced by their mean every ``tau``.

    .. math:: x^i \leftarrow \tfrac{1}{p} \textstyle\sum_j x^j

    (Lin, Stich, Patel, Jaggi, *Don't use large mini-batches, use local SGD*, 2020). It is Lightning's ``DDPStrategy``
    with torch's post-local SGD hook and averager, which average after the steps ``warmup_steps`` + 1, + 1 + ``tau``, ….
    Lightning registers the hook on CUDA devices only, so that elsewhere gradients would still be reduced at every step;
    and it leaves each rank with weights of its own between two averagings. Here the hook is registered everywhere, and
    validation, checkpoints and the module after ``fit`` hold the workers' mean, buffers included; the workers' own
    values come back afterwards.

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        tau: Averaging period in optimizer steps, at least 1.
        warmup_steps: Steps of DDP before the first averaging.
        process_group_backend: As for ``DDPStrategy``.
        timeout: As for ``DDPStrategy``.
        start_method: As for ``DDPStrategy``.
        **ddp_arguments: Arguments of the DDP wrapper, as for ``DDPStrategy``; buffers are never broadcast.

    Raises:
        TypeError: If ``tau`` is not an int, or an argument is unknown or one of those that make this post-local SGD.
        ValueError: If ``tau`` < 1 or ``warmup_steps`` < 0.
    """

    @takes_ddp_arguments
    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        tau: int = 10,
        warmup_steps: int = 0,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
        **ddp_arguments: Unpack[DDPArguments],
    ) -> None:
        check_period("PostLocalSGDStrategy", tau)
        if warmup_steps < 0:
            raise ValueError(f"PostLocalSGDStrategy(warmup_steps={warmup_steps}): give a number of steps, 0 or more.")
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            ddp_comm_state=PostLocalSGDState(  # type: ignore[no-untyped-call]
                None, None, warmup_steps, post_local_gradient_allreduce=False
            ),
            ddp_comm_hook=post_localSGD_hook,
            model_averaging_period=tau,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **check_ddp_arguments(type(self), ddp_arguments),
        )
        self.tau = tau
        self.warmup_steps = warmup_steps
        self._steps = 0
        self._own: list[Tensor] | None = None  # this worker's values while the module holds the mean
        self._fitting = False
        self._statistics = Statistics()
        self._is_rank = False

    @property
    def communication(self) -> Statistics:
        """What this rank has spent on averaging in the latest fit, and sent for it and for DDP's gradients.

        Raises:
            RuntimeError: If this process only spawns or forks the ranks.
        """
        if self._start_method != "popen" and not self._is_rank:
            raise RuntimeError(
                "PostLocalSGDStrategy.communication: the ranks spend it, and this process only spawns or forks them;"
                " read it in a callback."
            )
        return self._statistics

    def elastic_distance(self) -> None:
        """None: these workers are not held by a center, they are set to their mean."""

    @contextlib.contextmanager
    def center_weights(self) -> Iterator[None]:
        """Context in which the module holds the workers' mean; all ranks enter it at the same point."""
        if self._own is not None or not self._fitting:
            yield
            return
        self._show_mean()
        try:
            yield
        finally:
            self._show_own()

    @contextlib.contextmanager
    def worker_weights(self) -> Iterator[None]:
        """Context in which the module holds this worker's own values."""
        if self._own is None:
            yield
            return
        mean = [tensor.detach().clone() for tensor in self._tensors()]
        _copy(self._tensors(), self._own)
        try:
            yield
        finally:
            _copy(self._tensors(), mean)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._is_rank = True

    @override
    def setup(self, trainer: L.Trainer) -> None:
        super().setup(trainer)
        if trainer.state.fn == "fit":
            self._statistics = Statistics()
            self._steps = 0
            self._fitting = True
            trainer.callbacks.insert(0, _MeanFirst())  # type: ignore[attr-defined]

    @override
    def _enable_model_averaging(self) -> None:
        self._model_averager = PeriodicModelAverager(period=self.tau, warmup_steps=self.warmup_steps)

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self._ddp_comm_state, self._ddp_comm_hook)  # type: ignore[arg-type]
        self.model.broadcast_buffers = False  # DDP would communicate in every forward pass

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        averager, self._model_averager = self._model_averager, None  # timed and counted here
        assert averager is not None
        try:
            output = super().optimizer_step(optimizer, closure, model, **kwargs)
        finally:
            self._model_averager = averager
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        size = sum(p.numel() * p.element_size() for p in parameters)
        after_warmup = self._steps - self.warmup_steps
        started = time.perf_counter()
        averager.average_parameters(iter(parameters))  # type: ignore[no-untyped-call]
        if after_warmup < 0:
            self._statistics.bytes_sent += ddp_bytes(size, 1, self.world_size)
        elif after_warmup % self.tau == 0:
            self._statistics.exchanges += 1
            self._statistics.bytes_sent += ddp_bytes(size, 1, self.world_size)
            self._statistics.seconds_waited += time.perf_counter() - started
        self._steps += 1
        return output

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        if self._fitting and self._own is None:
            self._show_mean()

    @override
    def on_validation_end(self) -> None:
        super().on_validation_end()
        if self._fitting and self._own is not None:
            self._show_own()

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if self._fitting and self._own is None:
            self._show_mean()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.status == "interrupted":  # other ranks may be anywhere
            return super().lightning_module_state_dict()
        with self.center_weights():
            return copy.deepcopy(super().lightning_module_state_dict())

    @override
    def teardown(self) -> None:
        self._own, self._fitting = None, False
        if self.lightning_module is not None:
            callbacks = self.lightning_module.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = [callback for callback in callbacks if not isinstance(callback, _MeanFirst)]
        super().teardown()

    def _tensors(self) -> list[Tensor]:
        assert self.lightning_module is not None
        tensors = [*self.lightning_module.parameters(), *self.lightning_module.buffers()]
        return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]

    def _show_mean(self) -> None:
        self._own = [tensor.clone() for tensor in self._tensors()]
        for tensor in self._tensors():
            tensor.div_(self.world_size)
            dist.all_reduce(tensor)

    def _show_own(self) -> None:
        assert self._own is not None
        _copy(self._tensors(), self._own)
        self._own = None


class _MeanFirst(Callback):
    """Calls the strategy before all other callbacks, which then see the mean; Lightning calls strategies last."""

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.on_validation_start()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.on_train_end()


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
