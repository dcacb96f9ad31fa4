"""The two convolutional networks of the EASGD paper, and two small ones for experiments on few cores."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions, then linear layers with ReLU; weights start as PyTorch initialises them.

    Args:
        image_shape: Shape (C, H, W) of an image.
        num_classes: Number of classes.
        features: The convolutions.
        hidden: Units of each hidden linear layer.
        dropout: Probability of dropout after each of them; None for no such layer.
        bias: Where all biases start; None: as PyTorch initialises them.

    Raises:
        ValueError: If the images are too small for the convolutions.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        features: Sequence[nn.Module],
        hidden: Sequence[int],
        *,
        dropout: float | None = None,
        bias: float | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.features = nn.Sequential(*features)
        layers: list[nn.Module] = [nn.Flatten()]
        width = self._feature_count()
        for units in hidden:
            layers += [nn.Linear(width, units), nn.ReLU(), *([] if dropout is None else [nn.Dropout(dropout)])]
            width = units
        self.head = nn.Sequential(*layers, nn.Linear(width, num_classes))
        for name, parameter in self.named_parameters():
            if bias is not None and name.endswith("bias"):
                nn.init.constant_(parameter, bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, *image_shape) to logits of shape (N, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def _feature_count(self) -> int:
        try:
            with torch.no_grad():
                remaining: Tensor = self.features(torch.zeros(1, *self.image_shape))
        except RuntimeError as error:
            raise ValueError(
                f"{type(self).__name__}(image_shape={list(self.image_shape)}): the convolutions leave nothing of such "
                f"images ({error}); use larger images or another network."
            ) from error
        return remaining.numel()


class ConvNet7(ConvNet):
    """The paper's 7-layer network for CIFAR (section 5): 351 946 parameters for 3x28x28 images and 10 classes.

    Convolution 5x5 (64), max pooling 2, convolution 5x5 (128), max pooling 2, convolution 3x3 (64), linear 256 with
    `dropout` of that probability, linear. No padding; ReLU; all biases start at 0.
    """

    def __init__(self, image_shape: Sequence[int] = (3, 28, 28), num_classes: int = 10, dropout: float = 0.5) -> None:
        features = [
            nn.Conv2d(image_shape[0], 64, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 64, kernel_size=3), nn.ReLU(),
        ]  # fmt: skip
        super().__init__(image_shape, num_classes, features, [256], dropout=dropout, bias=0.0)


class ConvNet11(ConvNet):
    """The paper's 11-layer network for ImageNet (section 5): 61 128 808 parameters for 3x221x221 and 1000 classes.

    Convolution 7x7 with stride 2 (96), max pooling 3, convolution 5x5 (256), max pooling 2, convolutions 3x3 (384), 2x2
    (384), 2x2 (256), max pooling 2, two linear layers of 4096 with `dropout` of that probability, linear. No padding;
    ReLU; all biases start at 0.1.
    """

    def __init__(
        self, image_shape: Sequence[int] = (3, 221, 221), num_classes: int = 1000, dropout: float = 0.5
    ) -> None:
        features = [
            nn.Conv2d(image_shape[0], 96, kernel_size=7, stride=2), nn.ReLU(), nn.MaxPool2d(3),
            nn.Conv2d(96, 256, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(256, 384, kernel_size=3), nn.ReLU(),
            nn.Conv2d(384, 384, kernel_size=2), nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=2), nn.ReLU(), nn.MaxPool2d(2),
        ]  # fmt: skip
        super().__init__(image_shape, num_classes, features, [4096, 4096], dropout=dropout, bias=0.1)


class StridedNet(ConvNet):
    """A network that learns CIFAR on a core or two: 89 834 parameters for 3x28x28 images and 10 classes.

    Three 3x3 convolutions with stride 2 and padding 1 (16, 32, 64 channels), linear 64, linear; ReLU. No BatchNorm and
    no pooling; 5 to 9 processor seconds for an epoch of CIFAR-10.

    Args:
        image_shape: Shape (C, H, W) of an image.
        num_classes: Number of classes.
        channels: Channels of the convolutions.
        hidden: Units of the hidden linear layer.
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (3, 28, 28),
        num_classes: int = 10,
        channels: Sequence[int] = (16, 32, 64),
        hidden: int = 64,
    ) -> None:
        features: list[nn.Module] = []
        for before, after in pairwise((image_shape[0], *channels)):
            features += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        super().__init__(image_shape, num_classes, features, [hidden])


class DigitsNet(ConvNet):
    """For 8x8 images: two 3x3 convolutions, the second with stride 2, and two linear layers.

    Args:
        width: Channels of the first convolution; the second has twice as many.
        hidden: Units of the hidden linear layer.
        num_classes: Number of classes.
        image_shape: Shape (C, H, W) of an image.
    """

    def __init__(
        self, width: int = 16, hidden: int = 64, num_classes: int = 10, image_shape: Sequence[int] = (1, 8, 8)
    ) -> None:
        features = [
            nn.Conv2d(image_shape[0], width, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1), nn.ReLU(),
        ]  # fmt: skip
        super().__init__(image_shape, num_classes, features, [hidden])
