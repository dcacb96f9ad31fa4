"""Connections of every worker with every other, and the one thread of a worker that moves the bytes on all of them."""

import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import final

from typing_extensions import override

from lightning_easgd.transport.channel import ExchangeError, Failure, MessageTransfer
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.waiting import wait_until

__all__ = ["LANES", "Mesh", "Messages"]

LANES = 2
"""Connections of each pair; what goes one way through one of them arrives in the order in which it was posted."""

Messages = Mapping[int, memoryview]

_LENGTH = struct.Struct("<q")
_LOOK = 0.02  # seconds
_LONGEST_GOODBYE = 1.0  # seconds


@final
class Mesh(ForkAware):
    """What connects a worker with all others: :data:`LANES` connections to each, and a thread.

    A message is its length and its bytes. It is received into the memory that was posted for it; until that is posted
    it stays in the kernel, whose buffers fill up, and the sender waits. So nothing is copied, and one who is far ahead
    is held up without a word.

    Args:
        rank: This worker's number.
        links: The connections, by worker and lane.
        failure: What the error of a transfer says.

    Attributes:
        rank: As given.
        size: How many workers there are.
        failure: As given.
        error: What has ended the mesh; None while it works.
    """

    def __init__(self, rank: int, links: Mapping[tuple[int, int], socket.socket], failure: Failure) -> None:
        super().__init__()
        self.rank = rank
        self.size = 1 + len(links) // LANES
        self.failure = failure
        self.error: Exception | None = None
        self._links = {place: _Link(place[0], connection) for place, connection in links.items()}
        self._posted: deque[tuple[int, Messages, Messages, _MeshTransfer]] = deque()
        self._closing = False
        self._bell, self._ringer = socket.socketpair()
        for each in (self._bell, self._ringer, *links.values()):
            each.setblocking(False)
        self._thread = threading.Thread(target=self._work, name="easgd-mesh", daemon=True)
        self._thread.start()

    def post(
        self,
        lane: int,
        sends: Messages,
        receives: Messages,
        then: Callable[[], MessageTransfer | None] | None = None,
    ) -> MessageTransfer:
        """Send to and receive from all others; returns at once. All workers post the same on a lane in the same order.

        Args:
            lane: Through which connections.
            sends: What each of the others gets; it is read until the transfer is over.
            receives: Where what each of the others sends is put.
            then: Called by the mesh's thread when all messages are there. A transfer that it posts and returns belongs
                to this one, which is over when that is.
        """
        transfer = _MeshTransfer(self, len(sends) + len(receives), then)
        self._posted.append((lane, sends, receives, transfer))
        if threading.current_thread() is not self._thread:
            self._ring()
        return transfer

    def fail(self, error: Exception) -> None:
        """End the mesh: whoever waits gets this error, unless another came first."""
        self.error = self.error or error
        self._ring()

    def close(self) -> None:
        """End the connections and the thread. Nothing may be under way."""
        self._closing = True
        self._ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(_LONGEST_GOODBYE)
        self.error = self.error or ExchangeError("the connections have been closed on this worker.")

    @override
    def abandon(self) -> None:
        self.error = ExchangeError("Mesh: a forked child has no connections of its own.")
        self._close_all()

    def _ring(self) -> None:
        with suppress(OSError):  # it rings already, or has been closed
            self._ringer.send(b"!")

    def _close_all(self) -> None:
        for each in (self._bell, self._ringer, *(link.socket for link in self._links.values())):
            each.close()

    def _work(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            try:
                while self.error is None and not self._closing:
                    self._serve(selector)
            except Exception as error:  # whoever waits is told
                self.error = self.error or error
            finally:
                self._close_all()

    def _serve(self, selector: selectors.BaseSelector) -> None:
        for key, events in selector.select():
            link = key.data
            if link is None:
                self._bell.recv(4096)
                continue
            if events & selectors.EVENT_READ:
                link.receive()
            if events & selectors.EVENT_WRITE:
                link.send()
            link.watch(selector)
        while self._posted:  # also what has been posted just now, by what followed
            lane, sends, receives, transfer = self._posted.popleft()
            for peer, data in receives.items():
                self._links[peer, lane].add_incoming(transfer, data)
            for peer, data in sends.items():
                self._links[peer, lane].add_outgoing(transfer, data)
            for peer in sends.keys() | receives.keys():
                link = self._links[peer, lane]
                link.send()
                link.watch(selector)


@final
class _MeshTransfer(MessageTransfer):
    """Messages to and from all others, and what follows them.

    Args:
        mesh: Where.
        parts: How many messages are sent and received.
        then: As for :meth:`Mesh.post`.
    """

    def __init__(self, mesh: Mesh, parts: int, then: Callable[[], MessageTransfer | None] | None) -> None:
        self._mesh = mesh
        self._parts = parts
        self._then = then
        self._over = threading.Event()
        self._before: _MeshTransfer | None = None  # the one that this belongs to

    @property
    @override
    def arrived(self) -> bool:
        return self._over.is_set() or self._mesh.error is not None

    @override
    def wait(self) -> None:
        failure, started = self._mesh.failure, time.monotonic()
        timeout = failure.timeout.total_seconds()
        if not wait_until(lambda: self._over.wait(_LOOK) or self._mesh.error is not None, timeout, longest_pause=0.0):
            self._mesh.fail(TimeoutError("the messages of some workers have not come."))
        if not self._over.is_set():
            error = self._mesh.error
            assert error is not None
            raise failure.of(error, time.monotonic() - started) from error

    def count_down(self) -> None:
        """One of the messages has been sent, or has come."""
        self._parts -= 1
        if self._parts:
            return
        following = None if self._then is None else self._then()
        self._then = None  # it may hold buffers
        if following is not None:
            assert isinstance(following, _MeshTransfer)
            following._before = self
            return
        each: _MeshTransfer | None = self
        while each is not None:
            each._over.set()
            each = each._before


@final
class _Link:
    """A connection with another worker, and what is under way on it, each way in order.

    Args:
        peer: The worker's number.
        connection: The connection; it does not block.
    """

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.socket = connection
        self._peer = peer
        self._outgoing: deque[tuple[_MeshTransfer, memoryview]] = deque()
        self._incoming: deque[tuple[_MeshTransfer, memoryview]] = deque()
        self._sent = self._received = 0  # bytes of the first ones, their lengths' included
        self._length = bytearray(_LENGTH.size)
        self._watched = 0

    def add_outgoing(self, transfer: _MeshTransfer, data: memoryview) -> None:
        """Put a message at the end of what is to be sent."""
        self._outgoing.append((transfer, data))

    def add_incoming(self, transfer: _MeshTransfer, data: memoryview) -> None:
        """Put a buffer at the end of what is to be received."""
        self._incoming.append((transfer, data))

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Let the selector look for what this link waits for."""
        wanted = selectors.EVENT_READ * bool(self._incoming) | selectors.EVENT_WRITE * bool(self._outgoing)
        if wanted == self._watched:
            return
        if not self._watched:
            selector.register(self.socket, wanted, self)
        elif wanted:
            selector.modify(self.socket, wanted, self)
        else:
            selector.unregister(self.socket)
        self._watched = wanted

    def send(self) -> None:
        """Send what the connection takes."""
        while self._outgoing:
            transfer, data = self._outgoing[0]
            try:
                if self._sent < _LENGTH.size:
                    self._sent += self.socket.sendmsg([_LENGTH.pack(len(data))[self._sent :], data])
                else:
                    self._sent += self.socket.send(data[self._sent - _LENGTH.size :])
            except BlockingIOError:
                return
            except OSError as error:
                raise self._gone() from error
            if self._sent == _LENGTH.size + len(data):
                self._outgoing.popleft()
                self._sent = 0
                transfer.count_down()

    def receive(self) -> None:
        """Receive what has come."""
        while self._incoming:
            transfer, data = self._incoming[0]
            try:
                if self._received < _LENGTH.size:
                    parts = [memoryview(self._length)[self._received :], data]
                    count, *_ = self.socket.recvmsg_into(parts)
                else:
                    count = self.socket.recv_into(data[self._received - _LENGTH.size :])
            except BlockingIOError:
                return
            except OSError as error:
                raise self._gone() from error
            if count == 0:
                raise self._gone()
            self._received += count
            if self._received >= _LENGTH.size and _LENGTH.unpack(self._length)[0] != len(data):
                raise RuntimeError(
                    "the workers add up different things; build the same model and optimizer on every rank."
                )
            if self._received == _LENGTH.size + len(data):
                self._incoming.popleft()
                self._received = 0
                transfer.count_down()

    def _gone(self) -> ConnectionError:
        return ConnectionError(f"worker {self._peer} has ended its connection.")
