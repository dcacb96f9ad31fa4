"""Channels without processes: workers are threads of one process."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from lightning_easgd.averagers import Channel, ExchangeLine, Transfer
from lightning_easgd.transport.discovery import Rendezvous
from lightning_easgd.transport.liveness import Presence
from lightning_easgd.transport.store_client import StoreClient


def line_on(control: Channel, data: Channel) -> ExchangeLine:
    """A line, and beside it the channel of the exchanges' sums."""
    line = ExchangeLine(control)
    line.data = data
    return line


def rendezvous_of(store: Store, rank: int, size: int, timeout: timedelta = timedelta(seconds=20)) -> Rendezvous:
    """Where workers that are threads find each other's memory."""
    client = StoreClient(store, timeout.total_seconds())
    return Rendezvous(client, Presence(client, rank), rank, size, timeout.total_seconds())


class Hub:
    """Joins the reductions of ``size`` workers: the k-th of each worker belong together."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Condition()
        self._rounds: dict[int, list[Tensor]] = {}

    def channel(self, rank: int) -> "HubChannel":
        return HubChannel(self, rank)


class HubChannel(Channel):
    def __init__(self, hub: Hub, rank: int) -> None:
        self.rank, self.size, self._hub, self._round = rank, hub.size, hub, 0

    def sum(self, buffer: Tensor) -> Transfer:
        number, self._round = self._round, self._round + 1
        with self._hub._lock:
            self._hub._rounds.setdefault(number, []).append(buffer)
            self._hub._lock.notify_all()
        return _HubTransfer(self._hub, number)


class _HubTransfer(Transfer):
    def __init__(self, hub: Hub, number: int) -> None:
        self._hub, self._number = hub, number

    def wait(self) -> None:
        with self._hub._lock:
            arrived = self._hub._lock.wait_for(lambda: len(self._buffers) == self._hub.size, timeout=20)
            assert arrived, "a worker never came to this reduction"
            if any(buffer is not self._buffers[0] for buffer in self._buffers):
                total = sum(buffer.clone() for buffer in self._buffers)
                for buffer in self._buffers:
                    buffer.copy_(total)
                self._hub._rounds[self._number] = [self._buffers[0]] * self._hub.size

    @property
    def _buffers(self) -> list[Tensor]:
        return self._hub._rounds[self._number]


class LoneChannel(Channel):
    """One worker; writes down what happens, and lets a test decide when a reduction has arrived."""

    rank, size = 0, 1

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def sum(self, buffer: Tensor) -> Transfer:
        self.events.append("start")
        return _LoneTransfer(self.events)


class _LoneTransfer(Transfer):
    def __init__(self, events: list[str]) -> None:
        self._events = events

    def wait(self) -> None:
        self._events.append("wait")


def run_threads(work: Callable[[int, ExchangeLine], Any], workers: int) -> list[Any]:
    """Call ``work(rank, line)`` on a thread per worker; return the results."""
    control, data = Hub(workers), Hub(workers)
    return on_threads(lambda rank: work(rank, line_on(control.channel(rank), data.channel(rank))), workers)


def on_threads(work: Callable[[int], Any], workers: int) -> list[Any]:
    """Call ``work(rank)`` on a thread per worker; return the results."""
    results: list[Any] = [None] * workers
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(workers)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:  # the first; that others wait for this worker is no news
        raise errors[0]
    hanging = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    assert not hanging, f"workers {hanging} hang"
    return results
