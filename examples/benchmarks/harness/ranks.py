"""Run a function as the ranks of one job: forked processes, a hard limit of time, messages to the parent."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

__all__ = ["Place", "RanksError", "Send", "one_host", "run_ranks"]

Send = Callable[[Any], None]

_CONTEXT = multiprocessing.get_context("fork")


class RanksError(RuntimeError):
    """A rank raised, died, or was still running after the limit; the others were ended."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        node: Its node; ranks of one node have the same address.
        local_rank: Its number on the node.
        local_size: Ranks on the node.
        address: The address at which other ranks reach it.
        interface: The network interface of that address, None to let gloo choose.
        enter: Called in the new process before anything else, to go there.
    """

    node: int
    local_rank: int
    local_size: int
    address: str
    interface: str | None
    enter: Callable[[], None]


def one_host(ranks: int) -> list[Place]:
    """Places of ranks that all run here."""
    return [Place(0, rank, ranks, "127.0.0.1", None, lambda: None) for rank in range(ranks)]


def run_ranks(
    function: Callable[..., None], places: Sequence[Place], *arguments: Any, timeout: float, receive: Send
) -> None:
    """Call ``function(rank, place, send, *arguments)`` on each rank, in processes as torchrun would start them.

    Args:
        function: What a rank does; what it gives to ``send`` arrives here.
        places: One for each rank; the first is that of rank 0, where the ranks meet.
        *arguments: For the function; inherited, not pickled.
        timeout: Seconds after which all ranks are killed.
        receive: Called here with every message.

    Raises:
        RanksError: If a rank fails or the time is over. What was received until then counts.
    """
    port = _free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in places]
    processes = [
        # Should a second signal interrupt the end of this function, daemons are ended with the process.
        _CONTEXT.Process(target=_be_rank, args=(rank, places, port, pipes, function, arguments), daemon=True)
        for rank in range(len(places))
    ]
    sys.stdout.flush()  # else every child writes it once more
    try:
        for process in processes:
            process.start()
        for _, writer in pipes:
            writer.close()
        _listen({reader: rank for rank, (reader, _) in enumerate(pipes)}, time.monotonic() + timeout, timeout, receive)
    finally:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        for reader, _ in pipes:
            reader.close()


def _listen(readers: dict[Connection, int], deadline: float, timeout: float, receive: Send) -> None:
    while readers:
        ready = wait(list(readers), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RanksError(f"ranks {sorted(readers.values())} were still running after {timeout:g} s")
        for reader in ready:
            assert isinstance(reader, Connection)
            try:
                kind, content = reader.recv()
            except EOFError:
                raise RanksError(f"rank {readers[reader]} died") from None
            if kind == "error":
                raise RanksError(f"rank {readers[reader]} failed:\n{content}")
            if kind == "end":
                del readers[reader]
            else:
                receive(content)


def _be_rank(
    rank: int,
    places: Sequence[Place],
    port: int,
    pipes: Sequence[tuple[Connection, Connection]],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    place, writer = places[rank], pipes[rank][1]
    for number, (reader, other) in enumerate(pipes):  # else nobody would see that another rank's end has closed
        reader.close()
        if number != rank:
            other.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler is about what the parent has made
    try:
        place.enter()
        os.environ |= _environment(rank, places, port)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        function(rank, place, lambda message: writer.send(("message", message)), *arguments)
        writer.send(("end", None))
    except BaseException:
        writer.send(("error", traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of a peer's library may never end


def _environment(rank: int, places: Sequence[Place], port: int) -> dict[str, str]:
    """What torchrun sets, and where gloo listens."""
    place = places[rank]
    environment = {
        "RANK": rank,
        "LOCAL_RANK": place.local_rank,
        "GROUP_RANK": place.node,
        "WORLD_SIZE": len(places),
        "LOCAL_WORLD_SIZE": place.local_size,
        "MASTER_ADDR": places[0].address,
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "benchmark",
    }
    interface = {} if place.interface is None else {"GLOO_SOCKET_IFNAME": place.interface}
    return {name: str(value) for name, value in environment.items()} | interface


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
