"""Sums and messages on direct connections: right, in order, in few delays, and never waited for without an end."""

import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from channels import on_threads, rendezvous_of
from ranks import end_ranks
from torch.distributed import HashStore
from torch.distributed.distributed_c10d import _get_default_store

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.averagers.sync.choice import all_reduced_sums
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.channel import Failure
from lightning_easgd.transport.direct_channel import DirectChannel, DirectMessageChannel
from lightning_easgd.transport.mesh import LANES, Mesh
from lightning_easgd.transport.mesh_opening import connections, open_mesh
from lightning_easgd.transport.network import OwnAddress

pytestmark = pytest.mark.timeout(60)
HERE = OwnAddress("127.0.0.1", "127.0.0.1")


def on_meshes(work, workers, seconds=20.0):
    """Call ``work(mesh)`` on a thread per worker; return the results."""
    store = HashStore()

    def be_worker(rank):
        rendezvous = rendezvous_of(store, rank, workers)
        mesh = Mesh(rank, connections(rendezvous, HERE), Failure(timedelta(seconds=seconds), "Test"))
        try:
            return work(mesh)
        finally:
            mesh.close()
            rendezvous.close()

    return on_threads(be_worker, workers)


def numbers(rank, numel, dtype):
    return (torch.arange(numel) * 10 + rank).to(dtype)


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize(
    ("numel", "dtype"),
    [(9, torch.int64), (0, torch.float32), (1, torch.float64), (1024, torch.float32), (1025, torch.float32),
     (70_001, torch.float32), (40_000, torch.float64), (5000, torch.bfloat16)],
)  # fmt: skip
def test_sums_are_those_in_the_order_of_the_ranks(workers, numel, dtype):
    def work(mesh):
        buffer = numbers(mesh.rank, numel, dtype)
        DirectChannel(mesh, "Test").sum(buffer).wait()
        return buffer

    expected = sum(numbers(rank, numel, torch.float64) for rank in range(workers))
    first, *others = on_meshes(work, workers)
    assert first.double() == pytest.approx(expected, rel=0.02 if dtype is torch.bfloat16 else 1e-6)
    assert all(torch.equal(first, other) for other in others)


def test_many_sums_of_all_sizes_may_be_under_way_and_workers_far_apart():
    sizes = [3, 50_000, 9, 2000, 100_000, 1, 30_000] * 3

    def work(mesh):
        channel = DirectChannel(mesh, "Test")
        buffers = [torch.full((size,), float(mesh.rank + number)) for number, size in enumerate(sizes)]
        transfers = []
        for number, buffer in enumerate(buffers):
            if mesh.rank == number % 3:
                time.sleep(0.01)
            transfers.append(channel.sum(buffer))
        for transfer in reversed(transfers):
            transfer.wait()
        return [(buffer.min().item(), buffer.max().item()) for buffer in buffers]

    expected = [(3.0 * number + 3.0,) * 2 for number in range(len(sizes))]
    assert on_meshes(work, 3) == [expected] * 3


def test_a_shared_vector_is_that_of_its_source():
    def work(mesh):
        buffer = numbers(mesh.rank, 3000, torch.float32)
        DirectChannel(mesh, "Test").share(buffer, 1).wait()
        return torch.equal(buffer, numbers(1, 3000, torch.float32))

    assert on_meshes(work, 3) == [True] * 3


def test_what_follows_a_message_begins_when_it_is_there():
    """Without anybody who asks: the second message comes while all have something else to do."""

    def work(mesh):
        channel = DirectMessageChannel(mesh)
        outgoing = torch.full((3, 100), mesh.rank, dtype=torch.uint8)
        incoming, everyones = torch.zeros_like(outgoing), torch.zeros_like(outgoing)
        by = []

        def then():
            by.append(threading.current_thread().name)
            own = incoming.sum(0).to(torch.uint8) - incoming[mesh.rank] + mesh.rank
            return channel.all_gather(own, everyones)

        transfer = channel.all_to_all(outgoing, incoming, then)
        deadline = time.monotonic() + 20
        while not transfer.arrived and time.monotonic() < deadline:
            time.sleep(0.001)
        transfer.wait()
        return by, everyones[:, 0].tolist()

    assert on_meshes(work, 3) == [(["easgd-mesh"], [3, 3, 3])] * 3


@pytest.mark.parametrize(("numel", "delays"), [(9, 1), (10_000, 2)])
@pytest.mark.parametrize("workers", [2, 4])
def test_one_way_delays_of_a_sum(monkeypatch, workers, numel, delays):
    """Nothing that is sent waits for more than what came before in one delay, or in two."""
    depth = threading.local()
    deepest = []
    post = Mesh.post

    def counting(self, lane, sends, receives, then=None):
        own = getattr(depth, "value", 0) + 1
        deepest.append(own)

        def following():
            depth.value = own
            try:
                return then()
            finally:
                depth.value = 0

        return post(self, lane, sends, receives, following if then else None)

    monkeypatch.setattr(Mesh, "post", counting)
    on_meshes(lambda mesh: DirectChannel(mesh, "Test").sum(torch.ones(numel)).wait(), workers)
    assert max(deepest) == delays


@pytest.mark.parametrize("numel", [9, 9000])
def test_bytes_are_those_that_are_counted(monkeypatch, numel):
    sent = []
    post = Mesh.post

    def counting(self, lane, sends, receives, then=None):
        sent.append((self.rank, sum(len(data) for data in sends.values())))
        return post(self, lane, sends, receives, then)

    monkeypatch.setattr(Mesh, "post", counting)

    def work(mesh):
        channel = DirectChannel(mesh, "Test")
        channel.sum(torch.ones(numel)).wait()
        return channel.bytes_sent(4 * numel)

    counted = on_meshes(work, 3)
    assert counted == [sum(nbytes for rank, nbytes in sent if rank == worker) for worker in range(3)]


def test_workers_that_add_up_different_things_are_told():
    def work(mesh):
        with pytest.raises(ExchangeError) as error:
            DirectChannel(mesh, "Test").sum(torch.ones(2000 + 2 * mesh.rank)).wait()
        return str(error.value)

    texts = on_meshes(work, 2)  # who sees it first ends the connection
    assert any("add up different things" in text for text in texts)
    assert all("Test(timeout=" in text for text in texts)


def test_one_who_does_not_come_is_waited_for_no_longer_than_the_timeout():
    def work(mesh):
        if mesh.rank == 0:
            time.sleep(1.5)
            return None
        started = time.monotonic()
        with pytest.raises(ExchangeError, match="have not come"):
            DirectChannel(mesh, "Test").sum(torch.ones(9000)).wait()
        with pytest.raises(ExchangeError):  # and not again
            DirectChannel(mesh, "Test").sum(torch.ones(9)).wait()
        return time.monotonic() - started

    _, waited = on_meshes(work, 2, seconds=0.5)
    assert 0.4 < waited < 1.2


def test_who_has_ended_is_known_at_once():
    def work(mesh):
        if mesh.rank == 0:
            return None  # its mesh is closed
        started = time.monotonic()
        with pytest.raises(ExchangeError, match="worker 0 has ended its connection"):
            DirectChannel(mesh, "Test").sum(torch.ones(9)).wait()
        return time.monotonic() - started

    _, waited = on_meshes(work, 2)
    assert waited < 5.0


def test_what_fails_on_the_meshs_thread_is_told():
    def work(mesh):
        def then():
            raise ValueError("torn")

        transfer = mesh.post(0, {1 - mesh.rank: memoryview(b"a")}, {1 - mesh.rank: memoryview(bytearray(1))}, then)
        with pytest.raises(ExchangeError, match="torn"):
            transfer.wait()

    on_meshes(work, 2)


def test_no_thread_and_no_descriptor_is_left():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        on_meshes(lambda mesh: DirectChannel(mesh, "Test").sum(torch.ones(9)).wait(), 2)
    assert not [thread for thread in threading.enumerate() if thread.name == "easgd-mesh"]
    assert len(os.listdir("/proc/self/fd")) <= before


def test_strangers_are_turned_away():
    """A connection that does not know the secret takes nobody's place."""
    store, strangers = HashStore(), ExitStack()

    def be_worker(rank):
        rendezvous = rendezvous_of(store, rank, 2)
        if rank == 1:
            host, port, _ = rendezvous.find("address", [0])[0]
            for said in (b"", b"GET / HTTP/1.1\r\n\r\n" * 3):
                stranger = strangers.enter_context(socket.create_connection((host, port)))
                stranger.sendall(said)
        links = connections(rendezvous, HERE)
        mesh = Mesh(rank, links, Failure(timedelta(seconds=20), "Test"))
        total = torch.ones(1)
        DirectChannel(mesh, "Test").sum(total).wait()
        mesh.close()
        rendezvous.close()
        return len(links), total.item()

    with strangers:
        assert on_threads(be_worker, 2) == [(LANES, 2.0)] * 2


def summing(interrupt):
    """Be a rank that adds up without end; rank 1 is interrupted at its fourth sum."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    failure = Failure(timedelta(seconds=1.5), "Test")
    channel = DirectChannel(open_mesh(dist.get_rank(), 2, _get_default_store(), failure), "Test")
    for number in range(10):
        if dist.get_rank() == 1 and number == 3:
            interrupt()
        started = time.monotonic()
        try:
            channel.sum(torch.ones(100_000)).wait()
        except ExchangeError as error:
            return str(error), time.monotonic() - started
    return None


def die_before_a_child():
    """A data loader's worker may live for a while after its rank."""
    if os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("interrupt", "text", "limit"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "worker 1 has ended its connection", 1.0),
        (die_before_a_child, "worker 1 has ended its connection", 1.0),
        (lambda: time.sleep(6), "have not come", 3.0),
    ],
    ids=["killed", "killed before its child", "hanging"],
)
def test_a_lost_worker_ends_a_sum(interrupt, text, limit):
    error, waited = end_ranks(summing, 2, interrupt, timeout=60)[0].value
    assert text in error
    assert waited < limit


def never_coming():
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    if dist.get_rank() == 1:
        time.sleep(3)
        return None
    with pytest.raises(ExchangeError, match=r"Test: worker 0 cannot connect .*process_group_backend='gloo'") as error:
        open_mesh(0, 2, _get_default_store(), Failure(timedelta(seconds=1), "Test"))
    return str(error.value)


def test_a_worker_that_never_comes_is_named():
    assert "ranks [1] have not come" in end_ranks(never_coming, 2, timeout=60)[0].value


def test_an_exchange_over_direct_connections():
    """The sum that the strategy makes of it."""

    def work(mesh):
        values = FlatTensors([[torch.zeros(3000), torch.zeros(7)]], torch.float32)
        values.flat.zero_()
        total = all_reduced_sums(lambda: DirectChannel(mesh, "Test"), 4)(ReplicatedCenter(values))
        for exchange in range(3):
            total.make_room()
            total.wire.flat.fill_(mesh.rank + exchange)
            total.start([0.5])
            for _ in range(4):
                total.advance()
            total.finish()
        return total.center.flat.unique().tolist()

    assert on_meshes(work, 3) == [[0.5 * (3 + 6 + 9)]] * 3
