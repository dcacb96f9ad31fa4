"""The sums that move the center of synchronous EASGD: buckets, shared memory, and lost workers."""

import gc
import os
import signal
import threading
import time
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from channels import LoneChannel, rendezvous_of, run_threads
from ranks import end_ranks, run_ranks
from torch.distributed.distributed_c10d import _get_default_store
from toys import Quadratic, Regression, fitted

from lightning_easgd import EASGDStrategy
from lightning_easgd.averagers import (
    ExchangeError,
    Meeting,
    MessageChannel,
    ProcessGroupChannel,
    ProcessGroupMessageChannel,
    SynchronousAveraging,
    all_reduced_sums,
    compressed_sums,
    shared_sums,
)
from lightning_easgd.averagers.sync.all_reduced_sum import BUCKET_BYTES, AllReducedSum
from lightning_easgd.averagers.sync.compressed_sum import CompressedSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.sync.shared_sum import SharedSum
from lightning_easgd.method.compression import make_codec
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.served_center import CenterError
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.errors import SharedMemoryUnavailableError
from lightning_easgd.transport.shared_vectors import SharedVector, SharedVectors

pytestmark = pytest.mark.timeout(120)
SECONDS = timedelta(seconds=20)
FLOATS = BUCKET_BYTES // 4


def center_of(*shapes, value=0.0, dtype=torch.float32):
    """A center of one group for each list of shapes."""
    groups = [[torch.full(shape, value, dtype=dtype) for shape in group] for group in shapes]
    center = FlatTensors(groups, dtype)
    center.flat.fill_(value)
    return ReplicatedCenter(center)


class TestBuckets:
    def test_they_are_spread_over_the_first_half_of_the_period(self):
        events = []
        center = center_of([(FLOATS,)] * 4)
        total = AllReducedSum(center, LoneChannel(events), tau=8)
        total.wire.flat.fill_(1.0)
        total.start([0.5])
        for step in range(1, 9):
            events.append(step)
            total.advance()
        assert events == ["start", 1, "start", 2, "start", 3, "start", 4, 5, 6, 7, 8]
        total.finish()
        assert events[-4:] == ["wait"] * 4
        assert (center.flat == 0.5).all()

    @pytest.mark.parametrize("tau", [1, 3])
    def test_there_are_no_more_than_steps(self, tau):
        events = []
        total = AllReducedSum(center_of([(FLOATS,)] * 8), LoneChannel(events), tau)
        total.start([1.0])
        for _ in range(tau - 1):
            total.advance()
        assert events == ["start"] * tau
        total.finish()
        assert events[tau:] == ["wait"] * tau

    def test_small_vectors_are_not_cut(self):
        events = []
        total = AllReducedSum(center_of([(FLOATS // 2,), (FLOATS // 2,)]), LoneChannel(events), tau=10)
        total.start([1.0])
        total.finish()
        assert events == ["start", "wait"]

    def test_what_was_given_outlives_the_first_reduction(self):
        """A reduction overwrites the wire from the moment at which it starts."""

        class Scribbling(LoneChannel):
            def sum(self, buffer):
                buffer.fill_(float("nan"))
                return super().sum(buffer)

        total = AllReducedSum(center_of([(3, FLOATS), (7,)], [(FLOATS,), (5, 5)]), Scribbling([]), tau=4)
        values = torch.randn(total.wire.flat.shape, generator=torch.Generator().manual_seed(0))
        total.wire.flat.copy_(values)
        total.start([1.0, 1.0])
        assert torch.equal(torch.cat([view.flatten() for group in total.given for view in group]), values)
        assert float(torch.stack(total.norms()).norm()) == pytest.approx(float(values.double().norm()), rel=1e-4)

    def test_memory_beyond_the_center_is_the_wire_and_a_share_of_it(self):
        total = AllReducedSum(center_of([(FLOATS,)] * 20), LoneChannel([]), tau=10)
        held = sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in storages(total)}.values())
        assert held == pytest.approx(1.1 * total.wire.flat.nbytes, rel=0.01)

    def test_an_error_leaves_the_center_whole(self):
        class Lost(LoneChannel):
            def sum(self, buffer):
                transfer = super().sum(buffer)
                if self.events.count("start") == 3:
                    transfer.wait = self.fail
                return transfer

            def fail(self):
                raise ExchangeError("lost")

        center = center_of([(FLOATS,)] * 4)
        total = AllReducedSum(center, Lost([]), tau=4)
        total.wire.flat.fill_(1.0)
        total.start([1.0])
        for _ in range(2):
            with pytest.raises(ExchangeError):
                total.finish()
            assert not center.flat.any()

    def test_groups_have_shares_of_their_own_wherever_the_cuts_are(self):
        center = center_of([(FLOATS + 3,), (FLOATS,)], [(11,), (2 * FLOATS,)], [(5,)])
        total = AllReducedSum(center, LoneChannel([]), tau=3)
        total.wire.flat.fill_(1.0)
        total.start([1.0, 2.0, 3.0])
        total.finish()
        assert [segment.unique().tolist() for segment in center.values.segments] == [[1.0], [2.0], [3.0]]


def storages(total):
    return [total.wire.flat, *(view for group in total.given for view in group)]


def vectors_of(center, rendezvous):
    """Attached ones."""
    vectors = SharedVectors(center.flat.numel(), center.flat.dtype, rendezvous)
    vectors.attach()
    return vectors


def in_threads(work, workers):
    """Workers that share memory inside of one process."""
    store = dist.HashStore()

    def run(rank, line):
        center = center_of([(3,), (1000, 700)], [(2, 2)], value=1.0)
        total = SharedSum(center, vectors_of(center, rendezvous_of(store, rank, workers)))
        barrier.wait()
        return work(rank, total)

    barrier = threading.Barrier(workers)
    return run_threads(run, workers)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_shared_sums_are_those_in_the_order_of_the_ranks(workers):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, workers, 3 + 700_000 + 4, generator=generator)

    def work(rank, total):
        for exchange in range(4):
            total.make_room()
            total.wire.flat.copy_(values[exchange, rank])
            total.start([0.25, 0.5])
            for _ in range((7 * rank + exchange) % 3):
                total.advance()
                time.sleep(0.002)
            assert torch.equal(total.wire.flat, values[exchange, rank])
            total.finish()
        return total.center.flat.clone()

    expected = torch.ones(values.shape[-1])
    shares = torch.cat([torch.full((700_003,), 0.25), torch.full((4,), 0.5)])
    for exchange in values:
        expected += shares * sum(exchange[1:], exchange[0])
    for center in in_threads(work, workers):
        assert torch.equal(center, expected)


def test_a_worker_may_be_a_whole_period_ahead():
    """The first goes on until it must write anew; the last to come waits for nobody."""
    here = threading.Event()

    def work(rank, total):
        total.wire.flat.fill_(rank + 1.0)
        if rank:
            assert here.wait(10)
        total.start([1.0, 1.0])
        total.advance()
        before = float(total.center.flat[0])
        if rank == 0:
            here.set()
        total.finish()
        return before, float(total.center.flat[0])

    assert in_threads(work, 2) == [(1.0, 4.0), (4.0, 4.0)]


def test_a_difference_is_not_overwritten_before_all_have_read_it():
    read = threading.Event()

    def work(rank, total):
        total.start([1.0, 1.0])
        if rank == 1:
            assert read.wait(10)
            total.finish()
            return None
        total.finish()
        room = [total.has_room]
        read.set()
        total.make_room()
        return [*room, total.has_room]

    def start_without_reading(self, shares):  # as if the others' differences came later
        self._shares, self._exchange = shares, self._exchange + 1
        self._vectors.publish_written(self._exchange)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedSum, "start", start_without_reading)
        assert in_threads(work, 2)[0] == [False, True]


@pytest.mark.parametrize("backend", [None, "gloo"])
def test_the_center_may_be_read_in_the_middle_of_a_step(backend):
    """The gradient is that of before the pull, and the pull that of the exchange, whatever the sum overwrites."""

    class Reads(Quadratic):
        def training_step(self, batch, index):
            _ = self.trainer.strategy.center
            return super().training_step(batch, index)

    def trace(cls):
        return fitted(cls(), EASGDStrategy(tau=2, process_group_backend=backend), 2).trace

    assert run_ranks(trace, 2, Reads) == run_ranks(trace, 2, Quadratic)


def final_weights(**strategy):
    torch.manual_seed(3)
    module = fitted(Regression(batches=9), EASGDStrategy(tau=2, **strategy), dist_size(), limit_val_batches=0)
    return [parameter.tolist() for parameter in module.parameters()], module.trainer.strategy.communication.bytes_sent


def dist_size():
    return int(os.environ["WORLD_SIZE"])


def test_shared_memory_and_the_process_group_have_the_same_numbers():
    (shared, bytes_shared), *_ = run_ranks(final_weights, 2)
    (group, bytes_group), *_ = run_ranks(lambda: final_weights(process_group_backend="gloo"), 2)
    assert shared == group
    assert bytes_shared == bytes_group


@pytest.mark.parametrize("refused", [(torch.int64, torch.float32), (torch.float32,)], ids=["all", "differences"])
def test_where_memory_cannot_be_shared_the_process_group_is_used(monkeypatch, refused):
    create = SharedVector.create

    def train(refusing):
        def refuse(numel, dtype):
            if dtype in refused:
                raise CenterError("no memory.")
            return create(numel, dtype)

        if int(os.environ["RANK"]) in refusing:
            monkeypatch.setattr(SharedVector, "create", refuse)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights = final_weights()
        return weights, [str(each.message) for each in caught if "cannot share memory" in str(each.message)]

    expected = [weights for weights, _ in run_ranks(train, 2, ())]
    for refusing in ((0,), (1,), (0, 1)):
        results = run_ranks(train, 2, refusing)
        assert [weights for weights, _ in results] == expected
        assert [len(texts) for _, texts in results] == [int(rank in refusing) for rank in (0, 1)]


def exchanging(interrupt):
    """Be a worker that exchanges without end; rank 1 is interrupted at its third exchange."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    control = ProcessGroupChannel("gloo", timedelta(seconds=30))
    limit = timedelta(seconds=1)
    make = shared_sums(_get_default_store(), control, limit, otherwise=all_reduced_sums(lambda: control, 1))
    total = make(center_of([(1000,)]))
    assert isinstance(total, SharedSum)
    for exchange in range(10):
        if dist.get_rank() == 1 and exchange == 3:
            interrupt()
        total.make_room()
        total.wire.flat.fill_(1.0)
        total.start([1.0])
        started = time.monotonic()
        try:
            total.finish()
        except ExchangeError as error:
            return str(error), time.monotonic() - started
    return None


@pytest.mark.parametrize(
    ("interrupt", "text", "limit"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"ranks [1] have died", 1.0),
        (lambda: os._exit(1), r"ranks [1] have died", 1.0),
        (lambda: time.sleep(4), r"ranks [1] have not come", 3.0),
    ],
)
def test_a_lost_worker_ends_an_exchange(interrupt, text, limit):
    error, waited = end_ranks(exchanging, 2, interrupt, timeout=60)[0].value
    assert text in error
    assert waited < limit


def test_nothing_is_left_behind():
    def train():
        final_weights()  # opens what stays open in this process
        gc.collect()  # what tests before this one have left to it
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            final_weights()
        maps = Path("/proc/self/maps").read_text().splitlines()
        shared = [line for line in maps if "lightning_easgd-vector" in line]
        return len(os.listdir("/proc/self/fd")) - before, shared

    assert run_ranks(train, 1) == [(0, [])]


def test_parameters_added_in_mid_training_get_a_sum_of_their_own():
    class Grows(Regression):
        def on_train_batch_start(self, batch, index):
            if index in (3, 4, 9):
                self.register_parameter(f"new{index}", torch.nn.Parameter(torch.ones(index)))
                self.trainer.optimizers[0].add_param_group({"params": [getattr(self, f"new{index}")]})

        def training_step(self, batch, index):
            extra = sum((self.global_rank + 1) * p.sum() for n, p in self.named_parameters() if n.startswith("new"))
            return super().training_step(batch, index) + extra

    def train(**strategy):
        module = fitted(Grows(batches=14), EASGDStrategy(tau=2, **strategy), 3, limit_val_batches=0)
        return [parameter.tolist() for parameter in module.parameters()]

    shared, group = run_ranks(train, 3), run_ranks(lambda: train(process_group_backend="gloo"), 3)
    assert len(shared[0]) == 9
    assert shared[0] == shared[1] == shared[2]
    for ours, theirs in zip(shared[0], group[0], strict=True):
        assert torch.tensor(ours) == pytest.approx(torch.tensor(theirs), abs=1e-5)


def train_two_optimizers(kind):
    """Five steps of a critic for one of a generator, and rank 1 has less data: it answers rank 0's exchanges."""
    dist.init_process_group("gloo", timeout=SECONDS)
    control = ProcessGroupChannel("gloo", SECONDS)
    reduced = all_reduced_sums(partial(ProcessGroupChannel, "gloo", SECONDS), tau=4)
    messages = partial(ProcessGroupMessageChannel, "gloo", SECONDS)
    make = {
        "all-reduce": reduced,
        "bfloat16": compressed_sums(messages, partial(make_codec, "bfloat16")),
        "shared": shared_sums(_get_default_store(), control, SECONDS, otherwise=reduced),
    }[kind]
    averaging = SynchronousAveraging(control, make, tau=4, rates=MovingRates(beta=0.9))
    generator = torch.optim.SGD([torch.nn.Parameter(torch.zeros(FLOATS)) for _ in range(4)], lr=0.5)
    critic = torch.optim.SGD([torch.nn.Parameter(torch.zeros(8)) for _ in range(2)], lr=0.5)
    averaging.start([generator, critic])
    rank = dist.get_rank()
    for _ in range(4 if rank else 12):
        for optimizer in [critic] * 5 + [generator]:
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.full_like(parameter, rank + 1.0)
            averager = averaging.averagers[optimizer]
            averager.begin()
            optimizer.step()
            averager.finish()
    averaging.meet(Meeting.TRAINING_END)
    centers = [averager.center.flat[0].item() for averager in averaging.averagers.values()]
    averaging.close()
    return centers


@pytest.mark.parametrize("kind", ["shared", "all-reduce", "bfloat16"])
def test_several_optimizers_with_unlike_steps_and_uneven_data(kind):
    first, second = run_ranks(train_two_optimizers, 2, kind, timeout=40)
    assert first == second
    assert first == pytest.approx(run_ranks(train_two_optimizers, 2, "shared", timeout=40)[0], rel=0.02)
    assert all(first)


def test_more_optimizers_than_fit_an_announcement_of_each_into_a_page():
    """Each has an announcement under way when the next one begins."""

    class Many(Regression):
        def __init__(self):
            super().__init__(batches=7)
            self.automatic_optimization = False
            self.extra = torch.nn.ParameterList(torch.zeros(1) for _ in range(70))

        def configure_optimizers(self):
            return [torch.optim.SGD([parameter], lr=0.1) for parameter in self.parameters()]

        def training_step(self, batch, index):
            loss = self.loss(batch) + (self.global_rank + 1) * sum(each.sum() for each in self.extra)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def train():
        module = fitted(Many(), EASGDStrategy(tau=2, timeout=SECONDS), 2, limit_val_batches=0)
        return [parameter.tolist() for parameter in module.parameters()]

    first, second = run_ranks(train, 2, timeout=60)
    assert first == second
    assert all(value != 0 for (value,) in first[-70:])


def test_another_file_in_the_owners_descriptor_is_not_the_owner():
    own = SharedVector.create(10, torch.float32)
    other = SharedVector.attach(own.address, torch.float32)
    assert other.owner_lives
    own.close()
    new = SharedVector.create(10, torch.float32)  # gets the number of the one that was closed
    assert new.address.partition("#")[0] == other._segment._path
    assert not other.owner_lives
    new.close()
    other.close()


def test_what_cannot_be_attached_leaves_no_descriptor():
    store = dist.HashStore()
    vectors = [SharedVectors(3, torch.float32, rendezvous_of(store, rank, 3)) for rank in range(2)]
    read, write = os.pipe()
    rendezvous_of(store, 2, 3).enter("vector/0", f"/proc/{os.getpid()}/fd/{read}#00")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SharedMemoryUnavailableError, match="something else than the memory"):
        vectors[0].attach()
    assert len(os.listdir("/proc/self/fd")) <= before  # a thread of a test before may close one meanwhile
    for descriptor in (read, write):
        os.close(descriptor)
    for each in vectors:
        each.close()


def test_a_residual_of_another_layout_is_told():
    def residual(numel):
        center = center_of([(numel,)])
        total = CompressedSum(center, LoneMessages(), make_codec("int8"))
        total._residual.flat.fill_(7.0)
        return total

    class LoneMessages(MessageChannel):
        rank, size = 0, 1

        def all_to_all(self, outgoing, incoming): ...

        def all_gather(self, message, messages): ...

    total = residual(12)
    for size in (1, 10):
        with pytest.warns(RuntimeWarning, match=rf"has {size} elements, this run's 12"):
            total.load_state_dict(residual(size).state_dict())
    total.load_state_dict(residual(12).state_dict())
    assert (total.state_dict()["residual"] == 7).all()


def test_workers_with_other_layouts_are_told():
    store = dist.HashStore()

    def work(rank, line):
        vectors_of(center_of([(3 + rank,)]), rendezvous_of(store, rank, 2))

    with pytest.raises(ExchangeError, match=r"shares [34] numbers"):
        run_threads(work, 2)
