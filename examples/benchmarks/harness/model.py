"""What is trained: a multi-layer perceptron of any size, cut into few or many tensors, on one batch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

__all__ = ["Model", "Task", "mlp"]

FEATURES, CLASSES = 128, 10


@dataclass(frozen=True)
class Task:
    """What every method of a comparison trains.

    Attributes:
        parameters: About how many.
        tensors: How many tensors they are in: a weight and a bias for each layer, so an even number, 4 or more.
        batch_size: Samples in a rank's batch.
        features: Of a sample.
        pause: Called as ``pause(rank, step)`` in every training step; a rank that is slow, or stops at times.
    """

    parameters: int
    tensors: int = 8
    batch_size: int = 128
    features: int = FEATURES
    pause: Callable[[int, int], None] = lambda rank, step: None

    def model(self, steps: int) -> "Model":
        """A new model that trains for so many steps."""
        return Model(self, steps)


def mlp(parameters: int, tensors: int, features: int = FEATURES) -> nn.Sequential:
    """A multi-layer perceptron of about this many parameters in this many tensors."""
    hidden = tensors // 2 - 1
    width = 1
    while features * width + (hidden - 1) * width**2 + CLASSES * width < parameters:
        width += 1
    layers: list[nn.Module] = [nn.Linear(features, width), nn.ReLU()]
    for _ in range(hidden - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


class Model(L.LightningModule):
    """Trains on one batch that is made once, so that no loader is in the measurement."""

    def __init__(self, task: Task, steps: int) -> None:
        super().__init__()
        self.net = mlp(task.parameters, task.tensors, task.features)
        self.batch = torch.randn(task.batch_size, task.features), torch.randint(CLASSES, (task.batch_size,))
        self.pause = task.pause
        self.steps = steps

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy of the batch."""
        self.pause(self.global_rank, index)
        return nn.functional.cross_entropy(self.net(self.batch[0]), self.batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with Nesterov's momentum, which EAMSGD needs: all methods have the same local step."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def train_dataloader(self) -> Iterable[Any]:
        """One empty batch for each step."""
        return [0] * self.steps
