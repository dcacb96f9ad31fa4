"""The workers that are alive, as torchft's lighthouse counts them, and the exchanges that those of one count make."""

import importlib
import logging
import os
import re
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from typing import Any, final

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions, TCPStore
from torch.distributed import ReduceOp

from lightning_easgd.transport.channel import ExchangeError

__all__ = ["Membership"]

_CONNECTING = timedelta(seconds=10)  # to the lighthouse, at the start
_FOR_EVER = timedelta(days=365)
_RETRIES = 10**9  # ten a second while the lighthouse is away
_ALIVE = 0.5  # seconds since the last heartbeat; there are ten a second
_SHARES = 1024  # numbers of workers that are told apart where nobody says how many there are


@final
class Membership:
    """This worker among those that live; torchft's ``Manager``, of a worker of one rank.

    In this order, again and again: :meth:`request`, which returns at once; :meth:`has_come`; :meth:`exchange`;
    :meth:`commit`. A request is answered when all that live have made theirs, or the lighthouse goes on without those
    that have not. A worker that is behind the others then gets their state: what :meth:`add_state` has registered.

    Args:
        lighthouse: Its address.
        replica_id: This worker's number.
        numbers: How many numbers there are; None for 1024.
        min_replica_size: How many workers an exchange must have to count.
        timeout: Seconds that a transfer may take.
        strategy: The strategy's name, for errors.

    Attributes:
        replica_id: As given.
        living: The numbers of the workers of the last exchange that counted; at first this worker's.
        missed: Requests that were not answered in time.
        failed: Exchanges that did not count.
    """

    def __init__(
        self,
        lighthouse: str,
        replica_id: int,
        *,
        numbers: int | None,
        min_replica_size: int,
        timeout: float,
        strategy: str,
    ) -> None:
        self._address = lighthouse
        self.replica_id = replica_id
        self._min_replica_size = min_replica_size
        self._timeout = timedelta(seconds=timeout)
        self._strategy = strategy
        self._presence = torch.zeros(numbers or _SHARES, dtype=torch.int32)
        self._states: dict[str, tuple[Callable[[Any], None], Callable[[], Any]]] = {}
        self._manager: Any = None
        self._request: Future[None] | None = None
        self._step_before = 0
        self.living: tuple[int, ...] = (replica_id,)
        self.missed = self.failed = 0
        _import_quietly()

    def check(self) -> None:
        """Raise if there is nobody to find the others with, or another worker of this number is alive.

        Raises:
            ExchangeError: If it is so.
        """
        from torchft.coordination import LighthouseClient  # noqa: PLC0415 - an extra

        try:
            LighthouseClient(self._address, connect_timeout=_CONNECTING)
        except RuntimeError as error:
            raise ExchangeError(
                f"{self._strategy}: there is no lighthouse at {self._address}; start torchft_lighthouse there, or"
                f" correct FaultTolerance(lighthouse=...) or TORCHFT_LIGHTHOUSE. Cause: {error}"
            ) from None
        self._refuse_second("")

    def open(self) -> None:
        """Come to the others: from now on they hear of this worker.

        Raises:
            ExchangeError: If another worker of this number has come.
        """
        from torchft import Manager, ProcessGroupGloo  # noqa: PLC0415 - an extra

        # One's own for each attempt: torchrun starts ranks again with the store of before, and keys that are stale.
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._group = ProcessGroupGloo(timeout=self._timeout)
        self._manager = Manager(
            pg=self._group,
            load_state_dict=None,
            state_dict=None,
            min_replica_size=self._min_replica_size,
            use_async_quorum=False,  # it is asynchronous here; so one who returns takes part at once
            timeout=self._timeout,
            connect_timeout=_CONNECTING,
            rank=0,
            world_size=1,
            store_addr="localhost",
            store_port=self._store.port,
            lighthouse_addr=self._address,
            replica_id=f"{self.replica_id:06d}",  # the order of the texts is then that of the numbers
            quorum_retries=_RETRIES,
        )
        for key, (load, state) in self._states.items():
            self._manager.register_state_dict_fn(key, load, state)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="easgd_membership")
        try:
            self._refuse_second(self._store.get("replica_id").decode().partition(":")[2])
        except ExchangeError:
            self.close()
            raise

    def _refuse_second(self, own: str) -> None:
        """Raise if another worker of this number is alive: one that has come before this one.

        Args:
            own: What the lighthouse tells this process by; empty if it does not know it.
        """
        deadline = time.monotonic() + 4 * _ALIVE
        while others := [name for name, age in self._heard() if age < _ALIVE and not (own and name >= own)]:
            if time.monotonic() > deadline:
                raise ExchangeError(
                    f"{self._strategy}: a worker with replica_id={self.replica_id} is alive already ({others[0]});"
                    " give each worker a number of its own, by FaultTolerance(replica_id=...) or REPLICA_GROUP_ID."
                )
            time.sleep(_ALIVE / 5)

    def _heard(self) -> list[tuple[str, float]]:
        """Of each worker of this number what the lighthouse tells it by, and the seconds since its last heartbeat."""
        page = ""
        with suppress(OSError), urllib.request.urlopen(f"{self._address}/status", timeout=2) as answer:
            page = answer.read().decode()
        found = re.findall(rf"\b{self.replica_id:06d}:([0-9a-f-]+): seen ([0-9.]+)s ago", page)
        return [(name, float(age)) for name, age in found]

    def add_state(self, key: str, state: Callable[[], Any], load: Callable[[Any], None]) -> None:
        """Register a part of the state that one who is behind gets from another; before :meth:`open`.

        Args:
            key: Its name, the same on all.
            state: Gives it; called by another thread between a request and the commit.
            load: Takes it, likewise.
        """
        self._states[key] = load, state

    # An exchange

    def request(self) -> None:
        """Say that this worker is about to exchange."""
        assert self._request is None
        self._step_before = self._manager.current_step()
        self._request = self._thread.submit(self._manager.start_quorum, timeout=_FOR_EVER)

    @property
    def is_requested(self) -> bool:
        """Whether there is a request that no exchange has been made for."""
        return self._request is not None

    def has_come(self, seconds: float) -> bool:
        """Whether the request has been answered, now or within so many seconds."""
        assert self._request is not None
        if not wait([self._request], timeout=seconds).done:
            return False
        try:
            self._request.result()
        except (RuntimeError, TimeoutError) as error:
            raise ExchangeError(
                f"{self._strategy}: torchft could not find the other workers. Cause: {error}"
            ) from error
        return True

    @property
    def behind(self) -> int:
        """How many moves of the center this worker had missed when its last request was answered."""
        return int(self._manager.current_step()) - self._step_before

    @property
    def size(self) -> int:
        """p, the number of workers of the request that has been answered."""
        return max(1, int(self._manager.num_participants()))

    @property
    def rank(self) -> int:
        """This worker's place among those p, 0 ≤ rank < p."""
        return int(self._manager.participating_rank() or 0)

    def exchange(self, add_up: Callable[[], None]) -> Future[None]:
        """Start to exchange, and return at once; :meth:`commit` says whether it counts.

        Args:
            add_up: Calls the operations, the same ones on all workers, in another thread. Those after one that has
                failed do nothing.
        """
        self._request = None
        self._presence.zero_()
        self._presence[self.replica_id % len(self._presence)] = 1
        return self._thread.submit(self._exchange, add_up)

    def _exchange(self, add_up: Callable[[], None]) -> None:
        self.all_reduce(self._presence)
        add_up()

    def all_reduce(self, buffer: Tensor) -> None:
        """Replace a buffer by its sum over the workers, bitwise the same on all."""
        self._manager.allreduce(buffer, reduce_op=ReduceOp.SUM).wait()  # keeps its error for the commit

    def all_to_all(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Send row r of ``outgoing`` to worker r, and receive what it sends as row r of ``incoming``."""
        self._operate(lambda: self._group.alltoall_base(incoming, outgoing, [], [], AllToAllOptions()))

    def all_gather(self, message: Tensor, messages: Tensor) -> None:
        """Send ``message`` to all, and receive that of worker r as row r of ``messages``."""
        self._operate(lambda: self._group.allgather([list(messages)], [message], AllgatherOptions()))

    def _operate(self, begin: Callable[[], Any]) -> None:
        if self._manager.errored() is not None:
            return
        try:
            begin().wait()
        except RuntimeError as error:
            self._manager.report_error(error)

    def commit(self) -> bool:
        """Whether the exchange counts. Called when it has ended; a state that was given away is not needed any more."""
        counts = bool(self._manager.should_commit())
        if counts:
            self.living = tuple(self._presence.nonzero().flatten().tolist())
        else:
            self.failed += 1
        return counts

    @property
    def has_failed(self) -> bool:
        """Whether an operation of the last exchange has failed, or what this worker was behind by has not come."""
        return self._manager.errored() is not None

    @property
    def problem(self) -> str:
        """Why the last exchange does not count."""
        error = self._manager.errored()
        return "too few workers" if error is None else str(error.original_exception).partition("\n")[0]

    def close(self) -> None:
        """Leave the others; nothing is waited for."""
        manager, self._manager, self._request = self._manager, None, None
        if manager is not None:
            manager.shutdown(wait=False)
            # Its connections end with it alone: a request that nobody answers would hold up the end of this process.
            manager._manager = None
            self._thread.shutdown(wait=False, cancel_futures=True)


def _import_quietly() -> None:
    """Import torchft; what it says of each exchange, and of each that fails with a traceback, is said here."""
    os.environ.setdefault("RUST_LOG", "error")  # it is read at the import
    importlib.import_module("torchft")
    logging.getLogger("torchft.manager").setLevel(logging.CRITICAL)
    logging.getLogger("torchft.checkpointing.http_transport").setLevel(logging.WARNING)
