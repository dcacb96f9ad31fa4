"""The sum in compressed messages: on threads against its recursion, and on real ranks."""

import os
import signal
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from channels import on_threads
from ranks import end_ranks, run_ranks
from test_resume import every_rank_goes_on_exactly
from test_wire_bytes import sent_between, sent_by_socket
from toys import quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.averagers.sync.all_reduced_sum import AllReducedSum
from lightning_easgd.averagers.sync.compressed_sum import CompressedSum
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.models import Classifier, DigitsNet
from lightning_easgd.method.compression import make_codec
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.channel import (
    ChainedTransfer,
    ExchangeError,
    MessageChannel,
    MessageTransfer,
    ProcessGroupChannel,
    ProcessGroupMessageChannel,
)

pytestmark = pytest.mark.timeout(60)

LAYOUT = [[(3,), (700, 3)], [(2, 2), (0,)], [(511,)]]  # 2618 elements in three groups
SHARES = [0.25, 0.5, 1.0]
CODECS = ["bfloat16", "int8"]


def center_of(layout=LAYOUT, dtype=torch.float32):
    center = FlatTensors([[torch.empty(shape) for shape in group] for group in layout], dtype)
    center.flat.fill_(1.0)
    return ReplicatedCenter(center)


def differences(rank, exchange, numel, dtype=torch.float32):
    """Of a wide range, and not the same on any two workers."""
    generator = torch.Generator().manual_seed(1000 * rank + exchange)
    return (torch.randn(numel, generator=generator) * torch.logspace(-3, 0, numel)).to(dtype)


def share_of_each(center, shares=SHARES):
    return torch.cat([torch.full_like(part, share) for part, share in zip(center.values.segments, shares, strict=True)])


class Messages:
    """Joins the operations of ``size`` threads: the k-th of a kind of each worker belong together."""

    def __init__(self, size):
        self.size, self.lock, self.calls = size, threading.Condition(), {}

    def channel(self, rank):
        return ThreadChannel(self, rank)


class ThreadChannel(MessageChannel):
    def __init__(self, messages, rank):
        self.rank, self.size, self._messages, self._counts = rank, messages.size, messages, {}

    def all_to_all(self, outgoing, incoming, then=None):
        first = self._join("all_to_all", outgoing, lambda sent, sender: incoming[sender].copy_(sent[self.rank]))
        return first if then is None else ChainedTransfer(first, then)

    def all_gather(self, message, messages):
        return self._join("all_gather", message, lambda sent, sender: messages[sender].copy_(sent))

    def _join(self, kind, tensor, receive):
        self._counts[kind] = self._counts.get(kind, 0) + 1
        with self._messages.lock:
            call = self._messages.calls.setdefault((kind, self._counts[kind]), {})
            call[self.rank] = tensor
            self._messages.lock.notify_all()
        return ThreadTransfer(self._messages, call, receive)


class ThreadTransfer(MessageTransfer):
    def __init__(self, messages, call, receive):
        self._messages, self._call, self._receive = messages, call, receive

    @property
    def arrived(self):
        return len(self._call) == self._messages.size

    def wait(self):
        with self._messages.lock:
            assert self._messages.lock.wait_for(lambda: self.arrived, timeout=20), "a worker never came"
        for sender, sent in self._call.items():
            self._receive(sent, sender)


def in_threads(work, workers):
    messages = Messages(workers)
    return on_threads(lambda rank: work(messages.channel(rank)), workers)


def exchange(total, number, rank, shares=SHARES, *, steps=0, pause=0.0):
    total.make_room()
    total.wire.flat.copy_(differences(rank, number, total.wire.flat.numel(), total.wire.flat.dtype))
    total.start(shares)
    for _ in range(steps):
        time.sleep(pause)
        total.advance()
    total.finish()


def run_exchanges(channel, wire_dtype, count=6, dtype=torch.float32, layout=LAYOUT, shares=SHARES):
    """The center and the residual after some exchanges; each worker lets another number of steps pass in each."""
    total = CompressedSum(center_of(layout, dtype), channel, make_codec(wire_dtype))
    for number in range(count):
        steps = (3 * channel.rank + number) % 4
        exchange(total, number, channel.rank, shares, steps=steps, pause=0.002)
    return total.center.flat, total.state_dict()["residual"]


def recursion(workers, wire_dtype, count=6, dtype=torch.float32):
    """The equations of the class, written down one shard after the other."""
    codec, center = make_codec(wire_dtype), center_of(dtype=dtype)
    numel, share = center.flat.numel(), share_of_each(center)
    size = -(-numel // (workers * codec.block)) * codec.block
    residuals = torch.zeros(workers, numel, dtype=dtype)

    def quantise(values):
        """Q(values); ``values`` becomes the rest."""
        message, decoded = torch.empty(codec.nbytes(values.numel()), dtype=torch.uint8), torch.empty_like(values)
        codec.encode(values, message)
        codec.decode(message, decoded)
        values -= decoded
        return decoded

    for number in range(count):
        residuals += share * torch.stack([differences(rank, number, numel, dtype) for rank in range(workers)])
        for owner, own in enumerate(residuals):
            shard = slice(min(owner * size, numel), min((owner + 1) * size, numel))
            for rank, residual in enumerate(residuals):
                if rank != owner:
                    own[shard] += quantise(residual[shard])
            center.flat[shard] += quantise(own[shard])
    return center.flat, residuals


@pytest.mark.parametrize("wire_dtype", CODECS)
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_numbers_are_those_of_the_recursion(workers, wire_dtype):
    center, residuals = recursion(workers, wire_dtype)
    for rank, (got, residual) in enumerate(in_threads(lambda channel: run_exchanges(channel, wire_dtype), workers)):
        assert got.equal(center)
        assert residual.equal(residuals[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wire_dtype", CODECS)
def test_nothing_is_lost(wire_dtype, dtype):
    """Center plus residuals is where exact sums would have brought the center."""
    workers, count = 3, 30
    results = in_threads(lambda channel: run_exchanges(channel, wire_dtype, count, dtype), workers)
    exact = center_of(dtype=torch.float64)
    for number in range(count):
        for rank in range(workers):
            exact.flat.add_(share_of_each(exact) * differences(rank, number, exact.flat.numel()))
    center = results[0][0].double()
    residual = sum(residual for _, residual in results).double()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(center + residual, exact.flat, rtol=0, atol=tolerance)
    assert (center - exact.flat).abs().max() > 100 * tolerance  # it is compressed
    assert (center - exact.flat).abs().max() < 0.2  # one rounding of each message, however many exchanges


@pytest.mark.parametrize("layout", [[[(0,)]], [[(1,)]], [[(2,), (255,)]]])
@pytest.mark.parametrize("wire_dtype", CODECS)
def test_fewer_elements_than_workers_have_room_for(layout, wire_dtype):
    def work(channel):
        return run_exchanges(channel, wire_dtype, layout=layout, shares=[1.0])

    results = in_threads(work, 3)
    exact = 1 + sum(differences(rank, number, len(results[0][0])) for rank in range(3) for number in range(6))
    for center, _ in results:
        assert center.equal(results[0][0])
    torch.testing.assert_close(results[0][0] + sum(residual for _, residual in results), exact, rtol=0, atol=1e-5)


class HeldChannel(MessageChannel):
    """One worker; the test decides when messages arrive."""

    rank, size = 0, 1

    def __init__(self):
        self.events, self.arrived = [], False

    def all_to_all(self, outgoing, incoming, then=None):
        self.events.append("all_to_all")
        first = HeldTransfer(self, lambda: incoming.copy_(outgoing))
        return first if then is None else ChainedTransfer(first, then)

    def all_gather(self, message, messages):
        self.events.append("all_gather")
        self.arrived = False
        return HeldTransfer(self, lambda: messages[0].copy_(message))


class HeldTransfer(MessageTransfer):
    def __init__(self, channel, receive):
        self._channel, self._receive = channel, receive

    @property
    def arrived(self):
        return self._channel.arrived

    def wait(self):
        self._channel.events.append("wait")
        self._receive()


def test_steps_do_what_they_can_without_waiting():
    channel = HeldChannel()
    total = CompressedSum(center_of(), channel, make_codec("int8"))
    total.advance()
    total.finish()
    assert channel.events == []
    total.wire.flat.fill_(1.0)
    total.start([0.5, 0.5, 0.5])
    total.advance()
    assert channel.events == ["all_to_all"]
    channel.arrived = True
    total.advance()
    assert channel.events == ["all_to_all", "wait", "all_gather"]
    assert (total.center.flat == 1.0).all()
    channel.arrived = True
    total.advance()
    assert total.center.flat == pytest.approx(torch.full_like(total.center.flat, 1.5))
    total.advance()
    total.finish()
    assert channel.events == ["all_to_all", "wait", "all_gather", "wait"]
    assert total.center.flat == pytest.approx(torch.full_like(total.center.flat, 1.5))


def test_what_was_given_outlives_the_exchange():
    """A device may still be reading it when the messages are there."""
    total = CompressedSum(center_of(), HeldChannel(), make_codec("int8"))
    exchange(total, 0, 0, steps=3)
    values = differences(0, 0, total.wire.flat.numel())
    assert torch.cat([view.flatten() for group in total.given for view in group]).equal(values)
    assert float(torch.stack(total.norms()).norm()) == pytest.approx(float(values.norm()))
    exchange(total, 1, 0)
    assert float(torch.stack(total.norms()).norm()) != float(values.norm())


@pytest.mark.parametrize("wire_dtype", CODECS)
def test_a_saved_state_goes_on_bit_for_bit(wire_dtype):
    def work(channel):
        total = CompressedSum(center_of(), channel, make_codec(wire_dtype))
        for number in range(3):
            exchange(total, number, channel.rank)
        state = {name: value.clone() for name, value in total.state_dict().items()}
        center = center_of()
        center.flat.copy_(total.center.flat)
        resumed = CompressedSum(center, channel, make_codec(wire_dtype))
        forgetful = CompressedSum(center_of(), channel, make_codec(wire_dtype))
        forgetful.center.flat.copy_(total.center.flat)
        resumed.load_state_dict(state)
        forgetful.load_state_dict({})
        for each in (total, resumed, forgetful):
            for number in range(3, 6):
                exchange(each, number, channel.rank)
        return total.center.flat, resumed.center.flat, forgetful.center.flat

    for uninterrupted, resumed, forgetful in in_threads(work, 3):
        assert resumed.equal(uninterrupted)
        assert not forgetful.equal(uninterrupted)


def test_a_larger_layout_takes_over_what_has_not_been_sent():
    larger = [[(3,), (700, 3), (50,)], [(2, 2), (0,)], [(511,), (9, 9)], [(5,)]]

    def work(channel):
        total = CompressedSum(center_of(), channel, make_codec("int8"))
        exchange(total, 0, channel.rank)
        before = [view.clone() for view in total._residual.views]
        renewed = total.renewed(center_of(larger), [0, 1, None, 2, 3, 4, None, None])
        kept = [view for group in renewed._residual.groups for view in group]
        known = [kept[index] for index in (0, 1, 3, 4, 5)]
        new = [kept[index] for index in (2, 6, 7)]
        same = [old.equal(view) for old, view in zip(before, known, strict=True)]
        zeros = [not view.any() for view in new]
        exchange(renewed, 1, channel.rank, [*SHARES, 1.0])
        return same, zeros, renewed.center.flat

    results = in_threads(work, 2)
    for known, new, center in results:
        assert all(known)
        assert all(new)
        assert center.equal(results[0][2])


SECONDS = timedelta(seconds=20)


def on_processes(wire_dtype, work):
    dist.init_process_group("gloo", timeout=SECONDS)
    channel = ProcessGroupMessageChannel("gloo", SECONDS)
    try:
        return work(channel, wire_dtype)
    finally:
        channel.close()
        dist.destroy_process_group()


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_have_the_numbers_of_the_recursion(workers):
    """The workers come to their second messages at different moments, some with the next exchange begun."""

    def work(channel, _):
        return [run_exchanges(channel, wire_dtype) for wire_dtype in CODECS]

    for rank, results in enumerate(run_ranks(on_processes, workers, None, work)):
        for wire_dtype, (center, residual) in zip(CODECS, results, strict=True):
            expected, residuals = recursion(workers, wire_dtype)
            assert center.equal(expected)
            assert residual.equal(residuals[rank])


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the kernel's counters are read as Linux has them")
@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_by_the_kernels_count(workers):
    layout, exchanges = [[(1000, 600)]], 3

    def sent_by(total):
        dist.barrier()
        before = sent_by_socket()
        for number in range(exchanges):
            exchange(total, number, dist.get_rank(), [1.0])
        dist.barrier()
        return sent_between(before, sent_by_socket()) / exchanges

    def work(channel, _):
        exact = AllReducedSum(center_of(layout), ProcessGroupChannel("gloo", SECONDS), 1)
        compressed = [CompressedSum(center_of(layout), channel, make_codec(each)) for each in CODECS]
        return [(sent_by(total), total.nbytes) for total in (exact, *compressed)]

    for (exact, _), *compressed in run_ranks(on_processes, workers, None, work):
        for (count, said), fewer in zip(compressed, (2.0, 3.938), strict=True):
            assert count == pytest.approx(said, rel=0.01)
            assert exact / count == pytest.approx(fewer, rel=0.01)


def test_a_lost_worker_ends_an_exchange():
    def work(channel, wire_dtype):
        total = CompressedSum(center_of(), channel, make_codec(wire_dtype))
        for number in range(5):
            if (channel.rank, number) == (1, 2):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                exchange(total, number, channel.rank)
            except ExchangeError as error:
                return number, str(error)
        return None

    number, error = end_ranks(on_processes, 2, "int8", work)[0].value
    assert number == 2
    assert "another worker died" in error


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_goes_on_exactly_from_every_checkpoint(tmp_path):
    """With what its workers have not yet sent."""
    strategy = partial(EASGDStrategy, tau=2, momentum=0.9, wire_dtype="int8")
    every_rank_goes_on_exactly(tmp_path, strategy, {"trainer": {"max_epochs": 1}})


def digits_accuracy(seed, epochs=3, workers=2, tau=10, lr=0.05, **strategy):
    """The share of right answers at the center after training, and the center."""
    torch.manual_seed(seed)
    module = Classifier(DigitsNet(), partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True))
    strategy = EASGDStrategy(tau=tau, momentum=0.9, process_group_backend="gloo", **strategy)
    trainer = quiet_trainer(strategy=strategy, devices=workers, max_epochs=epochs, use_distributed_sampler=False)
    trainer.fit(module, DigitsDataModule(seed=seed))
    center = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return trainer.validate(module, DigitsDataModule(seed=seed), verbose=False)[0]["val/accuracy"], center


@pytest.mark.timeout(180)
def test_digits_are_learned_as_well():
    def train():
        return [digits_accuracy(0, wire_dtype=wire_dtype) for wire_dtype in (None, "int8")]

    results = run_ranks(train, 2, timeout=160)
    for (exact, exact_center), (compressed, center) in results:
        assert compressed >= exact - 0.03
        assert not center.equal(exact_center)
        assert center.equal(results[0][1][1])
