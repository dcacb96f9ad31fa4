"""The served center of the asynchronous mode: every worker exchanges with it on its own clock."""

from lightning_easgd.service.control import ControlPlane
from lightning_easgd.service.errors import (
    CenterError,
    CenterTimeoutError,
    SharedMemoryUnavailableError,
    WorkerLostError,
)
from lightning_easgd.service.in_process import InProcessCenter
from lightning_easgd.service.interface import CenterService, Pending
from lightning_easgd.service.layout import Layout
from lightning_easgd.service.opening import open_center
from lightning_easgd.service.placed import ServedCenter
from lightning_easgd.service.rules import (
    AsymmetricElasticRule,
    AveragedRule,
    AveragingRate,
    CenterRule,
    ConstantRate,
    DownpourRule,
    ElasticRule,
    NesterovDownpourRule,
    PolyakRate,
)
from lightning_easgd.service.shared_memory import SharedMemoryCenter

__all__ = [
    "AsymmetricElasticRule",
    "AveragedRule",
    "AveragingRate",
    "CenterError",
    "CenterRule",
    "CenterService",
    "CenterTimeoutError",
    "ConstantRate",
    "ControlPlane",
    "DownpourRule",
    "ElasticRule",
    "InProcessCenter",
    "Layout",
    "NesterovDownpourRule",
    "Pending",
    "PolyakRate",
    "ServedCenter",
    "SharedMemoryCenter",
    "SharedMemoryUnavailableError",
    "WorkerLostError",
    "open_center",
]
