"""The one way in which this package calls the ranks' store: from any thread, and never without a deadline."""

import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NoReturn, final

from torch.distributed.distributed_c10d import PrefixStore, Store
from typing_extensions import override

from lightning_easgd.transport.errors import StoreLostError
from lightning_easgd.transport.forking import ForkAware

__all__ = ["StoreClient", "store_server"]

_GRACE = 1.0  # seconds: one who was stopped himself finds his deadlines passed when he goes on
_LONGEST_JOIN = 1.0  # seconds

_Call = tuple[Future[Any], str, tuple[Any, ...]]


def store_server() -> int | None:
    """The rank whose process serves the store, None if the launcher does."""
    return None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0


@final
class StoreClient:
    """A client of the ranks' store for any number of threads, whose calls end by a deadline.

    A call to a TCP store whose server is stopped returns never: neither the store's own timeout nor that of the socket
    bounds it, and even a new connection blocks, as the kernel accepts it. So a daemon thread makes the calls, one after
    the other on a connection of its own, and the caller waits for its answer only so long. After a call that was given
    up the client is lost for good.

    Only calls that do not wait for another rank are offered: :meth:`get` is for keys that :meth:`check` has found.

    Args:
        store: The ranks' store.
        timeout: Seconds within which the store must answer.
        server: The rank that serves it, for errors; None for the launcher.
        clone: Whether to make a connection of its own; else it uses that of a store that is idle, where it would be too
            late to make another.
    """

    def __init__(self, store: Store, timeout: float, *, server: int | None = 0, clone: bool = True) -> None:
        self._line = _Line(store, timeout, server, clone=clone)
        self._prefix = ""

    def under(self, prefix: str) -> "StoreClient":
        """The same client, with a prefix before every key."""
        client = object.__new__(StoreClient)
        client._line = self._line
        client._prefix = f"{self._prefix}{prefix}/"
        return client

    @property
    def server(self) -> int | None:
        """The rank that serves the store, None if the launcher does."""
        return self._line.server

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of the store, None if it is no TCP store."""
        return self._line.address

    @property
    def problem(self) -> StoreLostError | None:
        """Why the store is lost, None while it answers."""
        return self._line.problem

    def set(self, key: str, value: str) -> None:
        """Set a key.

        Raises:
            StoreLostError: If the store does not answer; so do all other calls.
        """
        self._line.call("set", self._prefix + key, value)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of these keys are there."""
        return bool(self._line.call("check", [self._prefix + key for key in keys]))

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return bytes(self._line.call("get", self._prefix + key))

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """The values of keys that are there."""
        return list(self._line.call("multi_get", [self._prefix + key for key in keys]))

    def add(self, key: str, amount: int) -> int:
        """Add to a number, which starts at 0, and return it."""
        return int(self._line.call("add", self._prefix + key, amount))

    def close(self) -> None:
        """End the connection and its thread; who waits for an answer gets an error. A second call does nothing."""
        self._line.close()


@final
class _Line(ForkAware):
    """A connection to the store, and the thread that alone uses it."""

    def __init__(self, store: Store, timeout: float, server: int | None, *, clone: bool) -> None:
        super().__init__()
        self.server = server
        self.address = _address(store)
        self.problem: StoreLostError | None = None
        self._timeout = timeout
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._waiting: set[Future[Any]] = set()
        arguments = (None if clone else store, store, self._calls)
        self._thread = threading.Thread(target=_serve, args=arguments, name="easgd-store", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._calls.put, None)  # for those that nobody closes

    def call(self, name: str, *arguments: Any) -> Any:
        if self.problem is not None:
            raise self.problem
        answer: Future[Any] = Future()
        self._waiting.add(answer)
        self._calls.put((answer, name, arguments))
        if not (_comes(answer, self._timeout) or _comes(answer, min(_GRACE, self._timeout))):
            self._give_up(f"has not answered for {self._timeout:g} s; it is stopped, stuck, or cut off")
        self._waiting.discard(answer)
        error = answer.exception()
        if isinstance(error, RuntimeError) and not isinstance(error, StoreLostError):  # the store's failures
            first_line = next(iter(str(error).splitlines()), "")
            self._give_up(f"is gone ({first_line}); it has died, or has ended before the others")
        return answer.result()

    def close(self) -> None:
        self._end("StoreClient: it has been closed on this rank.")
        self._calls.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(_LONGEST_JOIN)

    @override
    def abandon(self) -> None:
        self.problem = StoreLostError("StoreClient: a forked child has no connection of its own.")

    def _give_up(self, why: str) -> NoReturn:
        who = "the launcher" if self.server is None else f"rank {self.server}"
        raise self._end(f"StoreClient(timeout={self._timeout:g}): {who}, which serves the store, {why}.")

    def _end(self, why: str) -> StoreLostError:
        """Let all who wait have an error, the first one."""
        problem = self.problem = self.problem or StoreLostError(why)
        while self._waiting:
            with suppress(KeyError, InvalidStateError):  # another thread has taken it, or it has come after all
                self._waiting.pop().set_exception(problem)
        return problem


def _serve(client: Store | None, store: Store, calls: "SimpleQueue[_Call | None]") -> None:
    """Connect and make the calls; a function, so that the thread does not keep its owner alive."""
    while (call := calls.get()) is not None:
        answer, name, arguments = call
        with suppress(InvalidStateError):  # it has been given up
            try:
                client = store.clone() if client is None else client  # type: ignore[attr-defined]  # not in the stubs
                answer.set_result(getattr(client, name)(*arguments))
            except Exception as error:
                answer.set_exception(error)


def _comes(answer: Future[Any], seconds: float) -> bool:
    try:
        answer.exception(seconds)
    except TimeoutError:
        return False
    return True


def _address(store: Store) -> tuple[str, int] | None:
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    return None if host is None or port is None else (str(host), int(port))
