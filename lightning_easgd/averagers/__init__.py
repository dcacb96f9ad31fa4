"""When the workers and the center are averaged, and over which channel."""

from lightning_easgd.averagers.astray import AstrayPolicy, FailIfAstray, NonFiniteError, ResetIfAstray
from lightning_easgd.averagers.averager import Averager, Averaging
from lightning_easgd.averagers.exchange_order import ExchangeLine, Meeting, Statistics, WorkersStoppedError
from lightning_easgd.averagers.served.averager import ServedAverager
from lightning_easgd.averagers.served.averaging import ServedAveraging, free_order, round_robin
from lightning_easgd.averagers.served.downpour import DownpourAverager
from lightning_easgd.averagers.served.easgd import AsynchronousAverager, elastic_exchange
from lightning_easgd.averagers.served.loss_policy import ContinueOnLoss, FailOnLoss, LossPolicy
from lightning_easgd.averagers.sync.averager import SynchronousAverager
from lightning_easgd.averagers.sync.averaging import SynchronousAveraging
from lightning_easgd.averagers.sync.choice import MakeSum, all_reduced_sums, compressed_sums, shared_sums
from lightning_easgd.transport.channel import (
    Channel,
    ExchangeError,
    MessageChannel,
    ProcessGroupChannel,
    ProcessGroupMessageChannel,
    Transfer,
)
from lightning_easgd.transport.shared_channel import SharedChannel, shared_channel

__all__ = [
    "AstrayPolicy",
    "AsynchronousAverager",
    "Averager",
    "Averaging",
    "Channel",
    "ContinueOnLoss",
    "DownpourAverager",
    "ExchangeError",
    "ExchangeLine",
    "FailIfAstray",
    "FailOnLoss",
    "LossPolicy",
    "MakeSum",
    "Meeting",
    "MessageChannel",
    "NonFiniteError",
    "ProcessGroupChannel",
    "ProcessGroupMessageChannel",
    "ResetIfAstray",
    "ServedAverager",
    "ServedAveraging",
    "SharedChannel",
    "Statistics",
    "SynchronousAverager",
    "SynchronousAveraging",
    "Transfer",
    "WorkersStoppedError",
    "all_reduced_sums",
    "compressed_sums",
    "elastic_exchange",
    "free_order",
    "round_robin",
    "shared_channel",
    "shared_sums",
]
