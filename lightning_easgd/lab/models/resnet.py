"""Residual networks: K. He, X. Zhang, S. Ren, J. Sun, *Deep residual learning for image recognition*, 2016."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

from torch import Tensor, nn
from typing_extensions import override

STEM_WIDTH = 64


@final
class ImageNetStem(nn.Sequential):
    """A 7x7 convolution and a 3x3 max pooling, both with stride 2: a quarter of the height and width remains.

    Args:
        in_channels: Channels of an image.
    """

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__(
            nn.Conv2d(in_channels, STEM_WIDTH, kernel_size=7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(STEM_WIDTH),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )


@final
class SmallImageStem(nn.Sequential):
    """A 3x3 convolution that keeps height and width, for images as small as those of CIFAR.

    Args:
        in_channels: Channels of an image.
    """

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__(
            nn.Conv2d(in_channels, STEM_WIDTH, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(STEM_WIDTH),
            nn.ReLU(),
        )


class Block(nn.Module):
    """Convolutions and a shortcut; maps (N, in_channels, H, W) to (N, expansion x width, H / stride, W / stride).

    Args:
        in_channels: Channels of the input.
        width: Channels of the first convolution.
        stride: Stride of the first 3x3 convolution.
    """

    expansion: ClassVar[int]

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(*self.convolutions(in_channels, width, stride))
        out_channels = width * self.expansion
        unchanged = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity() if unchanged else nn.Sequential(*_convolution(in_channels, out_channels, 1, stride))
        )
        self.activation = nn.ReLU()

    @abstractmethod
    def convolutions(self, in_channels: int, width: int, stride: int) -> list[nn.Module]:
        """Return the layers beside the shortcut."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images to images."""
        outputs: Tensor = self.activation(self.residual(inputs) + self.shortcut(inputs))
        return outputs


@final
class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    @override
    def convolutions(self, in_channels: int, width: int, stride: int) -> list[nn.Module]:
        return [*_convolution(in_channels, width, 3, stride), nn.ReLU(), *_convolution(width, width, 3, 1)]


@final
class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolutions, of which the last has four times as many channels, and a shortcut.

    The 3x3 convolution has the stride, not the first one as in the paper: the usual variant ("v1.5"), about half a
    percent more accurate on ImageNet.
    """

    expansion = 4

    @override
    def convolutions(self, in_channels: int, width: int, stride: int) -> list[nn.Module]:
        return [
            *_convolution(in_channels, width, 1, 1), nn.ReLU(),
            *_convolution(width, width, 3, stride), nn.ReLU(),
            *_convolution(width, width * self.expansion, 1, 1),
        ]  # fmt: skip


class ResNet(nn.Module):
    """A stem, four stages of blocks (each but the first halves height and width), the spatial mean, a linear layer.

    Convolutions start normally distributed with variance 2 / fan-out (He et al., 2015), BatchNorm at the identity.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: Blocks of each stage.
        stem: Maps images to 64 channels: `ImageNetStem`, which None means, or `SmallImageStem`.
        num_classes: Number of classes.
    """

    def __init__(self, block: type[Block], depths: Sequence[int], stem: nn.Module | None, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = stem or ImageNetStem()
        stages: list[nn.Module] = []
        channels = STEM_WIDTH
        for stage, depth in enumerate(depths):
            width = STEM_WIDTH * 2**stage
            blocks: list[nn.Module] = []
            for index in range(depth):
                blocks.append(block(channels, width, stride=2 if stage > 0 and index == 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape (N, C, H, W) to logits of shape (N, num_classes)."""
        logits: Tensor = self.head(self.stages(self.stem(images)))
        return logits


@final
class ResNet18(ResNet):
    """18 layers: 11 689 512 parameters with the ImageNet stem and 1000 classes."""

    def __init__(self, stem: nn.Module | None = None, num_classes: int = 1000) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), stem, num_classes)


@final
class ResNet50(ResNet):
    """50 layers: 25 557 032 parameters with the ImageNet stem and 1000 classes."""

    def __init__(self, stem: nn.Module | None = None, num_classes: int = 1000) -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3), stem, num_classes)


def _convolution(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return (
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )
