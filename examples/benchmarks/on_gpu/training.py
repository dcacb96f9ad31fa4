"""What is trained on the GPU: a ResNet on one batch, by strategies that are compared."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from harness.methods import LOCAL, Method
from harness.ranks import Place, one_host
from harness.turns import quiet_trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.lab.models import ResNet18, ResNet50, SmallImageStem

__all__ = ["COMPRESSED", "Setting", "fit", "methods", "model", "network", "settings"]

COMPRESSED = "easgd bfloat16", "easgd int8"


class _Classifier(L.LightningModule):
    """Trains on one batch that is made once on the device, so that no loader is in the measurement."""

    def __init__(self, network: nn.Module, batch_size: int, pixels: int, steps: int) -> None:
        super().__init__()
        self.network, self.steps = network, steps
        self.register_buffer("images", torch.randn(batch_size, 3, pixels, pixels), persistent=False)
        self.register_buffer("labels", torch.randint(10, (batch_size,)), persistent=False)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(self.images), self.labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def train_dataloader(self) -> list[int]:
        return [0] * self.steps


@dataclass(frozen=True)
class Setting:
    """Ranks on one device or on several, and how they talk.

    Attributes:
        device: "cuda" or "cpu".
        backend: Of the process groups.
        places: One for each rank. Ranks that share a device are each a node of its own: Lightning gives every rank of a
            node another device.
    """

    device: str
    backend: str
    places: list[Place] = field(repr=False)

    @property
    def ranks(self) -> int:
        """How many."""
        return len(self.places)

    @property
    def columns(self) -> dict[str, Any]:
        """The first columns of a table."""
        return {"ranks": self.ranks, "backend": self.backend}

    @property
    def title(self) -> str:
        """For a figure."""
        together = self.ranks > 1 and self.places[0].local_size == 1
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.backend}{', one device' * together}"

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of the Trainer."""
        if self.device == "cpu":
            return {"precision": "bf16-mixed"}
        return {"accelerator": "gpu", "precision": "bf16-mixed"}


def settings(device: str, cards: int) -> list[Setting]:
    """One rank; two that share a GPU, for which NCCL refuses to work; and on several GPUs two with one each."""
    # A machine without a network may not know its own name, by which gloo would look for an interface.
    loopback = next((name for _, name in socket.if_nameindex() if name == "lo"), None)
    apart = [Place(rank, 0, 1, "127.0.0.1", loopback, lambda: None) for rank in range(2)]
    if device == "cpu":
        return [Setting(device, "gloo", apart[:1]), Setting(device, "gloo", apart)]
    chosen = [Setting(device, "nccl", apart[:1]), Setting(device, "gloo", apart)]
    return [*chosen, Setting(device, "nccl", one_host(2))] if cards > 1 else chosen


def network(device: str, *, small: bool = False) -> nn.Module:
    """ResNet-50, made on the device, which is quick; something tiny on a CPU, where only the code is tried."""
    if device == "cpu":
        body = nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*body, nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    with torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))):
        return ResNet18(SmallImageStem(), num_classes=10) if small else ResNet50()


def model(device: str, batch_size: int, pixels: int, steps: int, *, small: bool = False) -> L.LightningModule:
    """A module that trains for so many steps."""
    return _Classifier(network(device, small=small), batch_size, pixels, steps)


def methods(tau: int, backend: str) -> dict[str, Method]:
    """What is compared, by name; the most important first, as the time may be over."""
    # Under the name of a backend the ranks of a node talk through the process group alone, as those of several do.
    group: dict[str, Any] = {} if backend == "nccl" else {"process_group_backend": backend}

    def elastic(name: str, **arguments: Any) -> Method:
        return Method(name, tau, partial(EASGDStrategy, tau=tau, **group, **arguments))

    chosen = [
        Method(LOCAL, None, partial(LocalStrategy, **group)),
        elastic("easgd"),
        Method("local again", None, partial(LocalStrategy, **group)),
        Method("ddp", None, partial(DDPStrategy, **group), every_step=True),
        elastic("easgd center on cpu", center_device="cpu"),
        elastic("easgd_async", mode="async"),
        elastic("easgd bfloat16", wire_dtype="bfloat16"),
        elastic("easgd int8", wire_dtype="int8"),
    ]
    return {method.name: method for method in chosen}


def fit(
    setting: Setting, place: Place, method: Method, module: Callable[[int], L.LightningModule], watching: Callback
) -> None:
    """Train by a method for as many steps as the callback says."""
    steps: int = watching.steps  # type: ignore[attr-defined]
    trainer = quiet_trainer(
        place, strategy=method.strategy(), callbacks=[*method.callbacks(place), watching], **setting.trainer
    )
    trainer.fit(module(steps))
