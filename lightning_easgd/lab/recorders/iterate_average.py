"""The average z of one worker's iterates, for the sequential baselines ASGD and MVASGD of the EASGD paper."""

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lightning_easgd.method.downpour import polyak_rate, running_average_
from lightning_easgd.strategies.trainer.lightning_private import saves_in_epoch

__all__ = ["IterateAverage"]


class IterateAverage(Callback):
    r"""Evaluates the running average z of the iterates x in place of x; training itself is not changed.

    .. math:: z_0 = x_0, \qquad z \leftarrow (1 - a) z + a\, x

    after every batch that made an optimizer step (Zhang, Choromanska, LeCun 2015, section 5). ASGD (Polyak and
    Juditsky 1992) has :math:`a = 1/(t + 1)`, so that z is the plain mean of :math:`x_0, …, x_t`; MVASGD has a
    constant rate.

    From the start of a validation until the next batch the module holds z, and so it does after ``fit``. Checkpoints
    hold z as their ``state_dict``, and x in this callback's state, from which a resumed run goes on. z is kept in
    float32 (float64 for double parameters), frozen parameters and buffers are those of the iterate.

    It averages the iterates of one process. Put it before the callbacks that evaluate at the end of training.

    Args:
        rate: "polyak", or the constant rate a in (0, 1]; the paper's MVASGD has 0.001.

    Raises:
        ValueError: If the rate is neither.
    """

    def __init__(self, rate: Literal["polyak"] | float = "polyak") -> None:
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate != "polyak" and not (number and 0 < float(rate) <= 1):
            raise ValueError(
                f"IterateAverage(rate={rate!r}): unknown rate; use 'polyak', or a number in (0, 1] such as 0.001."
            )
        self.rate = rate
        self._updates = 0
        self._step = 0
        self._averages: dict[str, Tensor] = {}
        self._iterates: dict[str, Tensor] = {}  # while the module holds z, and from loading until training starts
        self._shown = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse several processes, and checkpoints that would silently hold x.

        Raises:
            TypeError: If the trainer has several processes, or saves weights alone between two validations.
        """
        if trainer.world_size > 1:
            raise TypeError(
                f"IterateAverage(rate={self.rate!r}): it averages one worker's iterates, and the trainer has"
                f" {trainer.world_size} processes; use DownpourStrategy(average=...), or devices=1."
            )
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_weights_only and saves_in_epoch(callback):
                raise TypeError(  # Lightning asks no callback about such a checkpoint
                    "IterateAverage with ModelCheckpoint(save_weights_only=True, every_n_train_steps=...): it would"
                    " save the iterate; save at validations, or with save_weights_only=False."
                )

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the average at the current weights, or, in a resumed run, where the checkpoint has left it."""
        self._step = trainer.global_step
        self._averages = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            for name, parameter in self._parameters(pl_module).items()
        }
        if self._iterates:  # a checkpoint's state_dict, which the module holds, was z
            self._load(pl_module, self._iterates)
        else:
            self._updates = 0
        self._iterates = {}
        self._shown = False

    @torch.no_grad()
    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Go back to the iterate after a validation."""
        if self._shown:
            self._load(pl_module, self._iterates)
            self._iterates, self._shown = {}, False

    @torch.no_grad()
    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average if the batch made an optimizer step."""
        if trainer.global_step == self._step:  # gradients are accumulated
            return
        self._step = trainer.global_step
        self._updates += 1
        rate = polyak_rate(self._updates) if self.rate == "polyak" else float(self.rate)
        parameters = self._parameters(pl_module)
        iterates = [parameters[name].detach().to(average.dtype) for name, average in self._averages.items()]
        running_average_(list(self._averages.values()), iterates, rate)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show z."""
        self._show(pl_module)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave z in the module."""
        self._show(pl_module)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave z in the module."""
        self._show(pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of both."""
        self._averages, self._iterates, self._shown = {}, {}, False

    def state_dict(self) -> dict[str, Any]:
        """Return how often z has moved."""
        return {"updates": self._updates}

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put z into the checkpoint's weights, and x beside them."""
        if not self._averages:
            return
        parameters = self._parameters(pl_module)
        iterates = self._iterates if self._shown else {name: parameters[name].detach() for name in self._averages}
        checkpoint["callbacks"][self.state_key]["iterates"] = {name: x.clone() for name, x in iterates.items()}
        checkpoint["state_dict"] |= {
            name: average.to(parameters[name].dtype, copy=True) for name, average in self._averages.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over where the checkpoint has left the average."""
        self._updates = state_dict["updates"]
        self._iterates = dict(state_dict.get("iterates", {}))

    @torch.no_grad()
    def _show(self, module: L.LightningModule) -> None:
        if self._shown or not self._averages:  # a validation outside of fit, or before training starts
            return
        parameters = self._parameters(module)
        self._iterates = {name: parameters[name].detach().clone() for name in self._averages}
        self._load(module, self._averages)
        self._shown = True

    def _load(self, module: L.LightningModule, values: dict[str, Tensor]) -> None:
        parameters = self._parameters(module)
        for name, value in values.items():
            parameters[name].copy_(value)

    def _parameters(self, module: L.LightningModule) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
