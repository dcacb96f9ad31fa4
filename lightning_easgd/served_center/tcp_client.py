"""The client's side of a connection between nodes."""

import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.served_center.compressed_link import LinkState, WorkersEnd
from lightning_easgd.served_center.interface import Pending
from lightning_easgd.transport.errors import CenterError, CenterTimeoutError, WorkerLostError
from lightning_easgd.transport.forking import ForkAware
from lightning_easgd.transport.tcp_wire import (
    FAILED_BY_TIMEOUT,
    GREETING,
    READS,
    REPLY_SIZE,
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
from lightning_easgd.transport.waiting import in_vain

__all__ = ["RemoteShard"]

_LONGEST_GOODBYE = 1.0  # seconds


@final
class RemoteShard(ForkAware):
    """The part of the center that another node keeps, reached through one rank of that node.

    Requests are answered in the order in which they were sent, so that any number of them may be under way; a thread
    of its own takes the answers in, since a client that only sends would block a server that only answers. The answer
    is received into the message's own memory.

    Plain TCP, where a process group would do as well: it moves about twice as many bytes a second here as gloo's
    point-to-point calls, a blocked call can be interrupted from another thread, and a dead peer is known at once.

    Args:
        address: Host and port of a :class:`~lightning_easgd.served_center.tcp_server.ShardServer`.
        server: The rank that serves there; errors name it.
        rank: This process's rank.
        secret: The run's 16 bytes.
        timeout: Seconds without progress after which the server is given up.
        lost: Takes the server's rank if it ends the connection.
        link: What is remembered for rounded messages; None to send them as they are.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        server: int,
        rank: int,
        secret: bytes,
        timeout: float,
        lost: set[int],
        link: WorkersEnd | None = None,
    ) -> None:
        super().__init__()
        self._server = server
        self._rank = rank
        self._timeout = timeout
        self._lost_ranks = lost
        self._link = link
        self._sending = threading.Lock()
        self._waiting: deque[_Request] = deque()
        self._error: CenterError | None = None
        try:
            self._connection = socket.create_connection(address, timeout)
            configure(self._connection, timeout)
            send(self._connection, GREETING.pack(secret, rank))
        except (OSError, ConnectionLostError) as error:
            raise self._lost(f"cannot be reached at {address[0]}:{address[1]}: {error}") from error
        self._receiver = threading.Thread(target=self._receive, name=f"easgd-replies-{server}", daemon=True)
        self._receiver.start()

    def begin(self, chunk: int, message: Tensor, rate: float) -> Pending:
        """Send a message for a chunk; the answer is in the message's memory when it has been waited for."""
        link = self._link
        if link is None:
            return self._begin(Request(Operation.EXCHANGE, 0, chunk, 0, rate), as_bytes(message))
        if not link.knows(chunk):
            link.set_reference(chunk, message)
            begun = self._begin(Request(Operation.EXCHANGE, 0, chunk, 0, rate), as_bytes(message))
            return _Then(begun, lambda: link.unrounded_answer(chunk, message))
        rounded = link.encode(chunk, message)  # the answer has its size
        begun = self._begin(Request(Operation.EXCHANGE_ROUNDED, 0, chunk, 0, rate), as_bytes(rounded))
        return _Then(begun, lambda: link.decode(chunk, rounded, message))

    def nbytes(self, chunk: int, numel: int, itemsize: int) -> int:
        """Bytes of the next message for a chunk; its answer has as many."""
        rounded = self._link is not None and self._link.knows(chunk)
        return self._link.nbytes(numel) if rounded else numel * itemsize  # type: ignore[union-attr]

    def link_state(self, chunk: int) -> LinkState | None:
        """What both ends remember of a chunk; None if its messages have not been rounded."""
        if self._link is None or not self._link.knows(chunk):
            return None
        residual = torch.empty_like(self._link.reference(chunk))
        self._begin(Request(Operation.READ_RESIDUAL, 0, chunk, 0, 0.0), as_bytes(residual)).wait()
        return self._link.reference(chunk), residual

    def load_link_state(self, chunk: int, state: LinkState) -> None:
        """Go on where :meth:`link_state` was taken."""
        if self._link is None:
            return
        reference, residual = state
        self._link.set_reference(chunk, reference)
        for operation, values in ((Operation.SET_REFERENCE, reference), (Operation.SET_RESIDUAL, residual)):
            self._begin(Request(operation, 0, chunk, 0, 0.0), as_bytes(values.contiguous())).wait()

    def read(self, chunk: int, into: Tensor, store: int = 0) -> int:
        """Read one store of a chunk."""
        return self._begin(Request(Operation.READ, store, chunk, 0, 0.0), as_bytes(into)).wait()

    def write(self, chunk: int, value: Tensor, store: int = 0, version: int | None = None) -> None:
        """Write one store of a chunk."""
        request = Request(Operation.WRITE, store, chunk, -1 if version is None else version, 0.0)
        self._begin(request, as_bytes(value)).wait()

    def close(self) -> None:
        """Say goodbye, and end the connection and its thread. A second call does nothing.

        A server that takes nothing is not waited for: the goodbye is sent if the connection takes it at once.
        """
        closed = CenterError(f"RemoteShard: the connection to rank {self._server} has been closed on this rank.")
        is_whole = self._error is None
        self._error = self._error or closed  # before the goodbye: the server ends the connection when that has come
        if is_whole and self._sending.acquire(timeout=min(self._timeout, _LONGEST_GOODBYE)):
            with suppress(OSError):
                self._connection.send(Request(Operation.LEAVE, 0, 0, 0, 0.0).pack(), socket.MSG_DONTWAIT)
            self._sending.release()
        self._break(closed)
        if threading.current_thread() is not self._receiver:
            self._receiver.join(min(self._timeout, _LONGEST_GOODBYE))
        self._connection.close()

    @override
    def abandon(self) -> None:
        self._error = CenterError("RemoteShard: a forked child has no connection of its own.")
        self._connection.close()

    def _begin(self, request: Request, data: memoryview) -> "_Request":
        begun = _Request(self, data)
        with self._sending:
            if self._error is not None:
                raise self._error
            self._waiting.append(begun)  # before it is sent: the answer may come while the send is still returning
            try:
                send(self._connection, request.pack(), b"" if request.operation in READS else data)
            except ConnectionLostError as error:
                self._break(self._lost(str(error)))
        if self._error is not None:
            raise self._error
        return begun

    def _receive(self) -> None:
        header = bytearray(REPLY_SIZE)
        try:
            while True:
                receive_into(self._connection, memoryview(header), idle=True)
                reply = Reply.unpack(header)
                if not self._waiting:
                    raise ConnectionLostError("it answers what nobody has asked")
                request = self._waiting.popleft()
                if reply.failed:
                    text = bytearray(reply.size)
                    receive_into(self._connection, memoryview(text))
                    kind = CenterTimeoutError if reply.failed == FAILED_BY_TIMEOUT else CenterError
                    request.version.set_exception(kind(f"RemoteShard(server={self._server}): {text.decode()}"))
                    continue
                try:
                    receive_into(self._connection, request.data[: reply.size])
                except ConnectionLostError as error:
                    request.version.set_exception(self._lost(str(error)))
                    raise
                request.version.set_result(reply.version)
        except ConnectionLostError as error:
            if self._error is None and not isinstance(error, StalledError):
                self._lost_ranks.add(self._server)
            self._break(self._lost(str(error)))

    def give_up(self) -> CenterError:
        """End the connection because a reply has not come."""
        return self._break(
            CenterTimeoutError(
                in_vain(
                    f"RemoteShard(timeout={self._timeout:g} s)",
                    "an exchange",
                    self._timeout,
                    f"rank {self._server} has not answered rank {self._rank}",
                    "It is stopped, stuck, or cut off.",
                )
            )
        )

    @property
    def timeout(self) -> float:
        """Seconds without progress after which the server is given up."""
        return self._timeout

    def _lost(self, reason: str) -> WorkerLostError:
        return WorkerLostError(
            f"RemoteShard(server={self._server}): rank {self._server}, which serves a part of the center to rank"
            f" {self._rank}, is lost: {reason}.",
            frozenset({self._server}),
        )

    def _break(self, error: CenterError) -> CenterError:
        """End the connection; all who wait get this error, unless one has ended it before."""
        if self._error is None:
            self._error = error
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        while self._waiting:
            with suppress(IndexError):
                self._waiting.popleft().version.set_exception(self._error)
        return self._error


@final
class _Then(Pending):
    """A request after whose answer there is something to do."""

    def __init__(self, begun: Pending, then: Callable[[], None]) -> None:
        self._begun = begun
        self._then = then

    @override
    def wait(self) -> int:
        version = self._begun.wait()
        self._then()
        return version


@final
class _Request(Pending):
    """A request that has been sent."""

    def __init__(self, shard: RemoteShard, data: memoryview) -> None:
        self.data = data
        self.version: Future[int] = Future()
        self._shard = shard

    @override
    def wait(self) -> int:
        try:
            return self.version.result(self._shard.timeout)
        except TimeoutError:
            raise self._shard.give_up() from None
