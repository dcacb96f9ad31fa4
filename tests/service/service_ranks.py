"""Real processes for the tests: started from a clean server process, given a store, and always ended."""

import multiprocessing
import os
import signal
import time
import traceback
from contextlib import contextmanager

import torch
from torch.distributed import TCPStore

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "lightning_easgd.served_center"])


class Rank:
    def __init__(self, target, *arguments):
        self._results, sender = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_enter, args=(sender, target, arguments), daemon=True)
        self.process.start()
        sender.close()

    def result(self, timeout=60.0):
        """What the target returned; an AssertionError with its traceback if it raised."""
        assert self._results.poll(timeout), f"process {self.process.pid} has not answered for {timeout} s"
        kind, value = self._results.recv()
        assert kind == "result", value
        return value

    def ends_within(self, seconds):
        self.process.join(seconds)
        return self.process.exitcode is not None

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self):
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(10)


def _enter(sender, target, arguments):
    torch.set_num_threads(1)
    try:
        sender.send(("result", target(*arguments)))
    except BaseException:
        sender.send(("error", traceback.format_exc()))
        raise


@contextmanager
def running(*ranks):
    """Yield the ranks; end them all in any case."""
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.end()


@contextmanager
def world(target, size, *arguments):
    """Processes that run ``target(store address, rank, *arguments)`` over one store, served from here."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with running(*[Rank(target, server.port, rank, *arguments) for rank in range(size)]) as ranks:
        yield server, ranks


def connect(port):
    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


def wait_until(condition, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def is_stopped(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"
