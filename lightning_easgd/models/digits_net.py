"""A small convolutional network for 8x8 images."""

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """Two 3x3 convolutions, the second with stride 2, and two linear layers.

    Args:
        width: Channels of the first convolution; the second has twice as many.
        hidden: Units of the hidden linear layer.
        num_classes: Number of classes.
    """

    def __init__(self, width: int = 16, hidden: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps images of shape (N, 1, 8, 8) to logits of shape (N, num_classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits
