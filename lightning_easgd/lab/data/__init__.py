"""Data modules, and how the workers share their training sets."""

from lightning_easgd.lab.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_easgd.lab.data.crops import CenterCrop, PadCropFlip, RandomCropFlip
from lightning_easgd.lab.data.digits import DigitsDataModule
from lightning_easgd.lab.data.errors import DataError
from lightning_easgd.lab.data.imagenet import ImageNetDataModule
from lightning_easgd.lab.data.jpeg_crops import RandomResizedCropFlip, ShortSideCenterCrop, ShortSideRandomCropFlip
from lightning_easgd.lab.data.mnist import FashionMNISTDataModule, MNISTDataModule
from lightning_easgd.lab.data.sampling import WorkerSampler
from lightning_easgd.sampling import DynamicShare

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CenterCrop",
    "DataError",
    "DigitsDataModule",
    "DynamicShare",
    "FashionMNISTDataModule",
    "ImageNetDataModule",
    "MNISTDataModule",
    "PadCropFlip",
    "RandomCropFlip",
    "RandomResizedCropFlip",
    "ShortSideCenterCrop",
    "ShortSideRandomCropFlip",
    "WorkerSampler",
]
