"""Crops and flips of whole batches of images that are in memory."""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from lightning_easgd.lab.data.randomness import below

Images: TypeAlias = NDArray[np.uint8]
Rows: TypeAlias = NDArray[np.int64]
Words: TypeAlias = NDArray[np.uint64]

WORDS = 3  # random words that a crop may use for each image


class BatchCrop(Protocol):
    """Takes a batch out of a data set and crops it."""

    @property
    def size(self) -> int:
        """Height and width of the crops, pixels."""

    def __call__(self, images: Images, rows: Rows, words: Words) -> Images:
        """Return the crops.

        Args:
            images: The whole data set, uint8 of shape (N, C, H, W).
            rows: Which images, shape (B,).
            words: Random bits, shape (3, B); a crop without chance ignores them.

        Returns:
            uint8 of shape (B, C, size, size).
        """


@final
@dataclass(frozen=True)
class CenterCrop:
    """The middle of each image; as large as the image it changes nothing.

    Args:
        size: Height and width of the crop, pixels.
    """

    size: int

    def __call__(self, images: Images, rows: Rows, words: Words) -> Images:  # noqa: ARG002
        """Return the crops: see :class:`BatchCrop`."""
        top, left = ((extent - self.size) // 2 for extent in images.shape[2:])
        return images[rows, :, top : top + self.size, left : left + self.size]


@final
@dataclass(frozen=True)
class RandomCropFlip:
    """A random crop, mirrored with probability 1/2: 28x28 from CIFAR's 32x32 in the EASGD paper.

    Args:
        size: Height and width of the crop, pixels.
    """

    size: int

    def __call__(self, images: Images, rows: Rows, words: Words) -> Images:
        """Return the crops: see :class:`BatchCrop`."""
        return _flipped(_random_windows(images, rows, self.size, words), words)


@final
@dataclass(frozen=True)
class PadCropFlip:
    """A random crop of the image in a black frame, mirrored with probability 1/2.

    With a frame of 4 pixels it is the usual augmentation of CIFAR (He et al., *Deep residual learning for image
    recognition*, 2016, section 4.2).

    Args:
        size: Height and width of the crop, pixels; usually that of the image.
        padding: Width of the frame, pixels.
    """

    size: int
    padding: int = 4

    def __call__(self, images: Images, rows: Rows, words: Words) -> Images:
        """Return the crops: see :class:`BatchCrop`."""
        height, width = images.shape[2:]
        frame = self.padding
        framed = np.zeros((len(rows), images.shape[1], height + 2 * frame, width + 2 * frame), np.uint8)
        framed[:, :, frame : frame + height, frame : frame + width] = images[rows]
        return _flipped(_random_windows(framed, np.arange(len(rows)), self.size, words), words)


def _random_windows(images: Images, rows: Rows, size: int, words: Words) -> Images:
    # A view of every window of every image: one indexing operation then copies the batch's, and nothing else.
    windows: NDArray[Any] = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(2, 3))
    tops, lefts = (below(word, choices) for word, choices in zip(words, windows.shape[2:4], strict=False))
    return windows[rows, :, tops, lefts]


def _flipped(crops: Images, words: Words) -> Images:
    mirrored = below(words[2], 2).astype(bool)
    crops[mirrored] = crops[mirrored, :, :, ::-1]
    return crops
