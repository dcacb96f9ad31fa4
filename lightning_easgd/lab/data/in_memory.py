"""Data sets of small images that live decoded in memory and are augmented a batch at a time."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, Unpack, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_easgd.lab.data.crops import WORDS, BatchCrop, CenterCrop, Images
from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.images import Batches, ImageArguments, ImageDataModule, Normalise, Rows, Split
from lightning_easgd.lab.data.randomness import random_words
from lightning_easgd.lab.data.sampling import keep_batch

Labels: TypeAlias = NDArray[np.int64]


class Source(Protocol):
    """The files of a data set in their official format."""

    def prepare(self, *, download: bool, verify: bool) -> None:
        """Make sure that the files are there, if need be by a download, and if asked to that they are the published.

        Raises:
            DataError: If a file is missing or another one than was published.
        """

    def check(self) -> None:
        """Look whether all files are there.

        Raises:
            DataError: If one is missing.
        """

    def read(self, split: Split) -> tuple[Images, Labels]:
        """Return images, uint8 (N, C, H, W), and labels.

        Raises:
            DataError: If a file is missing or torn.
        """


@final
@dataclass(eq=False)
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

    images: Images
    labels: Labels
    rows: Rows
    crop: BatchCrop
    normalise: Normalise
    stream: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([key])
        return images[0], labels[0]

    def __getitems__(self, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the images and labels of one batch, already collated; `DataLoader` prefers this method."""
        numbers = np.asarray(keys, np.int64)
        rows = self.rows[numbers % len(self)]
        crops = self.crop(self.images, rows, random_words(self.stream, numbers, WORDS))
        return self.normalise(crops), torch.from_numpy(self.labels[rows])


class InMemoryDataModule(ImageDataModule):
    """A data set of small images, read from its official files.

    Args:
        root: Folder that the data set lies in or is downloaded to.
        download: Whether to fetch the data set where it is missing. Nothing is ever overwritten.
        verify: Whether files are compared with their published checksums, once on each node; False warns.
        url: Folder of the download; None: the authors' site or the usual mirror.
        **images: See :class:`ImageDataModule`.

    Raises:
        ValueError: If an argument is unknown or does not fit the images.
        DataError: In `prepare_data` and `setup`, if files are missing, torn, of the wrong shape or number of classes.
    """

    classes: ClassVar[int]
    original_shape: ClassVar[tuple[int, int, int]]
    center_crop = CenterCrop

    def __init__(
        self,
        root: str | Path = "data",
        *,
        download: bool = False,
        verify: bool = True,
        url: str | None = None,
        **images: Unpack[ImageArguments],
    ) -> None:
        self.num_classes = self.classes
        super().__init__(**images)
        self.download = download
        self.verify = verify
        self.source = self.make_source(Path(root), url)
        self._read: dict[Split, tuple[Images, Labels]] = {}

    @abstractmethod
    def make_source(self, root: Path, url: str | None) -> Source:
        """Return what reads the data set's files."""

    @override
    def check_files(self) -> None:
        if not self.download:
            self.source.check()

    @override
    def prepare_data(self) -> None:
        """Download what is missing, if asked to, and compare checksums; Lightning calls it once on each node."""
        self.source.prepare(download=self.download, verify=self.verify)

    @override
    def labels(self, split: Split) -> Labels:
        return self._images(split)[1]

    def _images(self, split: Split) -> tuple[Images, Labels]:
        if split not in self._read:
            images, labels = self.source.read(split)
            self._check(split, images, labels)
            self._read[split] = images, labels
        return self._read[split]

    @override
    def batches(self, split: Split, rows: Rows, crop: BatchCrop, stream: int) -> Batches:
        return ImageBatches(*self._images(split), rows, crop, self.normalise, stream), keep_batch

    @override
    def cropped_shape(self, name: str) -> tuple[int, int, int]:
        """Try a transform on an empty image."""
        crop = getattr(self, name)
        image = np.zeros((1, *self.original_shape), np.uint8)
        words = np.zeros((WORDS, 1), np.uint64)
        try:
            channels, height, width = crop(image, np.zeros(1, np.int64), words).shape[1:]
        except ValueError:
            height = width = 0
        if (height, width) != (crop.size, crop.size):
            raise ValueError(
                f"{type(self).__name__}({name}={crop}): it cannot crop images of shape {self.original_shape}; give "
                "a smaller size."
            )
        return channels, height, width

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
