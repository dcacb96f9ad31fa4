"""Crops and flips of single images of any size, as they come out of JPEG files."""

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, final

from typing_extensions import override

if TYPE_CHECKING:
    from PIL.Image import Image

Box: TypeAlias = tuple[float, float, float, float]

_TRIES = 10


class ImageCrop(Protocol):
    """Makes a square of an image of any size."""

    @property
    def size(self) -> int:
        """Height and width of the result, pixels."""

    def __call__(self, image: "Image", chance: random.Random) -> "Image":
        """Return an image of `size` x `size` pixels.

        Args:
            image: An RGB image.
            chance: Where random numbers come from; a crop without chance ignores it.
        """


@dataclass(frozen=True)
class _ShortSideCrop(ABC):
    """A crop of the image that is scaled to a given short side.

    Args:
        size: Height and width of the crop, pixels.
        short_side: Smaller of height and width that the image is scaled to.
    """

    size: int
    short_side: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.short_side:
            raise ValueError(
                f"{type(self).__name__}(size={self.size}, short_side={self.short_side}): the crop does not fit into the"
                " scaled image; give a size from 1 to short_side."
            )

    @abstractmethod
    def __call__(self, image: "Image", chance: random.Random) -> "Image":
        """Return the crop: see :class:`ImageCrop`."""


@final
class ShortSideCenterCrop(_ShortSideCrop):
    """The center of the image."""

    @override
    def __call__(self, image: "Image", chance: random.Random) -> "Image":
        width, height = _scaled(image, self.short_side)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        return _scaled_crop(image, (width, height), left, top, self.size)


@final
class ShortSideRandomCropFlip(_ShortSideCrop):
    """A random crop, mirrored with probability 1/2: from 256 to 221 pixels the augmentation of the EASGD paper."""

    @override
    def __call__(self, image: "Image", chance: random.Random) -> "Image":
        width, height = _scaled(image, self.short_side)
        left, top = chance.randint(0, width - self.size), chance.randint(0, height - self.size)
        return _maybe_mirrored(_scaled_crop(image, (width, height), left, top, self.size), chance)


@final
@dataclass(frozen=True)
class RandomResizedCropFlip:
    """A part of random area and aspect ratio, scaled to a square, mirrored with probability 1/2.

    From C. Szegedy et al., *Going deeper with convolutions*, 2015, section 6; the usual augmentation of ImageNet. The
    aspect ratio is log-uniform. Where no part of the drawn shape fits after 10 tries, it is the largest central part of
    an allowed aspect ratio.

    Args:
        size: Height and width of the result, pixels.
        min_area: Smallest share of the image's area.
        max_ratio: Largest ratio of the two sides of the part.
    """

    size: int
    min_area: float = 0.08
    max_ratio: float = 4 / 3

    def __call__(self, image: "Image", chance: random.Random) -> "Image":
        """Return the crop: see :class:`ImageCrop`."""
        return _maybe_mirrored(_resized(image, self.size, self._part(image, chance)), chance)

    def _part(self, image: "Image", chance: random.Random) -> Box:
        width, height = image.size
        bound = math.log(self.max_ratio)
        for _ in range(_TRIES):
            area = width * height * chance.uniform(self.min_area, 1)
            ratio = math.exp(chance.uniform(-bound, bound))
            part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < part_width <= width and 0 < part_height <= height:
                left, top = chance.randint(0, width - part_width), chance.randint(0, height - part_height)
                return left, top, left + part_width, top + part_height
        part_width = min(width, round(height * self.max_ratio))
        part_height = min(height, round(width * self.max_ratio))
        left, top = (width - part_width) // 2, (height - part_height) // 2
        return left, top, left + part_width, top + part_height


def _scaled(image: "Image", short_side: int) -> tuple[int, int]:
    width, height = image.size
    if width <= height:
        return short_side, max(short_side, int(short_side * height / width))
    return max(short_side, int(short_side * width / height)), short_side


def _scaled_crop(image: "Image", scaled: tuple[int, int], left: int, top: int, size: int) -> "Image":
    # Scaling only the part that is kept gives what scaling the whole image and cropping it gives, up to rounding.
    across, down = image.size[0] / scaled[0], image.size[1] / scaled[1]
    return _resized(image, size, (left * across, top * down, (left + size) * across, (top + size) * down))


def _resized(image: "Image", size: int, box: Box) -> "Image":
    from PIL.Image import Resampling  # noqa: PLC0415  # an extra, needed only where images are decoded

    width, height = image.size
    inside = (box[0], box[1], min(box[2], width), min(box[3], height))  # not over the edge by a rounding error
    return image.resize((size, size), Resampling.BILINEAR, inside)


def _maybe_mirrored(image: "Image", chance: random.Random) -> "Image":
    from PIL.Image import Transpose  # noqa: PLC0415

    return image.transpose(Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else image
