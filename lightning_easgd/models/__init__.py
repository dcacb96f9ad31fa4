"""Networks, and the module that trains them."""

from lightning_easgd.models.classifier import Classifier
from lightning_easgd.models.convnets import ConvNet7, ConvNet11, StridedNet
from lightning_easgd.models.digits_net import DigitsNet
from lightning_easgd.models.resnet import ImageNetStem, ResNet18, ResNet50, SmallImageStem

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
