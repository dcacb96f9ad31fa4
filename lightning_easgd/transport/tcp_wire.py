"""What travels on a connection: fixed headers and raw numbers, nothing that would be executed."""

import errno
import socket
import struct
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FAILED",
    "FAILED_BY_TIMEOUT",
    "GREETING",
    "READS",
    "REPLY_SIZE",
    "REQUEST_SIZE",
    "ConnectionLostError",
    "Operation",
    "Reply",
    "Request",
    "StalledError",
    "as_bytes",
    "configure",
    "receive_into",
    "send",
]

GREETING = struct.Struct("<16sI")
"""What a client says first: the run's secret, and its rank."""

FAILED_BY_TIMEOUT = 1
FAILED = 2

_REQUEST = struct.Struct("<HHIqd")
_REPLY = struct.Struct("<Bqq")
REQUEST_SIZE = _REQUEST.size
REPLY_SIZE = _REPLY.size


class ConnectionLostError(Exception):
    """The other end is gone, or its connection is of no more use."""


class StalledError(ConnectionLostError):
    """The other end still holds the connection, but has not moved a byte for the timeout."""


class Operation(IntEnum):
    """What a client asks for."""

    EXCHANGE = 1
    READ = 2
    WRITE = 3
    LEAVE = 4
    EXCHANGE_ROUNDED = 5
    SET_REFERENCE = 6
    READ_RESIDUAL = 7
    SET_RESIDUAL = 8


READS = frozenset({Operation.READ, Operation.READ_RESIDUAL})
"""The operations without numbers in the request; their answers have them."""


class Request(NamedTuple):
    """The header of a request; unless it reads, the chunk's numbers follow, or a rounded message."""

    operation: int
    store: int
    chunk: int
    version: int
    rate: float

    def pack(self) -> bytes:
        """The header as bytes."""
        return _REQUEST.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "Request":
        """The header in these bytes."""
        return cls(*_REQUEST.unpack(data))


class Reply(NamedTuple):
    """The header of a reply; followed by ``size`` bytes: the chunk's numbers, or the text of an error."""

    failed: int
    version: int
    size: int

    def pack(self) -> bytes:
        """The header as bytes."""
        return _REPLY.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> "Reply":
        """The header in these bytes."""
        return cls(*_REPLY.unpack(data))


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().view(torch.uint8).numpy().data


def configure(connection: socket.socket, timeout: float) -> None:
    """Set up a connection: no delay, a bounded wait for progress, and notice of a vanished host.

    The timeout is the kernel's (``SO_RCVTIMEO``): Python's own would poll before every call and cut large transfers
    into small reads.
    """
    connection.settimeout(None)
    wait = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


def send(connection: socket.socket, header: bytes, payload: memoryview | bytes = b"") -> None:
    """Send a header and its payload.

    Raises:
        ConnectionLostError: If the other end is gone, or takes nothing for the timeout.
    """
    try:
        sent = connection.sendmsg([header, payload])
        if sent < len(header):
            connection.sendall(header[sent:])
            sent = len(header)
        if sent < len(header) + len(payload):
            connection.sendall(memoryview(payload)[sent - len(header) :])
    except OSError as error:
        raise _lost(error) from error


def receive_into(connection: socket.socket, buffer: memoryview, *, idle: bool = False) -> None:
    """Fill a buffer.

    Args:
        connection: Where from.
        buffer: What to fill.
        idle: Whether the first byte may take for ever.

    Raises:
        ConnectionLostError: If the other end is gone, or sends nothing for the timeout.
    """
    filled = 0
    while filled < len(buffer):
        try:
            count = connection.recv_into(buffer[filled:], flags=socket.MSG_WAITALL)
        except OSError as error:
            lost = _lost(error)
            if isinstance(lost, StalledError) and idle and filled == 0:
                continue
            raise lost from error
        if count == 0:
            raise ConnectionLostError("it has closed the connection")
        filled += count


def _lost(error: OSError) -> ConnectionLostError:
    if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
        return StalledError("nothing has moved within the timeout")
    return ConnectionLostError((error.strerror or str(error)).lower())
