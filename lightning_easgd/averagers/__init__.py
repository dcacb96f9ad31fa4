"""When the workers and the center are averaged, and over which channel."""

from lightning_easgd.averagers.base import Averager, Averaging
from lightning_easgd.averagers.channel import Channel, ExchangeError, ProcessGroupChannel, Transfer
from lightning_easgd.averagers.line import ExchangeLine, Meeting, Statistics
from lightning_easgd.averagers.synchronous import SynchronousAverager, SynchronousAveraging

__all__ = [
    "Averager",
    "Averaging",
    "Channel",
    "ExchangeError",
    "ExchangeLine",
    "Meeting",
    "ProcessGroupChannel",
    "Statistics",
    "SynchronousAverager",
    "SynchronousAveraging",
    "Transfer",
]
