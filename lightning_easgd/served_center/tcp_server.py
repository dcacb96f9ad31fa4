"""The serving side of a connection between nodes: remote ranks exchange with this node's part of the center."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import final

import torch
from typing_extensions import override

from lightning_easgd.served_center.compressed_link import ServingEnd
from lightning_easgd.served_center.interface import CenterService
from lightning_easgd.transport.errors import CenterError, CenterTimeoutError
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.network import listen
from lightning_easgd.transport.strangers import Strangers
from lightning_easgd.transport.tcp_wire import (
    FAILED,
    FAILED_BY_TIMEOUT,
    READS,
    REQUEST_SIZE,
    ConnectionLostError,
    Operation,
    Reply,
    Request,
    StalledError,
    as_bytes,
    configure,
    receive_into,
    send,
)

__all__ = ["ShardServer"]

_WRITES = frozenset({Operation.WRITE, Operation.SET_REFERENCE, Operation.SET_RESIDUAL})
_LOOK = 0.05  # seconds from one look at whether to go on accepting to the next
_LAST_GREETINGS = 1.0  # seconds that the greetings of those who have connected may be under way
_LONGEST_GOODBYE = 1.0  # seconds


@final
class ShardServer(ForkAware):
    """Serves one node's part of the center to ranks of other nodes: one thread for each that knows the secret.

    A client that dies, leaves, or stops in the middle of a message loses its connection, and its thread ends. No chunk
    is locked while anything travels. All threads are daemons blocked in system calls that :meth:`close` interrupts, so
    neither a missing :meth:`close` nor a silent peer keeps the process from ending.

    Args:
        shard: What to serve.
        secret: 16 bytes that clients must know.
        timeout: Seconds without progress after which a client in the middle of a message is given up.
        lost: Takes the rank of a client that ended its connection without a goodbye.
        host: The address to listen at; empty for all of this host's.
        make_link: Makes what is remembered of one client's rounded messages; None if there are none.

    Attributes:
        port: Where clients connect.
    """

    def __init__(
        self,
        shard: CenterService,
        secret: bytes,
        timeout: float,
        lost: set[int],
        *,
        host: str = "",
        make_link: Callable[[], ServingEnd] | None = None,
    ) -> None:
        super().__init__()
        self._shard = shard
        self._timeout = timeout
        self._lost = lost
        self._make_link = make_link
        self._accepting = True
        self._closed = False
        self._guard = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._listener = listen(host)
        self.port: int = self._listener.getsockname()[1]
        strangers = Strangers(self._listener, secret)
        self._acceptor = threading.Thread(target=self._accept, args=(strangers,), name="easgd-accept", daemon=True)
        self._acceptor.start()

    def stop_accepting(self) -> None:
        """Close the listening socket, when those who have connected have said who they are."""
        self._accepting = False
        self._acceptor.join(_LAST_GREETINGS + _LONGEST_GOODBYE)
        self._listener.close()

    def close(self) -> None:
        """End all connections and threads. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.stop_accepting()
        with self._guard:
            connections = dict(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + _LONGEST_GOODBYE
        for thread in connections.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    @override
    def abandon(self) -> None:
        self._closed = True
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _accept(self, strangers: Strangers) -> None:
        deadline = None
        try:
            while not self._closed and (deadline is None or (strangers.may_come and time.monotonic() < deadline)):
                for connection, client in strangers.welcome(_LOOK):
                    self._take(connection, client)
                if deadline is None and not self._accepting:
                    deadline = time.monotonic() + _LAST_GREETINGS
        finally:
            strangers.close()

    def _take(self, connection: socket.socket, client: int) -> None:
        configure(connection, self._timeout)
        thread = threading.Thread(target=self._serve, args=(connection, client), name="easgd-serve", daemon=True)
        with self._guard:
            self._connections = {each: server for each, server in self._connections.items() if server.is_alive()}
            self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket, client: int) -> None:
        try:
            self._answer_requests(connection)
        except StalledError:
            pass  # it may go on one day, and find its connection closed
        except ConnectionLostError:
            # What it had begun here is either complete or was never started.
            if not self._closed:
                self._lost.add(client)
        finally:
            connection.close()

    def _answer_requests(self, connection: socket.socket) -> None:
        shard = self._shard
        link = None if self._make_link is None else self._make_link()
        largest = max((shard.layout.size(chunk) for chunk in range(len(shard.chunks))), default=0)
        staging = torch.empty(largest, dtype=shard.dtype)
        header = bytearray(REQUEST_SIZE)
        while True:
            receive_into(connection, memoryview(header), idle=True)
            request = Request.unpack(header)
            if request.operation == Operation.LEAVE:
                return
            if not self._understands(request, link):
                text = f"ShardServer: {request} asks for nothing that is served here".encode()
                send(connection, Reply(FAILED, 0, len(text)).pack(), text)
                return
            numbers = staging[: shard.layout.size(request.chunk)]
            data = as_bytes(numbers)
            if link is not None and request.operation == Operation.EXCHANGE_ROUNDED:
                message = link.message_buffer(numbers.numel())
                receive_into(connection, as_bytes(message))
                link.decode(request.chunk, message, numbers)
            elif request.operation not in READS:
                receive_into(connection, data)
            try:
                version = self._perform(request, numbers, link)
            except CenterError as error:
                text = str(error).encode()
                kind = FAILED_BY_TIMEOUT if isinstance(error, CenterTimeoutError) else FAILED
                send(connection, Reply(kind, 0, len(text)).pack(), text)
                continue
            payload = b"" if request.operation in _WRITES else data
            if link is not None and request.operation == Operation.EXCHANGE_ROUNDED:
                payload = as_bytes(link.encode(request.chunk, numbers))
            send(connection, Reply(0, version, len(payload)).pack(), payload)

    def _understands(self, request: Request, link: ServingEnd | None) -> bool:
        if request.operation in (Operation.EXCHANGE, Operation.READ, Operation.WRITE):
            return self._shard.keeps(request.chunk, request.store)
        if link is None or not self._shard.keeps(request.chunk, 0):
            return False
        if request.operation == Operation.SET_REFERENCE:
            return True
        known = (Operation.EXCHANGE_ROUNDED, Operation.READ_RESIDUAL, Operation.SET_RESIDUAL)
        return request.operation in known and link.knows(request.chunk)

    def _perform(self, request: Request, numbers: torch.Tensor, link: ServingEnd | None) -> int:
        if request.operation in (Operation.EXCHANGE, Operation.EXCHANGE_ROUNDED):
            begins_link = link is not None and request.operation == Operation.EXCHANGE
            if begins_link:
                link.set_reference(request.chunk, numbers)  # type: ignore[union-attr]
            version = self._shard.exchange(request.chunk, numbers, request.rate)
            if begins_link:
                link.unrounded_answer(request.chunk, numbers)  # type: ignore[union-attr]
            return version
        if request.operation == Operation.READ:
            return self._shard.read(request.chunk, numbers, request.store)
        if request.operation == Operation.WRITE:
            self._shard.write(request.chunk, numbers, request.store, None if request.version < 0 else request.version)
            return max(request.version, 0)
        assert link is not None
        if request.operation == Operation.SET_REFERENCE:
            link.set_reference(request.chunk, numbers)
        elif request.operation == Operation.SET_RESIDUAL:
            link.set_residual(request.chunk, numbers)
        else:
            numbers.copy_(link.residual(request.chunk))
        return 0
