"""The largest curvature of the loss at the center, and whether the run is stable there."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from lightning_easgd.callbacks.curvature import Estimate, HessianProduct, PowerIteration
from lightning_easgd.callbacks.stable_region import NotJudgedError, StableRegion, region_of
from lightning_easgd.strategies.rehearsal import copy_batch, rehearsal, rehearse_step
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy
from lightning_easgd.strategies.worker_state import random_state, set_random_state

__all__ = ["CurvatureMonitor", "CurvatureReading", "Loss"]

Loss: TypeAlias = Callable[[Any, Any], Tensor]

_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}


@final
@dataclass(frozen=True)
class CurvatureReading:
    """One reading of a :class:`CurvatureMonitor`.

    Attributes:
        step: Optimizer steps made until then.
        curvature: h, the largest curvature.
        scaled_lr: ηh, with the learning rate η of now.
        limit: The ηh up to which the run is stable; None where the analysis does not cover it.
        products: Products of the Hessian with a vector that it took.
        converged: Whether the iteration came within its tolerance; if not, h is an underestimate.
    """

    step: int
    curvature: float
    scaled_lr: float
    limit: float | None
    products: int
    converged: bool


@final
class CurvatureMonitor(Callback):
    r"""Estimates the largest curvature h of the training loss at the center, and warns once where the run is unstable.

    On a quadratic loss EASGD is stable while ηh is below a limit that depends on the moving rates α and β, the number
    of workers p, the period τ and the momentum δ (:mod:`lightning_easgd.stability`); the largest curvature decides.
    When ηh leaves the stable region, a warning names the limit and the remedy. Which region counts for which strategy
    says :func:`~lightning_easgd.callbacks.stable_region.region_of`: with a strategy that has no center h is taken at
    the weights themselves and a worker is judged alone. It is judged for ``torch.optim.SGD``, plain, or Nesterov with
    EAMSGD; elsewhere h is only logged, and a warning at the start says so.

    h is the largest eigenvalue of the Hessian :math:`H` of the mean loss of the first ``batches`` mini-batches of this
    fit, found by power iteration, which goes on from the last eigenvector. With several learning rates
    :math:`\eta_g` of parameter groups and weight decays :math:`\lambda_g` of SGD it is that of
    :math:`D (H + \Lambda) D`, :math:`D^2 = \mathrm{diag}(\eta_g / \eta)`, with the largest of them as η. Layers are in
    the mode in which they train, so that BatchNorm uses the mini-batch's statistics; dropout masks are the same at
    each reading. The computation is in float32 (float64 for double parameters) without autocast.

    Rank 0 alone computes, without any communication: it takes the center as it knows it at the end of a batch, in
    synchronous mode that of at most one exchange before, and waits for nobody. The time is that rank's own; the
    others see it as a slow step at their next exchange. A reading takes the time of a gradient, and of one to
    four more for each product (1.0 for a perceptron, 2.8 for ResNet-18 and 3.6 for a small convolutional network,
    measured on a CPU), and memory for the graph of ``batches`` mini-batches. The first reading starts from a random
    vector, later ones from the last eigenvector. Training is not changed: parameters, buffers, gradients, random
    numbers, metrics and other attributes of the module are bitwise as they were.

    Loggers get ``curvature/largest`` (h), ``curvature/scaled_lr`` (ηh) and, where it is judged, ``curvature/limit``.

    The loss is what ``training_step`` returns. One that cannot be differentiated twice (the first reading is compared
    with a difference of gradients), or that communicates (``self.all_gather``), turns the monitor off, with a warning.

    Args:
        every_n_steps: A reading after the first optimizer step, and then every so many; 0 for none at all.
        batches: Number of mini-batches whose mean loss is examined; they are kept on the device.
        iterations: Most products of a reading; a reading that ends early underestimates h.
        tolerance: Relative change of h at which the iteration ends.
        loss: Called with the module and a batch, returns the loss, in place of ``training_step``; needed with manual
            optimization, where ``training_step`` trains.

    Attributes:
        readings: All readings of the latest fit, on rank 0.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        batches: int = 1,
        iterations: int = 20,
        tolerance: float = 0.01,
        loss: Loss | None = None,
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"CurvatureMonitor(every_n_steps={every_n_steps}): give 1 or more, or 0 to switch it off.")
        for name, value in (("batches", batches), ("iterations", iterations)):
            if value < 1:
                raise ValueError(f"CurvatureMonitor({name}={value}): there has to be one at least; give 1 or more.")
        if not 0 < tolerance < 1:
            raise ValueError(
                f"CurvatureMonitor(tolerance={tolerance}): a relative change lies in (0, 1); 0.01 is usual."
            )
        self.every_n_steps = every_n_steps
        self.batches = batches
        self.iterations = iterations
        self.tolerance = tolerance
        self.loss = loss
        self.readings: list[CurvatureReading] = []
        self._kept: list[tuple[Any, int]] = []
        self._next_step: float = math.inf
        self._warned = self._checked = False
        self._power = PowerIteration(iterations, tolerance)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks that the loss can be examined.

        Raises:
            TypeError: If there are several optimizers, optimization is manual and there is no ``loss``, the
                parameters are sharded, or SyncBatchNorm communicates in the forward pass.
        """
        self.readings, self._kept = [], []
        self._warned = self._checked = False
        self._next_step = math.inf
        if not self.every_n_steps:
            return
        self._check(trainer, pl_module)
        self._power = PowerIteration(self.iterations, self.tolerance)
        here = trainer.is_global_zero and any(optimizer.param_groups for optimizer in trainer.optimizers)
        self._next_step = trainer.global_step + 1 if here else math.inf
        if here:
            try:
                region_of(trainer.strategy, trainer.optimizers[0], _workers_of(trainer))
            except NotJudgedError as reason:
                rank_zero_warn(f"CurvatureMonitor(): the curvature is logged and stability is not judged, as {reason}.")

    def on_train_batch_start(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keeps the first batches."""
        if len(self._kept) < self.batches and self._next_step < math.inf:
            self._kept.append((copy_batch(batch), batch_idx))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Takes a reading if one is due."""
        step = trainer.global_step
        if step < self._next_step or len(self._kept) < self.batches:
            return
        self._next_step = self.every_n_steps * (step // self.every_n_steps + 1)
        center = _center(trainer, pl_module)
        try:
            estimate = self._estimate(trainer, pl_module, center)
        except (
            Exception
        ) as error:  # whatever a user's loss may raise when it is differentiated twice: no run ends by it
            self._next_step = math.inf
            rank_zero_warn(
                f"CurvatureMonitor(): it is off, as the loss cannot be examined at step {step}"
                f" ({type(error).__name__}: {error}). If training_step is not differentiable twice, or communicates,"
                " give loss=."
            )
            return
        if math.isfinite(estimate.value):
            self._record(trainer, estimate)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Lets go of the batches."""
        self._kept, self._next_step = [], math.inf

    def _check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if len(trainer.optimizers) > 1:
            raise TypeError(
                f"CurvatureMonitor(): {len(trainer.optimizers)} optimizers minimize different losses, and it examines"
                " one; leave it out."
            )
        if not module.automatic_optimization and self.loss is None:
            raise TypeError(
                "CurvatureMonitor(loss=None) with manual optimization: training_step trains, and cannot be called for"
                " its loss alone; give loss=, a function of the module and a batch."
            )
        if _SHARDED & {cls.__name__ for cls in type(trainer.strategy).__mro__}:
            raise TypeError(
                f"CurvatureMonitor(): {type(trainer.strategy).__name__} shards the parameters, and rank 0 alone cannot"
                " compute with them; leave it out."
            )
        if trainer.world_size > 1 and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
            raise TypeError(
                "CurvatureMonitor(): SyncBatchNorm communicates in every forward pass, and rank 0 computes alone;"
                " leave out sync_batchnorm, or the monitor."
            )

    def _estimate(self, trainer: L.Trainer, module: L.LightningModule, center: Mapping[str, Tensor]) -> Estimate:
        (optimizer,) = trainer.optimizers
        steps, decay = _scales(module, optimizer)
        device = trainer.strategy.root_device
        variables = {name: _widened(center[name].to(device)) for name in steps if name in center}
        with (
            rehearsal(module, device),
            torch.autocast(device.type, enabled=False),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels of attention have no second derivative
        ):
            function = _MeanLoss(module, self.loss, self._kept, device)
            product = HessianProduct(function.at, variables, steps=steps, decay=decay)
            estimate = self._power.estimate(product, list(variables.values()))
            if not self._checked and self._power.vector is not None:
                product.check(self._power.vector)
                self._checked = True
            return estimate

    def _record(self, trainer: L.Trainer, estimate: Estimate) -> None:
        (optimizer,) = trainer.optimizers
        lr = _largest_lr(optimizer)
        region: StableRegion | None
        try:
            region = region_of(trainer.strategy, optimizer, _workers_of(trainer), trainer.global_step)
        except NotJudgedError:
            region = None
        h = estimate.value
        reading = CurvatureReading(
            trainer.global_step, h, lr * h, region.limit if region else None, estimate.products, estimate.converged
        )
        self.readings.append(reading)
        values = {"curvature/largest": h, "curvature/scaled_lr": lr * h}
        if region is not None:
            values["curvature/limit"] = region.limit
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if region is not None and not region.holds(lr * h) and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"CurvatureMonitor(): at step {reading.step} the largest curvature at the center is {h:.4g}, so that"
                f" lr * curvature = {lr:g} * {h:.4g} = {lr * h:.4g}; {region.method} is stable up to"
                f" {region.limit:.4g} (lightning_easgd.stability.{region.source}). {region.remedy(lr, h)}"
            )


@final
class _MeanLoss(nn.Module):
    """The mean loss of some batches as a function of the parameters; the module's own tensors are not touched."""

    def __init__(
        self, module: L.LightningModule, loss: Loss | None, batches: list[tuple[Any, int]], device: torch.device
    ) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._batches = [(apply_to_collection(batch, Tensor, _widened), index) for batch, index in batches]
        self._device = device
        self._random = random_state(device)
        self._others = {name: _widened(value.detach()) for name, value in self.named_parameters()}
        # Copies, as BatchNorm writes to them.
        self._others |= {name: _widened(value.detach()).clone() for name, value in self.named_buffers()}

    def at(self, point: Mapping[str, Tensor]) -> Tensor:
        """The loss with these parameters, by their names in the module; random numbers are the same each time."""
        set_random_state(self._random, self._device)
        tensors = self._others | {f"module.{name}": value for name, value in point.items()}
        loss: Tensor = torch.func.functional_call(self, tensors, ())
        return loss

    def forward(self) -> Tensor:
        """The loss at the parameters of now."""
        return torch.stack([self._of(batch, index) for batch, index in self._batches]).mean()

    def _of(self, batch: Any, index: int) -> Tensor:
        output = rehearse_step(self.module, batch, index) if self._loss is None else self._loss(self.module, batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(f"training_step returned {type(loss).__name__}, which is no loss")
        return loss.mean()  # as Lightning has it, a scalar


def _center(trainer: L.Trainer, module: L.LightningModule) -> Mapping[str, Tensor]:
    if isinstance(trainer.strategy, TrainerStrategy) and trainer.strategy.has_center:
        return trainer.strategy.known_center
    return dict(module.named_parameters())


def _workers_of(trainer: L.Trainer) -> int:
    return int(getattr(trainer.strategy, "workers", trainer.world_size))


def _scales(module: L.LightningModule, optimizer: Optimizer) -> tuple[dict[str, float], dict[str, float]]:
    """Step size relative to the largest, and SGD's weight decay, of each parameter that is trained."""
    names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    largest = _largest_lr(optimizer)
    steps, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in names:
                steps[names[parameter]] = float(group["lr"]) / largest if largest > 0 else 1.0
                if isinstance(optimizer, torch.optim.SGD):
                    decay[names[parameter]] = float(group["weight_decay"])
    return steps, decay


def _largest_lr(optimizer: Optimizer) -> float:
    return max(float(group.get("lr") or 0.0) for group in optimizer.param_groups)


def _widened(tensor: Tensor) -> Tensor:
    """A tensor that has at least single precision, if it is floating-point."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
