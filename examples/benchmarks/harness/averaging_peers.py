"""Peers that average the workers' weights: torch alone in the plainest way, and accelerate's LocalSGD."""

from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

__all__ = ["AccelerateLocalSGD", "FlatLocalSGD"]


class FlatLocalSGD(Callback):
    """Local SGD as plain as it can be: every ``tau`` steps one blocking all-reduce of one flat buffer.

    For ``LocalStrategy``.
    """

    def __init__(self, tau: int) -> None:
        self.tau = tau

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Set the weights to the workers' mean where it is due."""
        if (index + 1) % self.tau:
            return
        parameters = [parameter.data for parameter in module.parameters()]
        flat = _flatten_dense_tensors(parameters)
        dist.all_reduce(flat)
        flat.div_(trainer.world_size)
        torch._foreach_copy_(parameters, list(_unflatten_dense_tensors(flat, parameters)))


class AccelerateLocalSGD(Callback):
    """``accelerate.local_sgd.LocalSGD`` around the steps of a Trainer with ``DDPStrategy``.

    accelerate prepares a model by wrapping it in DDP, as ``DDPStrategy`` has done here; its LocalSGD turns the
    gradients' all-reduce off and averages every parameter by itself. Its own loop has no broadcast before every batch,
    so Lightning's is turned off.
    """

    def __init__(self, tau: int) -> None:
        self.tau = tau

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Enter the context."""
        from accelerate import Accelerator  # noqa: PLC0415 - an extra
        from accelerate.local_sgd import LocalSGD  # noqa: PLC0415

        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None
        self._context = LocalSGD(
            accelerator=Accelerator(cpu=True), model=trainer.strategy.model, local_sgd_steps=self.tau
        )
        self._context.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Count the step, which averages where it is due."""
        self._context.step()

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """Leave the context, which averages once more."""
        self._context.__exit__(None, None, None)
