"""What all data modules of images have in common: arguments, normalisation and loaders."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_easgd.lab.data.sampling import augmenting_loader, check_sampling, evaluation_loader
from lightning_easgd.lab.data.splits import stratified_split


@final
@dataclass(frozen=True)
class ImageFacts:
    """What is known of a data set before it is read.

    Args:
        name: Its name in messages.
        channels: Colour channels of an image.
        mean: Mean of each channel over the training set, pixels in [0, 1].
        std: Standard deviation of each channel over the training set, pixels in [0, 1].
    """

    name: str
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@final
class Normalise:
    """Maps bytes to float32: (x / 255 - mean) / std for each channel.

    Args:
        mean: Of each channel, pixels in [0, 1].
        std: Of each channel, pixels in [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._shift = 255 * torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32)).view(-1, 1, 1)

    def __call__(self, images: NDArray[np.uint8]) -> Tensor:
        """Returns float32 images of the same shape.

        Args:
            images: uint8 of shape (N, C, H, W).
        """
        return torch.from_numpy(images).to(torch.float32).sub_(self._shift).mul_(self._scale)


class ImageDataModule(L.LightningDataModule):
    """Images in three parts; each worker's training images are augmented by its own random numbers.

    Args:
        batch_size: Images in a batch of one worker.
        sampling: "full", "sharded" or "dynamic".
        num_workers: Processes that load data in each worker.
        seed: Seed of the order and the augmentation of training images.
        val_fraction: Share of the training images, in [0, 1), that is held out for validation.
        mean: Subtracted from each channel; None: that of `facts`.
        std: Divides each channel; None: that of `facts`.
    """

    facts: ClassVar[ImageFacts]
    num_classes: int
    image_shape: tuple[int, int, int]

    def __init__(
        self,
        *,
        batch_size: int,
        sampling: str,
        num_workers: int,
        seed: int,
        val_fraction: float,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        if batch_size < 1:
            raise ValueError(f"{owner}(batch_size={batch_size}): a batch needs an image; give 1 or more.")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"{owner}(val_fraction={val_fraction}): give a share of the training images in [0, 1).")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != self.facts.channels:
                raise ValueError(
                    f"{owner}({name}={list(values)}): {self.facts.name} has {self.facts.channels} channel(s); give as "
                    "many values."
                )
        if std is not None and not all(value > 0 for value in std):
            raise ValueError(f"{owner}(std={list(std)}): it divides the images; give positive values.")
        self.batch_size = batch_size
        self.sampling = check_sampling(owner, sampling)
        self.num_workers = num_workers
        self.seed = seed
        self.val_fraction = val_fraction
        self.normalise = Normalise(
            self.facts.mean if mean is None else tuple(mean), self.facts.std if std is None else tuple(std)
        )

    @abstractmethod
    def training_set(self) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        """The training set, indexed by the keys of `EpochKeys`, and what makes a batch of its samples."""

    @abstractmethod
    def evaluation_set(self, split: str) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        """The set "train", "val" or "test" without chance, and what makes a batch of its samples."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Returns this worker's training batches: images float32 (N, C, H, W), labels int64 (N,)."""
        dataset, collate = self.training_set()
        return augmenting_loader(
            dataset,
            batch_size=self.batch_size,
            sampling=self.sampling,
            rank=self.rank,
            world_size=self.trainer.world_size if self.trainer else 1,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=collate,
        )

    def train_evaluation_dataloader(self) -> DataLoader[Any]:
        """Returns the training set in its own order, in batches as in training but without chance."""
        return self._evaluation_loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Returns the validation set, in batches as in training but without chance."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Returns the test set, in batches as in training but without chance."""
        return self._evaluation_loader("test")

    def parts(self, labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Returns the rows of the training images that are trained on ("train") and held out ("val").

        Args:
            labels: Of all training images.

        Raises:
            ValueError: If `val_fraction` leaves nothing for one of them.
        """
        parts = stratified_split(labels, {"val": self.val_fraction}, rest="train")
        if len(parts["train"]) == 0 or (self.val_fraction > 0 and len(parts["val"]) == 0):
            raise ValueError(
                f"{type(self).__name__}(val_fraction={self.val_fraction}): of {len(labels)} training images it holds "
                f"out {len(parts['val'])}; give a fraction that leaves some of each class on both sides."
            )
        return parts

    @property
    def rank(self) -> int:
        """The worker's global rank; known only where there is a trainer."""
        return self.trainer.global_rank if self.trainer else 0

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        dataset, collate = self.evaluation_set(split)
        return evaluation_loader(dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate)
