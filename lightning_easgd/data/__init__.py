"""Data modules, and how the workers share their training sets."""

from lightning_easgd.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_easgd.data.crops import CenterCrop, PadCropFlip, RandomCropFlip
from lightning_easgd.data.digits import DigitsDataModule
from lightning_easgd.data.dynamic_share import DynamicShare
from lightning_easgd.data.errors import DataError
from lightning_easgd.data.imagenet import ImageNetDataModule
from lightning_easgd.data.jpeg_crops import RandomResizedCropFlip, ShortSideCenterCrop, ShortSideRandomCropFlip
from lightning_easgd.data.mnist import FashionMNISTDataModule, MNISTDataModule
from lightning_easgd.data.sampling import WorkerSampler

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
