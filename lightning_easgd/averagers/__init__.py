"""When the workers and the center are averaged, and over which channel."""

from lightning_easgd.averagers.astray import AstrayPolicy, FailIfAstray, NonFiniteError, ResetIfAstray
from lightning_easgd.averagers.asynchronous import AsynchronousAverager, elastic_rule
from lightning_easgd.averagers.base import Averager, Averaging
from lightning_easgd.averagers.channel import Channel, ExchangeError, ProcessGroupChannel, Transfer
from lightning_easgd.averagers.downpour import DownpourAverager
from lightning_easgd.averagers.line import ExchangeLine, Meeting, Statistics, WorkersStoppedError
from lightning_easgd.averagers.loss_policy import ContinueOnLoss, FailOnLoss, LossPolicy
from lightning_easgd.averagers.message_channel import MessageChannel, ProcessGroupMessageChannel
from lightning_easgd.averagers.served import ServedAverager
from lightning_easgd.averagers.serving import ServedAveraging, free_order, round_robin
from lightning_easgd.averagers.shared_channel import SharedChannel
from lightning_easgd.averagers.sharing import shared_channel
from lightning_easgd.averagers.sums import MakeSum, all_reduced_sums, compressed_sums, shared_sums
from lightning_easgd.averagers.synchronous import SynchronousAverager, SynchronousAveraging

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
    "elastic_rule",
    "free_order",
    "round_robin",
    "shared_channel",
    "shared_sums",
]
