"""Networks, and the module that trains them."""

from lightning_easgd.lab.models.classifier import Classifier
from lightning_easgd.lab.models.convnets import ConvNet7, ConvNet11, DigitsNet, StridedNet
from lightning_easgd.lab.models.resnet import ImageNetStem, ResNet18, ResNet50, SmallImageStem

__all__ = [
    "Classifier",
    "ConvNet7",
    "ConvNet11",
    "DigitsNet",
    "ImageNetStem",
    "ResNet18",
    "ResNet50",
    "SmallImageStem",
    "StridedNet",
]
