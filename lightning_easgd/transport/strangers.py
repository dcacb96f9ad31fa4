"""Connections that have not said yet who they are: few at a time, for a short time, without a thread of their own."""

import hmac
import select
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from lightning_easgd.transport.tcp_wire import GREETING

__all__ = ["Strangers"]

GREETING_TIMEOUT = 10.0  # seconds
MOST_STRANGERS = 64

_PAUSE = 0.01  # seconds


@final
class Strangers:
    """Accepts connections, and hands on those that greet with the secret.

    A rank greets as soon as it is connected. So where there are too many that say nothing the oldest one goes, and
    never the newcomer; and each goes when its time is up.

    Args:
        listener: Where they come; it is made non-blocking.
        secret: The run's 16 bytes.
    """

    def __init__(self, listener: socket.socket, secret: bytes) -> None:
        self._listener = listener
        self._secret = secret
        self._waiting: dict[int, _Stranger] = {}  # by descriptor, the oldest first
        self._stirred = True
        listener.setblocking(False)

    @property
    def may_come(self) -> bool:
        """Whether somebody waits here, or came when it was last looked."""
        return self._stirred or bool(self._waiting)

    def welcome(self, seconds: float) -> Iterator[tuple[socket.socket, int]]:
        """Wait for something to happen, at most so long; the connections that have greeted now, with their ranks."""
        poll = select.poll()
        for descriptor in (self._listener.fileno(), *self._waiting):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(1000 * seconds)}
        self._stirred = bool(ready)
        self._turn_away_the_late()
        for descriptor in ready & self._waiting.keys():
            yield from self._listen(descriptor)
        if self._listener.fileno() in ready:
            self._admit()

    def close(self) -> None:
        """Turn all away."""
        while self._waiting:
            self._turn_away(next(iter(self._waiting)))

    def _admit(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # nobody there after all, or no descriptor is free
            time.sleep(_PAUSE)
            return
        connection.setblocking(False)
        self._waiting[connection.fileno()] = _Stranger(connection, time.monotonic() + GREETING_TIMEOUT)
        if len(self._waiting) > MOST_STRANGERS:
            self._turn_away(next(iter(self._waiting)))

    def _listen(self, descriptor: int) -> Iterator[tuple[socket.socket, int]]:
        stranger = self._waiting[descriptor]
        try:
            said = stranger.connection.recv(GREETING.size - len(stranger.said))
        except BlockingIOError:
            return
        except OSError:
            said = b""
        stranger.said += said
        if len(stranger.said) == GREETING.size:
            secret, rank = GREETING.unpack(stranger.said)
            if hmac.compare_digest(secret, self._secret):
                del self._waiting[descriptor]
                yield stranger.connection, int(rank)
                return
        elif said:
            return
        self._turn_away(descriptor)

    def _turn_away_the_late(self) -> None:
        now = time.monotonic()
        for descriptor in [each for each, stranger in self._waiting.items() if now > stranger.deadline]:
            self._turn_away(descriptor)

    def _turn_away(self, descriptor: int) -> None:
        self._waiting.pop(descriptor).connection.close()


@final
@dataclass
class _Stranger:
    connection: socket.socket
    deadline: float
    said: bytearray = field(default_factory=bytearray)
