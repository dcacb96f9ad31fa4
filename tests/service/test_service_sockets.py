"""Connections between nodes: dead, stopped, silent and uninvited peers."""

import os
import signal
import socket
import threading
import time

import pytest
import torch
from service_ranks import Rank, die, running, wait_until

from lightning_easgd.method.rules import CenterRule, PushExchange, SymmetricExchange
from lightning_easgd.served_center import CenterError, CenterTimeoutError, InProcessCenter, Layout, WorkerLostError
from lightning_easgd.served_center.tcp_client import RemoteShard
from lightning_easgd.served_center.tcp_server import ShardServer
from lightning_easgd.transport.tcp_wire import GREETING, Operation, Request

LAYOUT = Layout.cut([(0, 1000)], 400)
SECRET = b"0123456789abcdef"


def local_center(rule=None, timeout=5.0):
    return InProcessCenter(LAYOUT, torch.float32, rule or PushExchange(), timeout=timeout)


def connect(port, timeout=5.0, secret=SECRET):
    return RemoteShard(("127.0.0.1", port), server=3, rank=1, secret=secret, timeout=timeout, lost=set())


def serving_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("easgd")]


@pytest.fixture
def server():
    server = ShardServer(local_center(), SECRET, 0.5, set())
    yield server
    server.close()
    deadline = time.monotonic() + 5
    while serving_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert serving_threads() == []


def ones(chunk=0):
    return torch.ones(LAYOUT.size(chunk))


def test_exchange_read_and_write(server):
    shard = connect(server.port)
    shard.write(1, torch.full((LAYOUT.size(1),), 2.0), 0, 5)
    pending = [shard.begin(1, ones(1), 1.0) for _ in range(10)]
    assert [request.wait() for request in pending] == list(range(5, 15))
    into = torch.empty(LAYOUT.size(1))
    assert shard.read(1, into, 0) == 15
    assert (into == 12.0).all()
    shard.close()
    shard.close()
    with pytest.raises(CenterError, match="closed on this rank"):
        shard.begin(0, ones(), 1.0)


def test_more_in_flight_than_the_kernel_buffers():
    layout = Layout.cut([(0, 20_000_000)])
    server = ShardServer(InProcessCenter(layout, torch.float32, SymmetricExchange()), SECRET, 5.0, set())
    shard = connect(server.port)
    x = torch.ones(20_000_000)
    pending = [shard.begin(chunk, x[part], 0.5) for chunk, part in enumerate(layout.chunks)]
    assert {request.wait() for request in pending} == {0}
    assert (x == 0.5).all()
    shard.close()
    server.close()


def test_several_threads_on_one_connection(server):
    shard = connect(server.port)

    def push():
        for _ in range(100):
            shard.begin(0, ones(), 1.0).wait()

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    into = torch.empty(LAYOUT.size(0))
    shard.read(0, into, 0)
    assert (into == 400).all()
    shard.close()


def test_an_uninvited_client_is_turned_away(server):
    shard = connect(server.port, secret=b"x" * 16)
    with pytest.raises(WorkerLostError, match="rank 3"):
        shard.begin(0, ones(), 1.0).wait()
    shard.close()


def test_a_client_that_stops_in_the_middle_of_a_message_is_given_up(server):
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(GREETING.pack(SECRET, 2) + Request(Operation.EXCHANGE, 0, 0, 0, 1.0).pack() + b"\0" * 100)
        wait_until(lambda: len(serving_threads()) == 2)
        wait_until(lambda: len(serving_threads()) == 1, 5)  # only the accepting one is left
    other = connect(server.port)
    other.begin(0, ones(), 1.0).wait()
    into = torch.empty(LAYOUT.size(0))
    assert other.read(0, into, 0) == 1
    assert (into == 1).all()
    other.close()


def test_an_error_at_the_server_reaches_the_client():
    center = local_center(timeout=0.2)
    server = ShardServer(center, SECRET, 5.0, set())
    shard = connect(server.port)
    with (
        center._holding(0),
        pytest.raises(CenterTimeoutError, match=r"chunk 0 failed.*another thread"),
    ):
        shard.begin(0, ones(), 1.0).wait()
    shard.begin(0, ones(), 1.0).wait()
    shard.close()
    server.close()


class Ends(CenterRule):
    """Sound at first."""

    def move_(self, stores, difference, rate, version):
        if version == 1:
            raise ZeroDivisionError("nothing left")
        stores[0].add_(difference, alpha=rate)


def test_what_a_rule_raises_reaches_the_client_as_the_rules_error():
    server = ShardServer(local_center(PushExchange(Ends())), SECRET, 5.0, set())
    shard = connect(server.port)
    shard.begin(0, ones(), 1.0).wait()
    with pytest.raises(CenterError, match=r"server=3.*Ends\(\).*move_.* ZeroDivisionError\('nothing left'\)") as error:
        shard.begin(0, ones(), 1.0).wait()
    assert not isinstance(error.value, WorkerLostError)
    shard.begin(1, ones(1), 1.0).wait()
    shard.close()
    server.close()


class Learnt(CenterRule):
    def __init__(self):
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def move_(self, stores, difference, rate, version):
        stores[0].add_(self.factor * difference * rate)


def test_a_rule_that_holds_a_parameter_takes_no_gradient():
    """Grad mode is each thread's own, and those that serve begin with it."""
    server = ShardServer(local_center(PushExchange(Learnt())), SECRET, 5.0, set())
    shard = connect(server.port)
    answer = ones()
    shard.begin(0, answer, 1.0).wait()
    assert (answer == 0.5).all()
    assert not answer.requires_grad
    assert not server._shard._stores[0][0].requires_grad
    shard.close()
    server.close()


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(WorkerLostError, match=r"rank 3.*cannot be reached"):
        connect(port)


def serve(connection):
    server = ShardServer(local_center(), SECRET, 5.0, set())
    connection.send(server.port)
    time.sleep(60)


@pytest.fixture
def remote_server():
    from service_ranks import CONTEXT

    ours, theirs = CONTEXT.Pipe()
    with running(Rank(serve, theirs)) as (rank,):
        assert ours.poll(30)
        yield rank, ours.recv()


def test_a_killed_server_is_named_at_once(remote_server):
    rank, port = remote_server
    shard = connect(port, timeout=10.0)
    shard.begin(0, ones(), 1.0).wait()
    rank.send(signal.SIGKILL)
    started = time.monotonic()
    rank.process.join(5)
    with pytest.raises(WorkerLostError, match="rank 3") as error:
        shard.begin(0, ones(), 1.0).wait()
    assert error.value.ranks == {3}
    assert time.monotonic() - started < 2
    shard.close()
    assert serving_threads() == []


def test_a_stopped_server_is_named_within_the_timeout(remote_server):
    rank, port = remote_server
    shard = connect(port, timeout=0.5)
    shard.begin(0, ones(), 1.0).wait()
    rank.send(signal.SIGSTOP)
    time.sleep(0.3)  # a signal takes a moment on a busy machine
    started = time.monotonic()
    with pytest.raises(CenterTimeoutError, match="rank 3 has not answered"):
        shard.begin(0, ones(), 1.0).wait()
    assert 0.4 < time.monotonic() - started < 3
    shard.close()
    assert serving_threads() == []


def exchange_fork_and_die(port):
    shard = connect(port)
    shard.begin(0, ones(), 1.0).wait()
    if os.fork() == 0:
        time.sleep(20)  # a data loader's worker outlives its rank
        os._exit(0)
    die()


def test_a_forked_child_does_not_keep_its_dead_parents_connection_open():
    lost = set()
    server = ShardServer(local_center(), SECRET, 5.0, lost)
    with running(Rank(exchange_fork_and_die, server.port)) as (client,):
        assert client.ends_within(20)
        wait_until(lambda: lost == {1}, 3)
        wait_until(lambda: len(serving_threads()) == 1, 3)
    server.close()
