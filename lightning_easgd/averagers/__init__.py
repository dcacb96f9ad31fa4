"""When the workers and the center are averaged, and over which channel."""

from lightning_easgd.averagers.channel import Channel, ExchangeError, ProcessGroupChannel, Transfer
from lightning_easgd.averagers.line import ExchangeLine, Meeting, Statistics
from lightning_easgd.averagers.synchronous import SynchronousAverager

__all__ = [
    "Channel",
    "ExchangeError",
    "ExchangeLine",
    "Meeting",
    "ProcessGroupChannel",
    "Statistics",
    "SynchronousAverager",
    "Transfer",
]
