"""Throughput of one asynchronous exchange, against the limits of the same machine in the same run.

    python examples/benchmarks/run.py exchange --parameters 1000000 10000000 50000000 --workers 1 3

A worker sends its float32 vector and gets the elastic difference back, 8 bytes for each parameter:

    memory   ranks of one host, by the shared memory center; the limit is memcpy there and back
    sockets  ranks of two hosts (here over loopback), by TCP; the limit is a plain socket that carries the same chunks
             there and back, all in flight

All workers begin together; the time is the slowest one's, GB/s are those of all workers together. The four ways take
turns. Printed are the median GB/s, and the ratio to the limit of the same round: median, smallest, largest.
"""

import argparse
import itertools
import multiprocessing
import os
import socket
import sys
import threading
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from harness.command import add_options, parser
from harness.ranks import Place, RanksError, Send, one_host, run_ranks
from harness.ratios import Row, median_and_range
from harness.results import print_table, write_results

from lightning_easgd.method.rules import SymmetricExchange
from lightning_easgd.served_center import InProcessCenter, Layout, SharedMemoryCenter
from lightning_easgd.served_center.interface import CenterService, Pending
from lightning_easgd.served_center.tcp_client import RemoteShard
from lightning_easgd.served_center.tcp_server import ShardServer
from lightning_easgd.transport.tcp_wire import as_bytes

MEMCPY, MEMORY, RAW, SOCKETS = "memcpy", "memory", "raw socket", "sockets"
LIMIT = {MEMCPY: MEMCPY, MEMORY: MEMCPY, RAW: RAW, SOCKETS: RAW}
SECRET, TIMEOUT, RATE = bytes(16), 60.0, 1e-6
BYTES = 8  # of a parameter, there and back

Seconds = dict[tuple[str, int], list[float]]


class _OneServer(CenterService):
    """A center that one other rank serves as a whole."""

    def __init__(self, layout: Layout, shard: RemoteShard) -> None:
        super().__init__(layout, torch.float32)
        self._shard = shard

    def begin(self, chunk: int, message: torch.Tensor, rate: float) -> Pending:
        return self._shard.begin(chunk, message, rate)

    def exchange(self, chunk: int, message: torch.Tensor, rate: float) -> int:
        return self.begin(chunk, message, rate).wait()

    def read(self, chunk: int, into: torch.Tensor, store: int = 0) -> int:
        return self._shard.read(chunk, into, store)

    def write(self, chunk: int, value: torch.Tensor, store: int = 0, version: int | None = None) -> None:
        self._shard.write(chunk, value, store, version)

    def close(self) -> None:
        self._shard.close()


def _be_rank(rank: int, place: Place, send: Send, elements: int, rounds: int, barrier: Any, offers: Any) -> None:
    """Rank 0 keeps the centers and answers; the others are the workers."""
    layout = Layout.cut([(0, elements)])
    if rank == 0:
        _serve(layout, rounds, barrier, offers)
    else:
        _work(rank, layout, elements, rounds, barrier, offers, send)


def _serve(layout: Layout, rounds: int, barrier: Any, offers: Any) -> None:
    everything = range(len(layout.chunks))
    memory = SharedMemoryCenter(layout, torch.float32, SymmetricExchange(), held=everything, rank=0)
    server = ShardServer(InProcessCenter(layout, torch.float32, SymmetricExchange()), SECRET, TIMEOUT, set())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(barrier.parties - 1):
            offers.put((memory.address, server.port, listener.getsockname()[1]))
        for _ in range(barrier.parties - 1):
            connection, _ = listener.accept()
            threading.Thread(target=_echo, args=(connection, layout), daemon=True).start()
        barrier.wait()
        for _ in range(2 * (1 + rounds) * len(LIMIT)):
            barrier.wait()
        barrier.wait()
    server.close()
    memory.close()


def _work(rank: int, layout: Layout, elements: int, rounds: int, barrier: Any, offers: Any, send: Send) -> None:
    address, port, raw_port = offers.get()
    everything = range(len(layout.chunks))
    memory = SharedMemoryCenter(layout, torch.float32, SymmetricExchange(), held=everything, rank=rank, address=address)
    shard = RemoteShard(("127.0.0.1", port), server=0, rank=rank, secret=SECRET, timeout=TIMEOUT, lost=set())
    remote = _OneServer(layout, shard)
    x, out, back = (torch.ones(elements) for _ in range(3))
    with socket.create_connection(("127.0.0.1", raw_port)) as connection:
        barrier.wait()
        ways: dict[str, Callable[[], object]] = {
            MEMCPY: lambda: (out.copy_(x), back.copy_(out)),
            MEMORY: lambda: memory.exchange_all(x, [RATE]),
            RAW: lambda: _there_and_back(connection, x, back),
            SOCKETS: lambda: remote.exchange_all(x, [RATE]),
        }
        for number in range(-1, rounds):  # the first round, in which memory is touched, does not count
            for name, action in ways.items():
                barrier.wait()
                started = time.perf_counter()
                action()
                seconds = time.perf_counter() - started
                barrier.wait()
                if number >= 0:
                    send((name, number, seconds))
        remote.close()
        memory.close()
        barrier.wait()


def _there_and_back(connection: socket.socket, x: torch.Tensor, back: torch.Tensor) -> None:
    receiver = threading.Thread(target=_fill, args=(connection, as_bytes(back)))
    receiver.start()
    connection.sendall(as_bytes(x))
    receiver.join()


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:], flags=socket.MSG_WAITALL)
        if count == 0:
            return False
        filled += count
    return True


def _echo(connection: socket.socket, layout: Layout) -> None:
    sizes = [4 * layout.size(chunk) for chunk in range(len(layout.chunks))]
    buffer = memoryview(bytearray(max(sizes)))
    with connection:
        for size in itertools.cycle(sizes):
            if not _fill(connection, buffer[:size]):
                return
            connection.sendall(buffer[:size])


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--parameters", type=int, nargs="+", default=[1_000_000, 10_000_000, 50_000_000])
    options.add_argument("--workers", type=int, nargs="+", default=[1, 3])
    add_options(options, "exchange", rounds=15, timeout=300.0)
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = _options(arguments)
    rows, rounds = [], []
    for workers, parameters in itertools.product(options.workers, options.parameters):
        seconds: Seconds = defaultdict(list)

        def receive(message: tuple[str, int, float], seconds: Seconds = seconds) -> None:
            seconds[message[:2]].append(message[2])

        context = multiprocessing.get_context("fork")
        barrier, offers = context.Barrier(workers + 1, timeout=TIMEOUT), context.SimpleQueue()
        shared = (parameters, options.rounds, barrier, offers)
        try:
            run_ranks(_be_rank, one_host(workers + 1), *shared, timeout=options.timeout, receive=receive)
        except RanksError as error:
            print(f"{workers} workers, {parameters} parameters: {error}", file=sys.stderr)
        setting = {"workers": workers, "parameters": parameters}
        slowest = {key: max(values) for key, values in seconds.items() if len(values) == workers}
        rows += _throughputs(setting, slowest)
        rounds += [setting | {"way": way, "round": number, "seconds": s} for (way, number), s in slowest.items()]
    write_results(options.output, {"exchange": rows, "rounds": rounds}, vars(options))
    print_table(rows)


def _throughputs(setting: dict[str, int], slowest: dict[tuple[str, int], float]) -> list[Row]:
    size = BYTES * setting["parameters"] * setting["workers"]
    rows = []
    for way, limit in LIMIT.items():
        own = {number: value for (name, number), value in slowest.items() if name == way and (limit, number) in slowest}
        if own:
            middle, low, high = median_and_range(slowest[limit, number] / value for number, value in own.items())
            gigabytes = size / median(own.values()) / 1e9
            cells = {"GB_per_s": gigabytes, "of_limit": middle, "of_limit_min": low, "of_limit_max": high}
            rows.append({**setting, "way": way, **{name: round(cell, 3) for name, cell in cells.items()}})
    return rows


if __name__ == "__main__":
    main()
