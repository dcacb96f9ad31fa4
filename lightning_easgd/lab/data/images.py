"""What all data modules of images have in common: arguments, normalisation and loaders."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict, final

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_easgd.callbacks.recording import ranks_that_draw_alike
from lightning_easgd.lab.data.sampling import augmenting_loader, check_sampling, evaluation_loader, worker_stream
from lightning_easgd.lab.data.splits import stratified_split

Split: TypeAlias = Literal["train", "test"]
Rows: TypeAlias = NDArray[np.int64]
Batches: TypeAlias = tuple[Dataset[Any], Callable[[Any], Any]]
"""A data set, and what makes a batch of its samples."""


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
        """Return float32 images of the same shape, from uint8 of shape (N, C, H, W)."""
        return torch.from_numpy(images).to(torch.float32).sub_(self._shift).mul_(self._scale)


class SplitDataModule(L.LightningDataModule):
    """Images in three parts, and what a model has to fit.

    Args:
        batch_size: Images in a batch of one worker.
        sampling: "full": every worker draws its own shuffle of the whole training set, as in the paper; "sharded":
            each worker has its own part of it; "dynamic": workers draw from a common pool (:class:`DynamicShare`).
        num_workers: Processes that load data in each worker; for images in memory 0 is fastest.
        seed: Seed of the order and the augmentation of training images.

    Raises:
        ValueError: If an argument is out of its range.
    """

    num_classes: int
    image_shape: tuple[int, int, int]

    def __init__(self, batch_size: int, sampling: str, num_workers: int, seed: int) -> None:
        super().__init__()
        owner = type(self).__name__
        if batch_size < 1:
            raise ValueError(f"{owner}(batch_size={batch_size}): a batch needs an image; give 1 or more.")
        if num_workers < 0:
            raise ValueError(f"{owner}(num_workers={num_workers}): a number of processes; 0 loads without any.")
        self.batch_size = batch_size
        self.sampling = check_sampling(owner, sampling)
        self.num_workers = num_workers
        self.seed = seed

    def check_expected(self, num_classes: int | None, image_shape: Sequence[int] | None) -> None:
        """Compare what the configuration tells the model about the data with the data; None compares nothing.

        Raises:
            ValueError: If they differ.
        """
        name = type(self).__name__
        if num_classes is not None and num_classes != self.num_classes:
            raise ValueError(
                f"{name}(num_classes={num_classes}): these data have {self.num_classes} classes; the model takes its"
                f" number of classes from here, so give num_classes={self.num_classes}."
            )
        if image_shape is not None and tuple(image_shape) != self.image_shape:
            raise ValueError(
                f"{name}(image_shape={list(image_shape)}): the batches have images of shape {list(self.image_shape)};"
                " the model takes its input shape from here, so give that one, or other transforms."
            )

    def check_files(self) -> None:
        """Look, before any process starts, whether the files are there; reads none of them.

        Raises:
            DataError: If some are missing.
        """

    @property
    def rank(self) -> int:
        """The number of this rank of all workers' that draw their own: those of tensor parallelism draw the same.

        It is known only where there is a trainer, which in a spawn parent says 0. Of workers that come and go each
        launch counts its ranks from 0.
        """
        if not self.trainer:
            return 0
        number = getattr(self.trainer.strategy, "replica_id", None) or 0
        rank: int = number * self.trainer.world_size + self.trainer.global_rank
        return rank // ranks_that_draw_alike(self.trainer)

    @property
    def shares(self) -> dict[str, Any]:
        """How the strategy shares data out: arguments of a `DistributedSampler`."""
        given = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return {"num_replicas": 1, "rank": 0} if given is None else given

    def train_evaluation_dataloader(self) -> DataLoader[Any]:
        """Return the training set in its own order and without chance."""
        return self.evaluation_loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation set in its own order and without chance."""
        return self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test set in its own order and without chance."""
        return self.evaluation_loader("test")

    @abstractmethod
    def evaluation_loader(self, part: str) -> DataLoader[Any]:
        """Return the set "train", "val" or "test" in its own order and without chance."""


class ImageArguments(TypedDict, total=False):
    """Arguments of :class:`ImageDataModule` that its subclasses hand on."""

    batch_size: int
    sampling: str
    num_workers: int
    seed: int
    val_fraction: float
    train_transform: Any
    eval_transform: Any
    mean: Sequence[float] | None
    std: Sequence[float] | None
    num_classes: int | None
    image_shape: Sequence[int] | None


class ImageDataModule(SplitDataModule):
    """Images of which each worker's training images are augmented by its own random numbers.

    Held-out validation images are the same in every process and for every seed, each class alike. Batches are
    float32, normalised.

    Args:
        batch_size: As for :class:`SplitDataModule`, like the three that follow.
        sampling: "full", "sharded" or "dynamic".
        num_workers: Processes that load data in each worker.
        seed: Seed of the order and the augmentation of training images.
        val_fraction: Share of the training images, in [0, 1), that is held out for validation. With 0 the workers
            train on all of them, and the validation set is the test set, as in the paper's curves.
        train_transform: Crops of training images; None: as in the EASGD paper where it used the data, else none.
        eval_transform: Crops of validation and test images; None: the center that matches.
        mean: Subtracted from each channel of images in [0, 1]; None: that of `facts`.
        std: Divides each channel; None: that of `facts`.
        num_classes: What a model is built for; None, or the data set's number, or an error.
        image_shape: What a model is built for; None, or the shape (C, H, W) of what the transforms return.

    Raises:
        ValueError: If an argument is unknown or does not fit the others.
    """

    facts: ClassVar[ImageFacts]
    default_transform: ClassVar[Any]
    center_crop: ClassVar[type[Any]]

    def __init__(
        self,
        batch_size: int = 128,
        sampling: str = "full",
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        train_transform: Any = None,
        eval_transform: Any = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_classes: int | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_size, sampling, num_workers, seed)
        owner = type(self).__name__
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
        self.val_fraction = val_fraction
        self.normalise = Normalise(self.facts.mean if mean is None else mean, self.facts.std if std is None else std)
        self.train_transform = train_transform or self.default_transform
        self.eval_transform = eval_transform or self.center_crop(self.train_transform.size)
        self.image_shape = self.cropped_shape("train_transform")
        evaluated = self.cropped_shape("eval_transform")
        if evaluated != self.image_shape:
            raise ValueError(
                f"{owner}(eval_transform={self.eval_transform}): it returns images of shape {evaluated} and"
                f" train_transform of shape {self.image_shape}; give both the same size."
            )
        self.check_expected(num_classes, image_shape)

    @abstractmethod
    def cropped_shape(self, name: str) -> tuple[int, int, int]:
        """Return the shape of what the transform of this name makes."""

    @abstractmethod
    def labels(self, split: Split) -> Rows:
        """Return the labels of all images of a split; the first time it is read."""

    @abstractmethod
    def batches(self, split: Split, rows: Rows, crop: Any, stream: int) -> Batches:
        """Return some images of a split, indexed by the keys of `EpochKeys`, cropped with a stream of random words."""

    @override
    def setup(self, stage: str) -> None:
        """Read what a stage needs."""
        if stage in ("fit", "validate"):
            self.labels("train")
        if stage == "test" or self.val_fraction == 0:
            self.labels("test")

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this worker's training batches: images float32 (N, C, H, W), labels int64 (N,)."""
        rows = self.parts(self.labels("train"))["train"]
        dataset, collate = self.batches("train", rows, self.train_transform, worker_stream(self.rank, self.seed))
        return augmenting_loader(
            dataset,
            batch_size=self.batch_size,
            sampling=self.sampling,
            rank=self.rank,
            shares=self.shares,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=collate,
        )

    @override
    def evaluation_loader(self, part: str) -> DataLoader[Any]:
        split: Split = "test" if part == "test" or (part == "val" and self.val_fraction == 0) else "train"
        labels = self.labels(split)
        rows = np.arange(len(labels)) if split == "test" else self.parts(labels)[part]
        dataset, collate = self.batches(split, rows, self.eval_transform, 0)
        return evaluation_loader(dataset, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate)

    def parts(self, labels: Rows) -> dict[str, Rows]:
        """Return the rows of the training images that are trained on ("train") and held out ("val").

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
