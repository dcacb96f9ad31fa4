"""A small convolutional network for 8x8 images."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_easgd.lab.models.feature_count import feature_count


class DigitsNet(nn.Module):
    """Two 3x3 convolutions, the second with stride 2, and two linear layers.

    Args:
        width: Channels of the first convolution; the second has twice as many.
        hidden: Units of the hidden linear layer.
        num_classes: Number of classes.
        image_shape: Shape (C, H, W) of an image.
    """

    def __init__(
        self, width: int = 16, hidden: int = 64, num_classes: int = 10, image_shape: Sequence[int] = (1, 8, 8)
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.features = nn.Sequential(
            nn.Conv2d(image_shape[0], width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
        )
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
