"""The two convolutional networks of the EASGD paper, and a small one for experiments on few cores."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from lightning_easgd.lab.models.feature_count import feature_count


class ConvNet7(nn.Module):
    """The paper's 7-layer network for CIFAR (section 5): 351 946 parameters for 3x28x28 images and 10 classes.

    Convolution 5x5 (64), max pooling 2, convolution 5x5 (128), max pooling 2, convolution 3x3 (64), linear 256 with
    dropout, linear. No padding; ReLU; all biases start at 0, weights as PyTorch initialises them.

    Args:
        image_shape: Shape (C, H, W) of an image.
        num_classes: Number of classes.
        dropout: Probability of dropout at the input of the last layer.

    Raises:
        ValueError: If the images are too small for the convolutions.
    """

    def __init__(self, image_shape: Sequence[int] = (3, 28, 28), num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.features = nn.Sequential(
            nn.Conv2d(image_shape[0], 64, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 64, kernel_size=3),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(feature_count(self, self.features, image_shape), 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, num_classes),
        )
        _fill_biases(self, 0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images of shape (N, *image_shape) to logits of shape (N, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class ConvNet11(nn.Module):
    """The paper's 11-layer network for ImageNet (section 5): 61 128 808 parameters for 3x221x221 and 1000 classes.

    Convolution 7x7 with stride 2 (96), max pooling 3, convolution 5x5 (256), max pooling 2, convolutions 3x3 (384), 2x2
    (384), 2x2 (256), max pooling 2, two linear layers of 4096 with dropout, linear. No padding; ReLU; all biases start
    at 0.1, weights as PyTorch initialises them.

    Args:
        image_shape: Shape (C, H, W) of an image.
        num_classes: Number of classes.
        dropout: Probability of dropout after the two layers of 4096 units.

    Raises:
        ValueError: If the images are too small for the convolutions.
    """

    def __init__(
        self, image_shape: Sequence[int] = (3, 221, 221), num_classes: int = 1000, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.features = nn.Sequential(
            nn.Conv2d(image_shape[0], 96, kernel_size=7, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3),
            nn.Conv2d(96, 256, kernel_size=5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(256, 384, kernel_size=3),
            nn.ReLU(),
            nn.Conv2d(384, 384, kernel_size=2),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(feature_count(self, self.features, image_shape), 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        _fill_biases(self, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images of shape (N, *image_shape) to logits of shape (N, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class StridedNet(nn.Module):
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
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        for before, after in pairwise((image_shape[0], *channels)):
            layers += [nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(feature_count(self, self.features, image_shape), hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps images of shape (N, *image_shape) to logits of shape (N, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _fill_biases(network: nn.Module, value: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.constant_(module.bias, value)  # type: ignore[arg-type]  # all of these layers have one
