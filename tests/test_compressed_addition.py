"""Compressed exchanges of workers that come and go: on threads, against the exact sums."""

import threading
import warnings
from functools import partial

import pytest
import torch
from channels import on_threads
from ranks import run_ranks
from test_compressed_sum import CODECS, SHARES, Messages, center_of, differences, share_of_each
from test_fault_tolerance import Others
from test_wire_bytes import sent_between, sent_by_socket

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.averagers.sync.compressed_addition import CompressedAddition
from lightning_easgd.averagers.sync.membership_sum import MembershipSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.membership import Membership

pytestmark = pytest.mark.timeout(60)


class OnThreads(Others):
    """A worker among others on threads, which are those of a channel."""

    def __init__(self):
        super().__init__()
        self.breaks = False  # whether the second messages are lost

    def among(self, channel):
        self.channel, self.rank, self.size = channel, channel.rank, channel.size

    def all_to_all(self, outgoing, incoming):
        self.channel.all_to_all(outgoing, incoming).wait()

    def all_gather(self, message, messages):
        if self.breaks:
            messages.fill_(77)
            return
        self.channel.all_gather(message, messages).wait()


class Worker:
    def __init__(self, wire_dtype, dtype=torch.float64):
        self.members = OnThreads()
        self.sum = MembershipSum(
            center_of(dtype=dtype),
            self.members,
            tau=2,
            patience=1.0,
            timeout=1.0,
            make_addition=partial(CompressedAddition, wire_dtype=wire_dtype),
        )
        self.center = self.sum.center.flat

    def exchange(self, number, name, shares=SHARES):
        self.sum.make_room()
        self.sum.wire.flat.copy_(differences(name, number, self.center.numel(), self.center.dtype))
        self.sum.start(shares)
        self.sum.finish()

    @property
    def residual(self):
        return self.sum.state_dict()["residual"]


def exchanges(workers, names, numbers):
    """Exchanges of those of these names."""
    for number in numbers:
        messages = Messages(len(names))

        def work(rank, number=number, messages=messages):
            workers[names[rank]].members.among(messages.channel(rank))
            workers[names[rank]].exchange(number, names[rank])

        on_threads(work, len(names))


@pytest.mark.parametrize("wire_dtype", CODECS)
def test_nothing_is_lost_whoever_is_there(wire_dtype):
    workers = [Worker(wire_dtype) for _ in range(3)]
    exact = center_of(dtype=torch.float64).flat
    exchanged = [([0, 1, 2], range(3)), ([0, 1], range(3, 5)), ([0], range(5, 6)), ([0, 1], range(6, 8))]
    for names, numbers in exchanged:
        if names[1:] == [1]:  # it may have been away
            workers[1].members.states["center"][1](workers[0].members.states["center"][0]())
            assert workers[1].sum.take_restored() is not None
        exchanges(workers, names, numbers)
        for number, name in ((number, name) for number in numbers for name in names):
            exact += share_of_each(workers[0].sum.center) * differences(name, number, len(exact), exact.dtype)
        centers = [workers[name].center for name in names]
        assert all(torch.equal(center, centers[0]) for center in centers)
        left = sum(worker.residual for worker in workers)
        torch.testing.assert_close(centers[0] + left, exact, rtol=0, atol=1e-12)
        assert 0 < left.abs().max() < 0.1
    assert workers[2].sum.center.version == 3


@pytest.mark.parametrize("wire_dtype", CODECS)
def test_a_lost_exchange_puts_the_residual_back(wire_dtype):
    workers = [Worker(wire_dtype, torch.float32) for _ in range(2)]
    exchanges(workers, [0, 1], range(2))
    before = [(worker.center.clone(), worker.residual.clone()) for worker in workers]
    for worker in workers:
        worker.members.counts, worker.members.breaks = False, True
    with pytest.warns(RuntimeWarning, match=r"has come to nothing \(lost\)"):
        exchanges(workers, [0, 1], range(2, 3))
    for worker, (center, residual) in zip(workers, before, strict=True):
        assert torch.equal(worker.center, center)
        assert torch.equal(worker.residual, residual)
        given = torch.cat([view.flatten() for group in worker.sum.given for view in group])
        assert torch.equal(given, worker.sum.wire.flat)  # what the worker's own pull is taken back by
        worker.members.counts, worker.members.breaks = True, False
    exchanges(workers, [0, 1], range(2, 3))
    undisturbed = [Worker(wire_dtype, torch.float32) for _ in range(2)]
    exchanges(undisturbed, [0, 1], range(3))
    for worker, other in zip(workers, undisturbed, strict=True):
        assert torch.equal(worker.center, other.center)
        assert torch.equal(worker.residual, other.residual)


def exchange_through_torchft(wire_dtype, numel):
    """Two workers on threads: the bytes that one of them says that it sends, and those that it sends."""
    from torchft.coordination import LighthouseServer

    warnings.simplefilter("ignore")  # an error in a thread of torchft, of a deprecated call, would be a lost exchange
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=2, join_timeout_ms=5000)
    address = f"http://localhost:{lighthouse.address().rpartition(':')[2]}"
    barrier, counts = threading.Barrier(2, timeout=20), []

    def work(rank):
        members = Membership(address, rank, min_replica_size=2, timeout=20.0, strategy="EASGDStrategy", fit=1)
        center = ReplicatedCenter(FlatTensors([[torch.zeros(numel)]], torch.float32))
        make = partial(CompressedAddition, wire_dtype=wire_dtype)
        total = MembershipSum(center, members, tau=1, patience=20.0, timeout=20.0, make_addition=make)
        total.enter(0)
        total.take_restored()
        total.start([0.5])  # of nothing yet
        total.finish()
        members.request()
        assert members.has_come(20)
        total.wire.flat.copy_(torch.randn(numel))
        nbytes = total.nbytes
        if barrier.wait() == 0:
            counts.append(sent_by_socket())
        barrier.wait()
        total.start([0.5])
        total.finish()
        if barrier.wait() == 0:
            counts.append(sent_by_socket())
        barrier.wait()
        total.close()
        assert not total.is_lost, members.problem
        return center.flat, nbytes

    (center, nbytes), (other, _) = on_threads(work, 2)
    assert torch.equal(center, other)
    assert center.abs().max() > 0
    return nbytes, sent_between(*counts) / 2


@pytest.mark.parametrize(("wire_dtype", "times"), [("bfloat16", 1.97), ("int8", 3.8)])
def test_so_many_times_fewer_bytes_travel(wire_dtype, times):
    pytest.importorskip("torchft")
    numel = 200_000
    ((said, sent),) = run_ranks(exchange_through_torchft, 1, wire_dtype, numel)
    assert said == pytest.approx(sent, rel=0.02)
    assert 4 * numel / sent > times


def test_who_comes_starts_without_a_residual():
    living, saved = Worker("int8"), Worker("int8")
    exchanges([living], [0], range(2))
    saved.sum.load_state_dict({"residual": torch.ones_like(saved.residual)})
    state, load = living.members.states["center"][0](), saved.members.states["center"][1]
    assert saved.residual.abs().max() == 1
    assert saved.sum.enter(0)  # nobody is ahead of it: it goes on where it was saved
    assert saved.residual.abs().max() == 1
    load(state)
    assert saved.sum.enter(0)
    assert saved.residual.abs().max() == 0


def test_all_workers_round_alike():
    living, coming = Worker("int8"), Others()
    late = MembershipSum(center_of(dtype=torch.float64), coming, tau=2, patience=1.0, timeout=1.0)
    coming.states["center"][1](living.members.states["center"][0]())
    with pytest.raises(ExchangeError, match=r"^EASGDStrategy\(wire_dtype=None\): the .*\(wire_dtype='int8'\); give"):
        late.take_restored()
