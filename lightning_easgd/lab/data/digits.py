"""scikit-learn's handwritten digits: real images that come inside its wheel."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_easgd.lab.data.images import SplitDataModule
from lightning_easgd.lab.data.sampling import BatchedTensors, evaluation_loader, training_loader
from lightning_easgd.lab.data.splits import stratified_split

_VAL_FRACTION = 0.1
_TEST_FRACTION = 0.2


class DigitsDataModule(SplitDataModule):
    """The 1797 images of 8x8 pixels of scikit-learn's digits, in [0, 1], float32 of shape (N, 1, 8, 8).

    The split (70 % training, 10 % validation, 20 % test, each class alike) is the same in every process and
    for every seed, so that accuracies of different runs are comparable.

    Args:
        batch_size: As for :class:`SplitDataModule`, like the three that follow.
        sampling: "full", "sharded" or "dynamic".
        num_workers: Processes that load data in each worker.
        seed: Seed of the order in which training images are drawn.
        num_classes: What a model is built for; 10, or an error.
        image_shape: What a model is built for; (1, 8, 8), or an error.

    Raises:
        ModuleNotFoundError: If scikit-learn is missing.
        ValueError: If a number of classes or a shape is given that the digits do not have.
    """

    def __init__(
        self,
        batch_size: int = 32,
        sampling: str = "full",
        num_workers: int = 0,
        seed: int = 0,
        num_classes: int | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, sampling, num_workers, seed)
        self.num_classes, self.image_shape = 10, (1, 8, 8)
        self.check_expected(num_classes, image_shape)
        if importlib.util.find_spec("sklearn") is None:  # here, where no process has started yet
            raise ModuleNotFoundError(
                "DigitsDataModule(): scikit-learn, which ships the images, is not installed; run pip install "
                "'lightning_easgd[demo]'."
            )
        self._splits: dict[str, BatchedTensors] = {}

    @override
    def setup(self, stage: str) -> None:
        """Read the images and splits them; the stage does not matter, as all of them are one small array."""
        if self._splits:
            return
        images, labels = _load_images()
        parts = stratified_split(labels, {"val": _VAL_FRACTION, "test": _TEST_FRACTION}, rest="train")
        self._splits = {
            name: BatchedTensors(torch.from_numpy(images[rows]), torch.from_numpy(labels[rows]))
            for name, rows in parts.items()
        }

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this worker's training batches."""
        return training_loader(
            self._splits["train"],
            batch_size=self.batch_size,
            sampling=self.sampling,
            rank=self.rank,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    @override
    def evaluation_loader(self, part: str) -> DataLoader[Any]:
        # No gradients are kept in evaluation: larger batches cost no accuracy and less overhead.
        return evaluation_loader(self._splits[part], batch_size=max(self.batch_size, 256), num_workers=self.num_workers)


def _load_images() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from sklearn.datasets import load_digits  # noqa: PLC0415  # an extra, needed only here

    digits = load_digits()
    images = (digits.images[:, None] / 16.0).astype(np.float32)
    return images, digits.target.astype(np.int64)
