"""The serving side of a connection between nodes: remote ranks exchange with this node's part of the center."""

import hmac
import socket
import struct
import threading
from contextlib import suppress
from typing import final

import torch

from lightning_easgd.service.errors import CenterError, CenterTimeoutError
from lightning_easgd.service.forking import ForkAware
from lightning_easgd.service.interface import CenterService
from lightning_easgd.service.wire import (
    FAILED,
    FAILED_BY_TIMEOUT,
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

__all__ = ["GREETING", "ShardServer"]

GREETING = struct.Struct("<16sI")
"""What a client says first: the run's secret, and its rank."""

_GREETING_TIMEOUT = 10.0


@final
class ShardServer(ForkAware):
    """Serves one node's part of the center to ranks of other nodes: one thread for each of them.

    A client that dies, leaves, or stops in the middle of a message loses its connection, and its thread ends. No chunk
    is locked while anything travels. All threads are daemons blocked in system calls that :meth:`close` interrupts, so
    neither a missing :meth:`close` nor a silent peer keeps the process from ending.

    Args:
        shard: What to serve.
        secret: 16 bytes that clients must know.
        timeout: Seconds without progress after which a client in the middle of a message is given up.
        lost: Takes the rank of a client that ended its connection without a goodbye.

    Attributes:
        port: Where clients connect.
    """

    def __init__(self, shard: CenterService, secret: bytes, timeout: float, lost: set[int]) -> None:
        super().__init__()
        self._shard = shard
        self._secret = secret
        self._timeout = timeout
        self._lost = lost
        self._closed = False
        self._guard = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        if socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            self._listener = socket.create_server(("", 0))
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="easgd-accept", daemon=True)
        self._acceptor.start()

    def stop_accepting(self) -> None:
        """Close the listening socket: all clients that are expected have connected."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(self._timeout)
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
        for thread in connections.values():
            thread.join(self._timeout)

    def abandon(self) -> None:  # noqa: D102
        self._closed = True
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed
                return
            thread = threading.Thread(target=self._serve, args=(connection,), name="easgd-serve", daemon=True)
            with self._guard:
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        client = None
        try:
            client = self._greet(connection)
            if client is not None:
                self._answer_requests(connection)
        except StalledError:
            pass  # it may go on one day, and find its connection closed
        except ConnectionLostError:
            # What it had begun here is either complete or was never started.
            if client is not None and not self._closed:
                self._lost.add(client)
        finally:
            with self._guard:
                del self._connections[connection]
            connection.close()

    def _greet(self, connection: socket.socket) -> int | None:
        """The client's rank, None if it does not know the secret."""
        configure(connection, _GREETING_TIMEOUT)
        greeting = bytearray(GREETING.size)
        receive_into(connection, memoryview(greeting))
        secret, client = GREETING.unpack(greeting)
        configure(connection, self._timeout)
        return int(client) if hmac.compare_digest(secret, self._secret) else None

    def _answer_requests(self, connection: socket.socket) -> None:
        shard = self._shard
        largest = max((shard.layout.size(chunk) for chunk in range(len(shard.chunks))), default=0)
        staging = torch.empty(largest, dtype=shard.dtype)
        header = bytearray(REQUEST_SIZE)
        while True:
            receive_into(connection, memoryview(header), idle=True)
            request = Request.unpack(header)
            if request.operation == Operation.LEAVE:
                return
            numbers = staging[: shard.layout.size(request.chunk)]
            data = as_bytes(numbers)
            if request.operation != Operation.READ:
                receive_into(connection, data)
            try:
                version = self._perform(request, numbers)
            except CenterError as error:
                text = str(error).encode()
                kind = FAILED_BY_TIMEOUT if isinstance(error, CenterTimeoutError) else FAILED
                send(connection, Reply(kind, 0, len(text)).pack(), text)
                continue
            payload = b"" if request.operation == Operation.WRITE else data
            send(connection, Reply(0, version, len(payload)).pack(), payload)

    def _perform(self, request: Request, numbers: torch.Tensor) -> int:
        if request.operation == Operation.EXCHANGE:
            return self._shard.exchange(request.chunk, numbers, request.rate)
        if request.operation == Operation.READ:
            return self._shard.read(request.chunk, numbers, request.store)
        self._shard.write(request.chunk, numbers, request.store, None if request.version < 0 else request.version)
        return max(request.version, 0)
