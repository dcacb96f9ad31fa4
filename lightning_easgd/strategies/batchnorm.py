"""BatchNorm's statistics of the center, estimated at the center."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_easgd.strategies.rehearsal import copy_batch, rehearsal, rehearse_step
from lightning_easgd.tensors.buffers import keep_buffers, restore_buffers

__all__ = ["RecalibrateBatchNorm"]

Forward: TypeAlias = Callable[[Any, Any], Any]


@final
class RecalibrateBatchNorm(Callback):
    r"""Estimates BatchNorm's running statistics at the center, from the latest ``batches`` mini-batches of each worker.

    The center's buffers are the mean of the workers' buffers: statistics of the activations at the *workers*, each of
    them an exponential average over its latest weights. Activations at the center, the workers' mean in weight space,
    have others; the farther the workers are apart (a small α, a long τ), the more. This callback measures them, as
    :func:`torch.optim.swa_utils.update_bn` does: statistics reset, ``momentum=None``, which is the plain mean over
    mini-batches, in the mode in which the module trains and with ``training_step``'s own forward pass. Each worker uses
    its own latest training batches, as they were transferred and augmented; the center's statistics are the mean over
    the workers, the same on all ranks, and those that ``update_bn`` would find from all the batches of all workers.

    It is done wherever all ranks meet and the center is shown: before a validation during ``fit``, for a checkpoint
    (of any kind, also ``save_weights_only``), in ``strategy.center_weights()``, and at the end of training, so that
    after ``fit`` the module has them. Not for the checkpoint of an error or of SLURM's signal handler, which cannot
    wait for the other ranks. The workers' own buffers, gradients, random numbers, metrics and everything else of
    training stay bitwise as they were.

    It costs a copy of every training batch, memory for ``batches`` of them, and so many forward passes at each of
    these points. BatchNorm layers that do not train (in ``eval`` mode, as of a frozen backbone), and those that the
    batches do not reach, keep the mean of the workers' buffers. With a strategy that has no center there is nothing to
    do, and a warning says so.

    Args:
        batches: Mini-batches of each worker; 0 keeps the mean of the workers' statistics. A validation that comes
            before a worker has trained on so many uses those there are; where a resumed run has trained on none yet the
            statistics are those of the checkpoint.
        forward: Called with the module and a batch, runs its forward pass, in place of ``training_step``; needed with
            manual optimization, where ``training_step`` trains.

    Raises:
        ValueError: If ``batches`` < 0.
    """

    def __init__(self, batches: int = 10, forward: Forward | None = None) -> None:
        if batches < 0:
            raise ValueError(
                f"RecalibrateBatchNorm(batches={batches}): give the number of mini-batches, or 0 to keep the mean of"
                " the workers' statistics."
            )
        self.batches = batches
        self.forward = forward
        self._latest: deque[tuple[Any, int]] = deque(maxlen=batches)
        self._begun_with: dict[nn.Module, dict[str, Tensor]] = {}  # the center's statistics, until there is a batch
        self._training: dict[nn.Module, bool] = {}  # of each submodule, where the module trains
        self._active = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets the strategy call it where the center is shown.

        Raises:
            TypeError: If optimization is manual and there is no ``forward``.
        """
        self._active = False
        if stage != "fit" or not self.batches:
            return
        self._latest.clear()
        strategy: Any = trainer.strategy
        if not getattr(strategy, "has_center", False):
            rank_zero_warn(
                f"RecalibrateBatchNorm(batches={self.batches}): {type(strategy).__name__} has no center; BatchNorm's"
                " statistics stay as they are."
            )
            return
        if not pl_module.automatic_optimization and self.forward is None:
            raise TypeError(
                "RecalibrateBatchNorm(forward=None) with manual optimization: training_step trains, and cannot be"
                " called for its forward pass alone; give forward=, a function of the module and a batch."
            )
        self._active = True
        strategy.calibrate_buffers_with(partial(self._calibrate, trainer, pl_module))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Refuses layers that communicate; keeps the statistics of the checkpoint that a run goes on from.

        The module holds the center yet, as it was saved: strategies give the workers their own afterwards.

        Raises:
            TypeError: If there is SyncBatchNorm.
        """
        if self._active and any(isinstance(part, nn.SyncBatchNorm) for part in pl_module.modules()):
            raise TypeError(
                f"RecalibrateBatchNorm(batches={self.batches}): SyncBatchNorm communicates in every forward pass, and"
                " ranks may have different numbers of batches; leave out sync_batchnorm, the result is the mean over"
                " all ranks anyway."
            )
        if self._active:
            self._begun_with = {
                part: {name: buffer.clone() for name, buffer in part.named_buffers(recurse=False)}
                for part in pl_module.modules()
                if isinstance(part, _BatchNorm)
            }

    def on_train_batch_start(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keeps the batch."""
        if self._active:
            self._latest.append((copy_batch(batch), batch_idx))
            self._begun_with.clear()
            self._training = {part: part.training for part in pl_module.modules()}

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Lets go of the batches."""
        if self._active:
            strategy: Any = trainer.strategy
            strategy.calibrate_buffers_with(None)
        self._active = False
        self._latest.clear()
        self._begun_with.clear()
        self._training = {}

    @torch.no_grad()
    def _calibrate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Leave in the module's buffers this worker's estimate, with the parameters that the module holds."""
        for part, values in self._begun_with.items():
            for name, buffer in part.named_buffers(recurse=False):
                if name in values and values[name].shape == buffer.shape:
                    buffer.copy_(values[name])
        layers = [
            part
            for part, trains in self._training.items()
            if isinstance(part, _BatchNorm) and trains and part.running_mean is not None
        ]
        if not layers or not self._latest:
            return
        before = keep_buffers(module)
        with rehearsal(module, trainer.strategy.root_device), trainer.precision_plugin.train_step_context():
            for part in module.modules():
                part.training = self._training.get(part, part.training)
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None
            for batch, index in self._latest:
                if self.forward is None:
                    rehearse_step(module, batch, index)
                else:
                    self.forward(module, copy_batch(batch))
        estimates = {
            buffer: buffer.clone()
            for layer in layers
            if layer.num_batches_tracked is not None and layer.num_batches_tracked > 0
            for buffer in layer.buffers(recurse=False)
        }
        restore_buffers(before)
        for buffer, estimate in estimates.items():
            buffer.copy_(estimate)
