"""CIFAR-10 on a device as uint8; crops, flips and the order of every worker are drawn there, all workers at once."""

from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from lightning_easgd.lab.data import CIFAR10DataModule

__all__ = ["StackedImages", "read_cifar10", "synthetic_images"]

Arrays = tuple[np.ndarray, np.ndarray]
_CROP = 28


def read_cifar10(root: Path) -> tuple[Arrays, Arrays]:
    """Training and test set from the folder that holds ``cifar-10-batches-py``."""
    source = CIFAR10DataModule(root=root).source
    return source.read("train"), source.read("test")


def synthetic_images(count: int) -> tuple[Arrays, Arrays]:
    """Noise around one picture for each class, to try the code; training and test set."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (10, 3, 32, 32))

    def part() -> Arrays:
        labels = np.arange(count) % 10
        return ((pictures[labels] + random.integers(0, 256, (count, 3, 32, 32))) // 2).astype(np.uint8), labels

    return part(), part()


@final
class StackedImages:
    """Mini-batches of p workers, each of which draws the whole training set in an order of its own.

    As in the data module: random 28x28 crops and flips in training, the center crop in evaluation, normalised by mean
    and standard deviation of the channels.

    Args:
        train: Images, uint8 (N, 3, 32, 32), and classes.
        test: The same.
        workers: p.
        batch_size: Images in a worker's batch; an epoch's last ones, too few for a batch, are left out.
        device: Where everything lies.
        seed: Of order, crops and flips.
    """

    def __init__(
        self, train: Arrays, test: Arrays, *, workers: int, batch_size: int, device: torch.device, seed: int
    ) -> None:
        self._images, self._labels = (torch.from_numpy(array).to(device) for array in train)
        facts = CIFAR10DataModule.facts
        self._mean = torch.tensor(facts.mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(facts.std, device=device).view(3, 1, 1)
        edge = (test[0].shape[-1] - _CROP) // 2
        middle = torch.from_numpy(test[0]).to(device)[..., edge : edge + _CROP, edge : edge + _CROP]
        self.test = self._normalised(middle), torch.from_numpy(test[1]).to(device)
        self._shape = workers, batch_size
        self._per_epoch = len(self._images) // batch_size
        self._device = device
        self._random = torch.Generator(device).manual_seed(seed)

    def draw(self, clock: int) -> tuple[Tensor, Tensor]:
        """The batches of a step, float32 (p, batch, 3, 28, 28) and classes (p, batch); clocks come in order."""
        workers, size = self._shape
        batch = clock % self._per_epoch
        if batch == 0:
            keys = torch.rand(workers, len(self._images), generator=self._random, device=self._device)
            self._order = keys.argsort(1)
        rows = self._order[:, batch * size : (batch + 1) * size].flatten()
        return (
            self._normalised(self._crops(rows)).unflatten(0, self._shape),
            self._labels[rows].unflatten(0, self._shape),
        )

    def _crops(self, rows: Tensor) -> Tensor:
        places = self._images.shape[-1] - _CROP + 1
        top, left = (self._below(places, len(rows)) for _ in range(2))
        mirrored = self._below(2, len(rows)).bool()
        pixels = torch.arange(_CROP, device=self._device)
        columns = torch.where(mirrored[:, None], pixels.flip(0), pixels)
        return self._images[
            rows[:, None, None, None],
            torch.arange(3, device=self._device)[:, None, None],
            (top[:, None] + pixels)[:, None, :, None],
            (left[:, None] + columns)[:, None, None, :],
        ]

    def _below(self, limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count,), generator=self._random, device=self._device)

    def _normalised(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self._mean) / self._std
