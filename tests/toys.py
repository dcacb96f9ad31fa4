"""Small modules whose trajectories can be written by hand, and a quiet trainer."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

BROADCASTS = hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor")
"""Whether this Lightning broadcasts before every batch, as it does since 2.5.2."""

MINIMA = (1.0, -3.0, 2.0, 0.5)


class Quadratic(L.LightningModule):
    """f_i(x) = ½(x - b_i)² of rank i, from x = 1; records (x_i, x̃) after each step."""

    def __init__(self, lr: float = 0.1, steps: int = 6, record: bool = True, **sgd: Any) -> None:
        super().__init__()
        self.record = record
        self.x = nn.Parameter(torch.ones(1))
        self.lr = lr
        self.steps = steps
        self.sgd = sgd
        self.trace: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return 0.5 * (self.x - MINIMA[self.trainer.global_rank]).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.sgd)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(self.steps * self.trainer.world_size), batch_size=1)

    def position(self) -> float:
        """x, which with Nesterov momentum is y + ηδb."""
        group = self.trainer.optimizers[0].param_groups[0]
        buffer = self.trainer.optimizers[0].state[self.x].get("momentum_buffer")
        if buffer is None or not group["nesterov"]:
            return self.x.item()
        return (self.x + group["lr"] * group["momentum"] * buffer).item()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.record:  # reading the center waits for the exchange under way
            self.trace.append((self.position(), self.trainer.strategy.center["x"].item()))


class Regression(L.LightningModule):
    """A small network with BatchNorm on random data; each rank has its own part."""

    def __init__(self, batches: int = 8, validate: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.batches = batches
        if not validate:
            self.validation_step = None  # type: ignore[assignment]

    def loss(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        data = torch.randn(self.batches * 8 * self.trainer.world_size, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(data, batch_size=8)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(2)), batch_size=8)


def quiet_trainer(**arguments: Any) -> L.Trainer:
    """A Trainer on CPU without bars, logs, checkpoints and the sanity check, which takes a tenth of a short fit."""
    defaults = {
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(defaults | arguments))


def fitted(module: L.LightningModule, strategy: Any, ranks: int, **trainer: Any) -> L.LightningModule:
    """Fit in a process that :func:`ranks.run_ranks` made."""
    quiet_trainer(strategy=strategy, devices=ranks, **trainer).fit(module)
    return module


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(2, 5)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(u), self.second(u)


class TwoLayers(L.LightningModule):
    """½‖A u - v‖² + ½‖B u + c - z‖² in double: a weight of three rows, one of five, and a bias.

    Every batch is a row (u, v, z) of the data, which each data-parallel rank draws its own of.
    """

    def __init__(self, steps: int = 20, accumulate: int = 1, lr: float = 0.1, **sgd: Any) -> None:
        super().__init__()
        self.net = _Two().double()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.batches, self.lr, self.sgd = steps * accumulate, lr, sgd
        self.last: dict[str, Any] = {}

    @staticmethod
    def rows(count: int) -> Tensor:
        return torch.randn(count, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def forward(self, batch: Tensor) -> Tensor:
        u, v, z = batch.split([2, 3, 5], dim=1)
        first, second = self.net(u)
        return 0.5 * ((first - v).square().sum() + (second - z).square().sum()) / len(batch)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self(batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log("val_loss", self(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, **self.sgd)

    def train_dataloader(self) -> DataLoader[Any]:
        given = self.trainer.distributed_sampler_kwargs
        data: Any = self.rows(self.batches * given["num_replicas"])
        return DataLoader(data, sampler=DistributedSampler(data, **given, shuffle=False))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows(8)[4:], batch_size=1)  # type: ignore[arg-type]


class Thaw(BaseFinetuning):
    """Freezes the first layer of TwoLayers; its parameters become a group of the optimizer in the second epoch."""

    def freeze_before_training(self, module: L.LightningModule) -> None:
        self.freeze(module.net.first)

    def finetune_function(self, module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.first, optimizer, initial_denom_lr=1.0)
