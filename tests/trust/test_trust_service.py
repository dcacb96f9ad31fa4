"""Strangers, silent peers, refused locks, odd networks, processes that are gone: what the served center withstands."""

import ctypes
import errno
import fcntl
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from ranks import run_ranks
from torch.distributed import HashStore, TCPStore

from lightning_easgd.method.rules import PushExchange
from lightning_easgd.served_center import (
    CenterError,
    InProcessCenter,
    Layout,
    SharedMemoryCenter,
    SharedMemoryUnavailableError,
    WorkerLostError,
    open_center,
)
from lightning_easgd.served_center.tcp_client import RemoteShard
from lightning_easgd.served_center.tcp_server import ShardServer
from lightning_easgd.transport import network, strangers
from lightning_easgd.transport.errors import StoreLostError
from lightning_easgd.transport.liveness import WatchedProcess, own_process
from lightning_easgd.transport.shared_vectors import SharedVector
from lightning_easgd.transport.store_client import StoreClient
from lightning_easgd.transport.tcp_wire import GREETING, REPLY_SIZE, Operation, Reply, Request

pytestmark = pytest.mark.timeout(60)
LAYOUT = Layout.cut([(0, 1000)], 400)
SIZE = LAYOUT.size(0)
SECRET = b"0123456789abcdef"


def wait_until(condition, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


@pytest.fixture
def served():
    center = InProcessCenter(LAYOUT, torch.float32, PushExchange(), timeout=5.0)
    server = ShardServer(center, SECRET, 5.0, set())
    yield center, server
    server.close()


def connect(port, timeout=5.0):
    return RemoteShard(("127.0.0.1", port), server=3, rank=1, secret=SECRET, timeout=timeout, lost=set())


def serving_threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "easgd-serve"]


class TestServer:
    @pytest.mark.parametrize(
        "request_",
        [
            Request(0, 0, 0, 7, 1.0),
            Request(9, 0, 0, 7, 1.0),
            Request(Operation.WRITE, 0, 77, 7, 1.0),
            Request(Operation.READ, 5, 0, 7, 1.0),
            Request(Operation.WRITE, 5, 0, 7, 1.0),
        ],
        ids=["operation 0", "operation 9", "a chunk that is not there", "a store to read", "a store to write"],
    )
    def test_what_it_does_not_understand_changes_nothing(self, served, request_):
        """Kind: an unknown operation was executed as a write."""
        center, server = served
        with socket.create_connection(("127.0.0.1", server.port), 5) as client:
            client.sendall(GREETING.pack(SECRET, 2) + request_.pack() + torch.ones(SIZE).numpy().tobytes())
            answer = b""
            while len(answer) < REPLY_SIZE:
                answer += client.recv(REPLY_SIZE - len(answer))
            assert Reply.unpack(answer).failed
            wait_until(lambda: is_closed(client))
        into = torch.empty(SIZE)
        assert center.read(0, into) == 0
        assert not into.any()

    def test_strangers_are_few_and_have_no_threads(self, served, monkeypatch):
        """Kind: as many threads as there were silent connections."""
        _, server = served
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 * strangers.MOST_STRANGERS)]
        shard = connect(server.port)
        shard.begin(0, torch.ones(SIZE), 1.0).wait()
        assert len(serving_threads()) == 1
        wait_until(lambda: sum(map(is_closed, silent)) >= strangers.MOST_STRANGERS)
        assert not is_closed(silent[-1])
        shard.close()
        for each in silent:
            each.close()

    def test_strangers_have_a_deadline_as_a_whole(self, served, monkeypatch):
        """Kind: one byte now and then kept a connection for ever."""
        monkeypatch.setattr(strangers, "GREETING_TIMEOUT", 0.5)
        _, server = served
        with socket.create_connection(("127.0.0.1", server.port)) as dripping:
            started = time.monotonic()
            while time.monotonic() - started < 10 and not is_closed(dripping):
                try:
                    dripping.send(SECRET[:1])
                except OSError:
                    break
                time.sleep(0.1)
            assert time.monotonic() - started < 5

    def test_who_has_connected_in_time_is_served_after_the_door_is_shut(self, served):
        """Kind: connections that the kernel had taken and nobody had accepted yet were reset."""
        _, server = served
        shards = [connect(server.port) for _ in range(20)]
        server.stop_accepting()
        for shard in shards:
            shard.begin(0, torch.ones(SIZE), 1.0).wait()
            shard.close()

    def test_closing_does_not_wait_for_a_silent_peer(self):
        """Kind: three timeouts one after the other at the end of a run."""
        with socket.create_server(("127.0.0.1", 0)) as deaf:
            shard = connect(deaf.getsockname()[1], timeout=20.0)
            large = torch.ones(20_000_000)  # more than the kernel takes: a thread is stuck in sending it
            sender = threading.Thread(target=raises, args=(CenterError, lambda: shard.begin(0, large, 1.0)))
            sender.start()
            time.sleep(0.3)
            started = time.monotonic()
            shard.close()
            assert time.monotonic() - started < 8
            sender.join(10)
            assert not sender.is_alive()


def raises(kind, call):
    with pytest.raises(kind):
        call()


def is_closed(connection):
    connection.setblocking(False)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


FORK = multiprocessing.get_context("fork")


@contextmanager
def stopped_store():
    """A store whose server a signal stops."""
    port, sender = FORK.Pipe(duplex=False)
    server = FORK.Process(target=serve, args=(sender,), daemon=True)
    server.start()
    try:
        assert port.poll(20)
        store = TCPStore("127.0.0.1", port.recv(), is_master=False, wait_for_workers=False)
        yield store, lambda: stop(server.pid)
    finally:
        server.kill()
        server.join()


def serve(sender):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sender.send(store.port)
    time.sleep(60)


def stop(pid):
    """Send SIGSTOP, and wait until it has come: until then the process may answer."""
    os.kill(pid, signal.SIGSTOP)

    def is_stopped():
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "T"

    wait_until(is_stopped)


CALLS = {
    "set": lambda client: (client.set("key", ""), client.check(["key"])),  # a set alone waits for no answer
    "check": lambda client: client.check(["key"]),
    "get": lambda client: client.get("there"),
    "multi_get": lambda client: client.multi_get(["there"]),
}


class TestStoreClient:
    def test_calls_and_prefixes(self):
        client = StoreClient(HashStore(), 5.0)
        below = client.under("a").under("b")
        below.set("key", "value")
        assert below.check(["key"])
        assert not client.check(["key"])
        assert client.get("a/b/key") == below.get("key") == b"value"
        assert below.multi_get(["key", "key"]) == [b"value", b"value"]
        client.close()
        with pytest.raises(StoreLostError, match="closed"):
            below.check(["key"])

    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
    @pytest.mark.parametrize("connected", [True, False])
    def test_no_call_outlasts_its_deadline(self, call, connected):
        """Kind: every call of a store whose server is stopped; also the first, which connects."""
        with stopped_store() as (store, stop):
            client = StoreClient(store, 1.0)
            store.set("there", "")
            if connected:
                call(client)
            stop()
            started = time.monotonic()
            with pytest.raises(StoreLostError, match="rank 0, which serves the store, has not answered for 1 s"):
                call(client)
            with pytest.raises(StoreLostError):  # at once
                call(client)
            client.close()
            assert time.monotonic() - started < 8

    def test_closing_frees_those_who_wait(self):
        with stopped_store() as (store, stop):
            client = StoreClient(store, 30.0)
            client.set("there", "")
            stop()
            thread = threading.Thread(target=raises, args=(StoreLostError, lambda: client.get("there")))
            thread.start()
            time.sleep(0.2)
            client.close()
            thread.join(10)
            assert not thread.is_alive()

    def test_a_launcher_that_serves_the_store_is_not_taken_for_rank_0(self):
        with stopped_store() as (store, stop):
            client = StoreClient(store, 0.5, server=None)
            stop()
            with pytest.raises(StoreLostError, match="the launcher, which serves"):
                client.set("key", "")
            client.close()


class TestProcesses:
    def test_killed_stopped_and_reused(self):
        """Kind: a killed neighbour is dead at once, without pidfd_open; a number given again is another process."""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        host, _, _ = own_process().split(" ")
        with open(f"/proc/{child.pid}/stat") as file:
            start = file.read().rpartition(")")[2].split()[19]
        watched = WatchedProcess.find(f"{host} {child.pid} {start}")
        reused = WatchedProcess.find(f"{host} {child.pid} {int(start) - 1}")
        assert (watched.has_ended, watched.is_stopped, reused.has_ended) == (False, False, True)
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: watched.is_stopped)
        child.kill()
        wait_until(lambda: watched.has_ended)  # a zombie: nobody has waited for it
        child.wait()
        assert watched.has_ended
        assert not watched.is_stopped

    def test_a_process_of_another_host_is_not_looked_for_here(self):
        _, number, start = own_process().split(" ")
        assert WatchedProcess.find(f"other:pid:[1] {number} {start}") is None


def refuse_locks(monkeypatch, error):
    real = fcntl.fcntl

    def refused(descriptor, command, *arguments):
        if command == fcntl.F_OFD_SETLK:
            raise OSError(error, os.strerror(error))
        return real(descriptor, command, *arguments)

    monkeypatch.setattr(fcntl, "fcntl", refused)


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EPERM])
def test_locks_that_are_refused_are_found_when_the_center_is_made(monkeypatch, error):
    """Kind: the platform has the call, and the kernel, sandbox or file refuses it."""
    gc.collect()  # what tests before this one have left to it
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        refuse_locks(patch, error)
        with pytest.raises(SharedMemoryUnavailableError, match="refused"):
            SharedMemoryCenter(LAYOUT, torch.float32, PushExchange(), held=[0], rank=0)
    assert len(os.listdir("/proc/self/fd")) <= before  # a thread of a test before may close one meanwhile


def test_ranks_whose_locks_are_refused_use_sockets():
    def run():
        rank = int(os.environ["RANK"])
        warns = pytest.warns(RuntimeWarning, match="use sockets instead") if rank == 0 else nullcontext()
        with pytest.MonkeyPatch.context() as patch, warns:
            if rank == 1:
                refuse_locks(patch, errno.EINVAL)
            store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, is_master=rank == 0)
            center = open_center(
                store,
                rank=rank,
                nodes=[[0, 1]],
                segments=[(0, 1000)],
                dtype=torch.float32,
                exchange=PushExchange(),
                initial=torch.zeros(1000),
                timeout=20.0,
            )
        center.exchange_all(torch.ones(1000), [1.0])
        center.control.meet("pushed")
        into = torch.empty(1000)
        center.read_all(into)
        center.control.meet("read")
        center.close()
        time.sleep(1.0 if rank == 0 else 0.0)  # it serves the store, in which the other looks for it
        return into.unique().tolist()

    assert run_ranks(run, 2) == [[2.0], [2.0]]


class TestNetwork:
    def test_an_interface_with_ipv6_alone(self, monkeypatch, tmp_path):
        (tmp_path / "if_inet6").write_text(
            "fe800000000000000000000000000001 05 40 20 80   link6\n"
            "fe80000000000000fc00fffe00000001 04 40 20 80   only6\n"
            "fd000000000000000000000000000002 04 40 00 82   only6\n"
        )
        monkeypatch.setattr(network, "_IPV6_ADDRESSES", str(tmp_path / "if_inet6"))
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "only6")
        assert network.own_address(None) == ("fd00::2", "fd00::2")
        for name in ("link6", "nonsense"):
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
            with pytest.raises(CenterError, match=f"^Own: GLOO_SOCKET_IFNAME='{name}' names no interface"):
                network.own_address(("127.0.0.1", 1), "Own")

    @pytest.mark.parametrize(("host", "elsewhere"), [("127.0.0.1", "127.0.0.2"), ("::1", "127.0.0.1")])
    def test_the_server_listens_at_the_interface_alone(self, host, elsewhere):
        """Kind: who names an interface wants nothing to listen on the others."""
        if ":" in host and not socket.has_ipv6:
            pytest.skip("no IPv6")
        center = InProcessCenter(LAYOUT, torch.float32, PushExchange())
        server = ShardServer(center, SECRET, 5.0, set(), host=host)
        shard = RemoteShard((host, server.port), server=3, rank=1, secret=SECRET, timeout=5.0, lost=set())
        shard.begin(0, torch.ones(SIZE), 1.0).wait()
        with pytest.raises(WorkerLostError, match="cannot be reached"):
            RemoteShard((elsewhere, server.port), server=3, rank=1, secret=SECRET, timeout=1.0, lost=set())
        shard.close()
        server.close()

    def test_the_loopback_interface_by_name(self, monkeypatch):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        assert network.own_address(None) == ("127.0.0.1", "127.0.0.1")


class TestSharedCounts:
    """Kind: what was written before a count is published is there for whoever sees the count."""

    def test_every_reader_sees_every_count(self):
        own = SharedVector.create(10, torch.float32)
        own.admit(3)
        own.publish_written(2)
        readers = [SharedVector.attach(own.address, torch.float32, reader) for reader in range(3)]  # late
        own.publish_written(2)  # again
        assert [reader.written for reader in readers] == [2, 2, 2]
        own.publish_written(5)
        own.publish_read(4)
        assert [(reader.written, reader.read) for reader in readers] == [(5, 4)] * 3
        assert (own.written, own.read) == (5, 4)
        for each in (own, *readers):
            each.close()

    def test_what_is_shown_has_been_published_through_a_function_that_synchronises_memory(self, monkeypatch):
        """POSIX 4.12 names them; plain reads and writes, and system calls, are not among them."""
        from lightning_easgd.transport import shared_counts

        calls = []
        real = shared_counts._library()

        class Watched:
            def __getattr__(self, name):
                function = getattr(real, name)
                return lambda *arguments: (calls.append(name), function(*arguments))[1]

        monkeypatch.setattr(shared_counts, "_library", Watched)
        own = SharedVector.create(4, torch.float32)
        own.admit(1)
        other = SharedVector.attach(own.address, torch.float32)
        own.elements.fill_(3.0)
        own.publish_written(1)
        assert calls.count("sem_post") == 1
        assert other.written == 1
        assert calls.count("sem_trywait") >= 1
        assert (other.elements == 3.0).all()
        own.close()
        other.close()

    def test_the_room_for_a_semaphore_is_enough(self):
        from lightning_easgd.transport.shared_counts import SEMAPHORE_BYTES

        library = ctypes.CDLL(None)
        room = ctypes.create_string_buffer(b"\xaa" * 2 * SEMAPHORE_BYTES, 2 * SEMAPHORE_BYTES)
        library.sem_init(ctypes.byref(room), 1, 7)
        assert room.raw[SEMAPHORE_BYTES:] == b"\xaa" * SEMAPHORE_BYTES

    def test_the_process_group_is_used_where_there_are_no_semaphores(self, monkeypatch):
        from lightning_easgd.transport import shared_counts

        def missing():
            raise SharedMemoryUnavailableError("none.")

        monkeypatch.setattr(shared_counts, "_library", missing)
        own = SharedVector.create(4, torch.float32)
        with pytest.raises(SharedMemoryUnavailableError):
            own.admit(2)
        own.close()
