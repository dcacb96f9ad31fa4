"""How many features convolutions leave of an image."""

from collections.abc import Sequence

import torch
from torch import nn


def feature_count(owner: nn.Module, features: nn.Module, image_shape: Sequence[int]) -> int:
    """Returns the number of values that `features` makes of one image.

    Args:
        owner: The network that is being built, for the message.
        features: Its convolutions.
        image_shape: Shape (C, H, W) of an image.

    Raises:
        ValueError: If images of that shape are too small for the convolutions.
    """
    try:
        with torch.no_grad():
            remaining: torch.Tensor = features(torch.zeros(1, *image_shape))
    except RuntimeError as error:
        raise ValueError(
            f"{type(owner).__name__}(image_shape={list(image_shape)}): the convolutions leave nothing of such images "
            f"({error}); use larger images or another network."
        ) from error
    return remaining.numel()
