"""Images in folders, one folder for each class, decoded when they are drawn."""

import os
import random
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.images import Normalise
from lightning_easgd.lab.data.jpeg_crops import ImageCrop
from lightning_easgd.lab.data.randomness import random_words

OnCorrupt: TypeAlias = Literal["raise", "skip"]
Sample: TypeAlias = tuple[NDArray[np.uint8], int]

_SUFFIXES = (".jpeg", ".jpg")


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted.

    Raises:
        DataError: If it does not exist.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror}; root (data.root) is the folder that holds train/<class>/*.JPEG and val"
        ) from error


def image_files(folder: Path) -> list[str]:
    """Return the names of the JPEG files in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.lower().endswith(_SUFFIXES))


def list_images(folder: Path, classes: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """List the images of some classes.

    Args:
        folder: Holds one folder for each class.
        classes: Their names; the position in this list is the label.

    Returns:
        Paths below `folder`, and labels.

    Raises:
        DataError: If a class has no images.
    """
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = image_files(folder / name)
        if not files:
            raise DataError(f"{folder / name}: there is no JPEG file in this class's folder; unpack it again")
        names += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
    return names, np.asarray(labels, np.int64)


@final
class ImageFiles(Dataset[Sample | None]):
    """Images that are decoded and cropped when drawn, indexed by keys (see :class:`EpochKeys`).

    A sample is the crop, uint8 of shape (size, size, 3), and its label; None for a file that cannot be decoded, with
    `on_corrupt="skip"`.

    Args:
        folder: Where the files lie.
        names: Their paths below it.
        labels: int64, shape (N,).
        crop: Makes a square of each image.
        stream: Number of the stream of random words.
        on_corrupt: "raise" an error that names a file that cannot be decoded, or "skip" it with a warning.

    Raises:
        DataError: When a file is drawn that cannot be decoded, with `on_corrupt="raise"`.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: NDArray[np.int64],
        crop: ImageCrop,
        stream: int = 0,
        on_corrupt: OnCorrupt = "raise",
    ) -> None:
        self.folder = folder
        # One array: a list of a million strings would be copied into every loader process as it is looked at.
        self._names = np.asarray([os.fsencode(name) for name in names])
        self.labels = labels
        self.crop = crop
        self.stream = stream
        self.on_corrupt = on_corrupt

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int) -> Sample | None:
        from PIL import Image  # noqa: PLC0415  # an extra, needed only where images are decoded

        row = key % len(self)
        path = self.folder / os.fsdecode(self._names[row])
        chance = random.Random(int(random_words(self.stream, np.asarray([key], np.int64), 1)[0, 0]))
        try:
            with Image.open(path) as image:
                pixels = self.crop(image.convert("RGB"), chance)
        # What Pillow raises for damaged files; UnidentifiedImageError is an OSError.
        except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
            if self.on_corrupt == "raise":
                raise DataError(
                    f"{path}: this image cannot be decoded ({error}); replace or remove it, or set on_corrupt=skip"
                ) from error
            warnings.warn(f"{path}: this image cannot be decoded ({error}) and is skipped", stacklevel=2)
            return None
        return np.asarray(pixels), int(self.labels[row])

    def collate(self, normalise: Normalise) -> Callable[[list[Sample | None]], tuple[Tensor, Tensor]]:
        """Return what makes a batch of samples: images float32 (N, 3, size, size), labels int64 (N,)."""
        return partial(_batch, normalise)  # not a closure, as it travels to the loader processes


def _batch(normalise: Normalise, samples: list[Sample | None]) -> tuple[Tensor, Tensor]:
    """A batch without the samples that were skipped."""
    whole = [sample for sample in samples if sample is not None]
    if not whole:
        raise DataError(
            f"none of the {len(samples)} images of a batch can be decoded: the data set is damaged; unpack it again"
        )
    images, labels = zip(*whole, strict=True)
    return normalise(np.stack([image.transpose(2, 0, 1) for image in images])), torch.tensor(labels)
