"""The served center of the asynchronous mode: every worker exchanges with it on its own clock."""

from lightning_easgd.served_center.compressed_link import LinkState
from lightning_easgd.served_center.in_process import InProcessCenter
from lightning_easgd.served_center.interface import CenterService, Pending
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.served_center.opening import open_center
from lightning_easgd.served_center.placed import ServedCenter
from lightning_easgd.served_center.shared_memory import SharedMemoryCenter
from lightning_easgd.transport.control import ControlPlane
from lightning_easgd.transport.errors import (
    CenterError,
    CenterTimeoutError,
    SharedMemoryUnavailableError,
    WorkerLostError,
)

__all__ = [
    "CenterError",
    "CenterService",
    "CenterTimeoutError",
    "ControlPlane",
    "InProcessCenter",
    "Layout",
    "LinkState",
    "Pending",
    "ServedCenter",
    "SharedMemoryCenter",
    "SharedMemoryUnavailableError",
    "WorkerLostError",
    "open_center",
]
