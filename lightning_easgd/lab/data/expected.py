"""What a model is built for, compared with what the data are."""

from collections.abc import Sequence
from typing import Protocol


class ImageData(Protocol):
    """A data module of images."""

    num_classes: int
    image_shape: tuple[int, int, int]


def check_expected(data: ImageData, num_classes: int | None, image_shape: Sequence[int] | None) -> None:
    """Compares what the configuration tells the model about the data with the data themselves.

    Args:
        data: The data module.
        num_classes: Number of classes of the model; None compares nothing.
        image_shape: Shape (C, H, W) of the model's input; None compares nothing.

    Raises:
        ValueError: If they differ.
    """
    name = type(data).__name__
    if num_classes is not None and num_classes != data.num_classes:
        raise ValueError(
            f"{name}(num_classes={num_classes}): these data have {data.num_classes} classes; the model takes its number"
            f" of classes from here, so give num_classes={data.num_classes}."
        )
    if image_shape is not None and tuple(image_shape) != data.image_shape:
        raise ValueError(
            f"{name}(image_shape={list(image_shape)}): the batches have images of shape {list(data.image_shape)}; the "
            "model takes its input shape from here, so give that one, or other transforms."
        )
