"""Data modules, and how the workers share their training sets."""

from lightning_easgd.data.digits import DigitsDataModule
from lightning_easgd.data.dynamic_share import DynamicShare
from lightning_easgd.data.sampling import WorkerSampler

__all__ = ["DigitsDataModule", "DynamicShare", "WorkerSampler"]
