"""Data sets of small images that live decoded in memory and are augmented a batch at a time."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_easgd.lab.data.crops import WORDS, BatchCrop, Images
from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.expected import check_expected
from lightning_easgd.lab.data.images import ImageDataModule, Normalise
from lightning_easgd.lab.data.randomness import random_words
from lightning_easgd.lab.data.sampling import keep_batch, worker_stream

Split: TypeAlias = Literal["train", "test"]
Labels: TypeAlias = NDArray[np.int64]


class Source(Protocol):
    """The files of a data set in their official format."""

    def prepare(self, *, download: bool, verify: bool) -> None:
        """Makes sure that the files are there and whole.

        Args:
            download: Whether to fetch what is missing.
            verify: Whether to compare checksums.

        Raises:
            DataError: If a file is missing or another one than was published.
        """

    def read(self, split: Split) -> tuple[Images, Labels]:
        """Returns images, uint8 (N, C, H, W), and labels.

        Args:
            split: Which part.

        Raises:
            DataError: If a file is missing or torn.
        """


@final
class ImageBatches(Dataset[Any]):
    """Images in memory, indexed once per batch by keys (see :class:`EpochKeys`); plain rows are those of epoch 0.

    Args:
        images: uint8 of shape (N, C, H, W).
        labels: int64 of shape (N,).
        rows: Which of them belong to this data set.
        crop: Cuts a batch out of them.
        normalise: Maps a batch to float32.
        stream: Number of the stream of random words that `crop` gets.
    """

    def __init__(
        self,
        images: Images,
        labels: Labels,
        rows: NDArray[np.int64],
        crop: BatchCrop,
        normalise: Normalise,
        stream: int = 0,
    ) -> None:
        self.images = images
        self.labels = torch.from_numpy(labels)
        self.rows = rows
        self.crop = crop
        self.normalise = normalise
        self.stream = stream

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the images and labels of one batch, already collated; `DataLoader` prefers this method."""
        numbers = np.asarray(keys, np.int64)
        rows = self.rows[numbers % len(self)]
        crops = self.crop(self.images, rows, random_words(self.stream, numbers, WORDS))
        return self.normalise(crops), self.labels[torch.from_numpy(rows)]


class InMemoryDataModule(ImageDataModule):
    """A data set of small images, read from its official files; batches are float32, normalised.

    Held-out validation images are the same in every process and for every seed, each class alike.

    Args:
        root: Folder that the data set lies in or is downloaded to.
        batch_size: Images in a batch of one worker.
        sampling: "full": every worker draws its own shuffle of the whole training set, as in the paper; "sharded":
            each worker has its own part of it; "dynamic": workers draw from a common pool (:class:`DynamicShare`).
        num_workers: Processes that load data in each worker; the images are in memory, so 0 is fastest.
        seed: Seed of the order and the augmentation of training images.
        val_fraction: Share of the training images, in [0, 1), that is held out for validation. With 0 the workers
            train on all of them, and the validation set is the test set, as in the paper's curves.
        train_transform: Crops of training images; None: as in the EASGD paper where it used the data, else none.
        eval_transform: Crops of validation and test images; None: the center that matches.
        mean: Subtracted from each channel of images in [0, 1]; None: the training set's.
        std: Divides each channel; None: the training set's.
        download: Whether to fetch the data set where it is missing. Nothing is ever overwritten.
        verify: Whether files are compared with their published checksums, once on each node; False warns.
        url: Folder of the download; None: the authors' site or the usual mirror.
        num_classes: What a model is built for; None, or the data set's number, or an error.
        image_shape: What a model is built for; None, or the shape (C, H, W) of what the transforms return.

    Raises:
        ValueError: If an argument is unknown or does not fit the images.
        DataError: In `prepare_data` and `setup`, if files are missing, torn, of the wrong shape or number of classes.
    """

    classes: ClassVar[int]
    original_shape: ClassVar[tuple[int, int, int]]
    default_transforms: ClassVar[tuple[BatchCrop, BatchCrop]]

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 128,
        sampling: str = "full",
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        train_transform: BatchCrop | None = None,
        eval_transform: BatchCrop | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        download: bool = False,
        verify: bool = True,
        url: str | None = None,
        num_classes: int | None = None,
        image_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            sampling=sampling,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            mean=mean,
            std=std,
        )
        self.train_transform = train_transform or self.default_transforms[0]
        self.eval_transform = eval_transform or self.default_transforms[1]
        self.num_classes = self.classes
        self.image_shape = self._cropped_shape("train_transform", self.train_transform)
        evaluated = self._cropped_shape("eval_transform", self.eval_transform)
        if evaluated != self.image_shape:
            raise ValueError(
                f"{type(self).__name__}(eval_transform={self.eval_transform}): it returns images of shape {evaluated} "
                f"and train_transform of shape {self.image_shape}; give both the same size."
            )
        check_expected(self, num_classes, image_shape)
        self.download = download
        self.verify = verify
        self.source = self.make_source(Path(root), url)
        self._read: dict[Split, tuple[Images, Labels]] = {}

    @abstractmethod
    def make_source(self, root: Path, url: str | None) -> Source:
        """Returns what reads the data set's files."""

    @override
    def prepare_data(self) -> None:
        """Downloads what is missing, if asked to, and compares checksums; Lightning calls it once on each node."""
        self.source.prepare(download=self.download, verify=self.verify)

    @override
    def setup(self, stage: str) -> None:
        """Reads what a stage needs."""
        if stage in ("fit", "validate"):
            self._images("train")
        if stage == "test" or self.val_fraction == 0:
            self._images("test")

    @override
    def training_set(self) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        images, labels = self._images("train")
        rows = self.parts(labels)["train"]
        stream = worker_stream(self.rank, self.seed)
        return ImageBatches(images, labels, rows, self.train_transform, self.normalise, stream), keep_batch

    @override
    def evaluation_set(self, split: str) -> tuple[Dataset[Any], Callable[[Any], Any]]:
        if split == "test" or (split == "val" and self.val_fraction == 0):
            images, labels = self._images("test")
            rows = np.arange(len(labels))
        else:
            images, labels = self._images("train")
            rows = self.parts(labels)[split]
        return ImageBatches(images, labels, rows, self.eval_transform, self.normalise), keep_batch

    def _cropped_shape(self, argument: str, crop: BatchCrop) -> tuple[int, int, int]:
        """Tries a transform on an empty image."""
        image = np.zeros((1, *self.original_shape), np.uint8)
        words = np.zeros((WORDS, 1), np.uint64)
        try:
            channels, height, width = crop(image, np.zeros(1, np.int64), words).shape[1:]
        except ValueError:
            height = width = 0
        if (height, width) != (crop.size, crop.size):
            raise ValueError(
                f"{type(self).__name__}({argument}={crop}): it cannot crop images of shape {self.original_shape}; give "
                "a smaller size."
            )
        return channels, height, width

    def _images(self, split: Split) -> tuple[Images, Labels]:
        if split not in self._read:
            images, labels = self.source.read(split)
            self._check(split, images, labels)
            self._read[split] = images, labels
        return self._read[split]

    def _check(self, split: Split, images: Images, labels: Labels) -> None:
        what = f"{type(self).__name__}: the {'training' if split == 'train' else 'test'} set"
        if images.shape[1:] != self.original_shape:
            raise DataError(f"{what} has images of shape {images.shape[1:]} where {self.original_shape} is right")
        if len(images) != len(labels) or len(labels) == 0:
            raise DataError(f"{what} has {len(images)} images and {len(labels)} labels; get the files again")
        wrong = labels[(labels < 0) | (labels >= self.classes)]
        if len(wrong):
            raise DataError(f"{what} has the label {wrong[0]}; {self.facts.name} has {self.classes} classes, from 0")
        present = len(np.unique(labels))
        if split == "train" and present != self.classes:
            raise DataError(f"{what} has images of {present} classes; {self.facts.name} has {self.classes} classes")
