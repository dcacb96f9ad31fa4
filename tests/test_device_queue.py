"""What a GPU does beside the gradient, on a fake that finds accesses which nothing orders."""

import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from channels import LoneChannel, line_on
from fake_device import FakeDevice, RaceError, Stream

import lightning_easgd.transport.channel as channels
from lightning_easgd.averagers import (
    ExchangeError,
    FailIfAstray,
    Meeting,
    NonFiniteError,
    ResetIfAstray,
    SynchronousAverager,
    SynchronousAveraging,
    all_reduced_sums,
)
from lightning_easgd.averagers.served.averaging import exchange_thread
from lightning_easgd.averagers.sync import averager as synchronous
from lightning_easgd.averagers.sync.compressed_sum import CompressedSum
from lightning_easgd.averagers.sync.finiteness import DeviceFiniteness
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.method.compression import make_codec
from lightning_easgd.method.position import LookAheadPosition
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport import staging as stagings
from lightning_easgd.transport.channel import Failure, MessageChannel, MessageTransfer, OwnGroup, WorkTransfer
from lightning_easgd.transport.device_queue import DeviceQueue, HostQueue, make_queue
from lightning_easgd.transport.staging import DeviceStaging, brought_near

CPU = torch.device("cpu")


def queue_on(fake, without=()):
    """A queue on the fake, some of whose operations have been removed."""
    queue = DeviceQueue(CPU, fake)
    for name in without:
        setattr(queue, name, lambda: None)
    return queue


def staged(fake, without=()):
    """Exchanges of a vector that the device's current stream writes before and reads after."""
    flat = torch.zeros(5)
    staging = DeviceStaging(flat, fake.host_memory(torch.zeros(5)), queue_on(fake, without))
    for _ in range(2):
        flat.add_(1)
        staging.depart()
        messages = staging.messages()
        messages.mul_(2)
        staging.arrive()
        flat.add_(1)
    return flat.tolist()


def judged(fake, without=()):
    """Differences of which the second is not finite, and what is said of each at the next."""
    finiteness = DeviceFiniteness(fake.host_memory(torch.empty((), dtype=torch.bool)), queue_on(fake, without))
    said = []
    for value in (1.0, torch.nan, 3.0, 3.4e38, torch.inf, 0.0):
        difference = torch.ones(4)
        difference[2] = value
        said.append((finiteness.judge(difference, []), difference.sum().item()))
    finiteness.forget()
    return said, finiteness.known()


class Messages(MessageChannel):
    """Two workers with the same messages; the collectives run in a stream of their own, as NCCL's do."""

    rank, size = 0, 2

    def __init__(self, fake, forgetful=False):
        self.fake, self.own, self.forgetful, self.started = fake, fake.Stream(CPU), forgetful, []

    def are_queued(self, device):
        return True

    def _run(self, name, into, message):
        self.started.append(name)
        self.own.wait_stream(self.fake.current_stream())
        with self.fake.stream(self.own):
            into.copy_(message)
        return Messenger(self)

    def all_to_all(self, outgoing, incoming):
        return self._run("all_to_all", incoming, outgoing)

    def all_gather(self, message, messages):
        return self._run("all_gather", messages, message.expand_as(messages))


class Messenger(MessageTransfer):
    def __init__(self, channel):
        self.channel = channel

    @property
    def arrived(self):
        return True

    def wait(self):
        self.channel.fake.current_stream().wait_stream(self.channel.own)

    def follow(self):
        if not self.channel.forgetful:
            self.wait()


def compressed(fake, without=(), forgetful=False):
    center = ReplicatedCenter(FlatTensors([[torch.zeros(8)]], torch.float32))
    channel = Messages(fake, forgetful)
    total = CompressedSum(center, channel, make_codec("bfloat16"), queue_on(fake, without))
    for exchange in range(2):
        total.make_room()
        total.wire.flat.fill_(1.0)
        total.start([0.5])
        assert channel.started == ["all_to_all", "all_gather"] * (exchange + 1)
        total.advance()
        assert center.flat.sum().item() == exchange * 8
        total.finish()
    return center.flat.tolist()


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (staged, [9.0] * 5),
        (judged, ([(True, 4.0), (True, 0.0), (False, 6.0), (True, 3.4e38), (True, 0.0), (False, 3.0)], True)),
        (compressed, [2.0] * 8),
    ],
)
def test_no_race_and_the_right_numbers(way, expected):
    with FakeDevice() as fake:
        outcome = way(fake)
    if way is judged:
        assert [said for said, _ in outcome[0]] == [said for said, _ in expected[0]]
        assert [total for _, total in outcome[0]] == pytest.approx([total for _, total in expected[0]])
        assert outcome[1]
    else:
        assert outcome == expected


@pytest.mark.parametrize(
    ("way", "removed"),
    [
        (staged, "follow"),
        (staged, "wait"),
        (staged, "mark"),
        (staged, "rejoin"),
        (judged, "follow"),
        (judged, "wait"),
        (judged, "mark"),
        (compressed, "follow"),
    ],
)
def test_a_wait_that_is_removed_is_a_race(way, removed):
    with FakeDevice() as fake, pytest.raises(RaceError):
        way(fake, without=[removed])


def test_messages_that_are_not_followed_are_a_race():
    with FakeDevice() as fake, pytest.raises(RaceError):
        compressed(fake, forgetful=True)


def test_a_thread_that_waits_sleeps():
    with FakeDevice() as fake:
        staged(fake)
        judged(fake)
    assert set(fake.log) == {"sleeps"}


def test_the_fake_finds_a_blocking_copy_and_a_read_value():
    with FakeDevice() as fake:
        there = fake.host_memory(torch.zeros(3))
        here = torch.ones(3)
        there.copy_(here)
        float(here.sum())
    assert sum(fake.stalls.values()) == 2
    with FakeDevice() as fake:
        with fake.stream(Stream(fake, "one")):
            here.add_(1)
        with fake.stream(Stream(fake, "other")), pytest.raises(RaceError):
            here.add_(1)


def test_the_host_has_no_queue():
    queue = make_queue(CPU)
    assert isinstance(queue, HostQueue)
    with queue.beside():
        assert torch.ones(1).item() == 1


# An exchange: nothing on the step path waits for the device


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("rates", [{}, {"rho": 0.5}])
def test_no_exchange_waits_for_the_device(monkeypatch, rates, capturable):
    with FakeDevice() as fake:
        monkeypatch.setattr(
            synchronous,
            "make_finiteness",
            lambda wire: DeviceFiniteness(fake.host_memory(torch.empty((), dtype=torch.bool)), queue_on(fake)),
        )
        parameter = torch.nn.Parameter(torch.randn(100))
        lr = torch.tensor(0.1) if capturable else 0.1
        optimizer = torch.optim.SGD([parameter], lr=lr, momentum=0.9, nesterov=True)
        line = line_on(LoneChannel([]), LoneChannel([]))
        averager = SynchronousAverager(
            optimizer,
            line,
            all_reduced_sums(lambda: line.data, 2),
            number=0,
            tau=2,
            rates=MovingRates(**rates),
            position=LookAheadPosition,
        )
        steps = []
        for _ in range(9):
            fake.stalls.clear()
            parameter.grad = torch.ones_like(parameter)
            averager.begin()
            begun = sum(fake.stalls.values())
            with torch.no_grad():
                optimizer.step()
            finished = sum(fake.stalls.values())
            averager.finish()
            steps.append(begun + sum(fake.stalls.values()) - finished)
        assert line.statistics.exchanges == 4
    assert sum(steps[3:]) == 0, steps  # a learning rate that is a tensor has been read before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_difference_that_is_not_finite_never_leaves_a_device(monkeypatch, value):
    """The center is untouched, and all hear of it at the next exchange."""
    monkeypatch.setattr(
        synchronous,
        "make_finiteness",
        lambda wire: DeviceFiniteness(torch.empty((), dtype=torch.bool), HostQueue()),
    )
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    line = line_on(LoneChannel([]), LoneChannel([]))
    heard = []
    line.on_astray = SimpleNamespace(
        hear=lambda who, clock: heard.append(clock),
        reset=lambda *_: heard.append("reset"),
        check_center=lambda finite: None,
    )
    averager = SynchronousAverager(
        optimizer, line, all_reduced_sums(lambda: line.data, 2), number=0, tau=2, rates=MovingRates()
    )
    for step in range(7):
        if step == 2:
            parameter.data[1] = value
        averager.begin()
        averager.finish()
    averager.complete()
    assert averager.center.flat.tolist() == [1.0, 1.0, 1.0]
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert heard == [4, "reset"]


@pytest.mark.parametrize("policy", [FailIfAstray, ResetIfAstray])
def test_a_last_difference_that_is_not_finite_is_heard_of_at_the_meeting(monkeypatch, policy):
    """Kind: after the last exchange there is none to tell of it."""
    monkeypatch.setattr(
        synchronous, "make_finiteness", lambda wire: DeviceFiniteness(torch.empty((), dtype=torch.bool), HostQueue())
    )
    parameter, other = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    averaging = SynchronousAveraging(
        LoneChannel([]), all_reduced_sums(lambda: LoneChannel([]), 2), tau=2, rates=MovingRates(), on_astray=policy()
    )
    optimizers = [torch.optim.SGD([parameter], lr=0.1), torch.optim.SGD([other], lr=0.1)]
    averaging.start(optimizers)
    for step in range(3):
        if step == 2:
            parameter.data[1] = torch.inf
        for averager in averaging.averagers.values():
            averager.begin()
            averager.finish()
    if policy is FailIfAstray:
        with pytest.raises(NonFiniteError, match="rank 0"):
            averaging.meet(Meeting.TRAINING_END)
        return
    with pytest.warns(RuntimeWarning, match="starts again") as warned:
        averaging.meet(Meeting.TRAINING_END)
    assert len(warned) == 1
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    averaging.meet(Meeting.TRAINING_END)  # it is told of once


# A center in host memory


@pytest.mark.parametrize("shape", [(10, 7), (3,), (), (1, 40), (33, 2, 2), (0, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_differences_come_near_in_pieces(monkeypatch, shape, transposed):
    monkeypatch.setattr(stagings, "_PIECE", 16)
    parameter, difference = torch.empty(shape, device="meta"), torch.zeros(shape)
    if transposed:
        parameter, difference = (each.permute(tuple(range(each.dim() - 1, -1, -1))) for each in (parameter, difference))
    pieces = list(brought_near([parameter] * 2, [difference] * 2))
    for near, of_near in pieces:
        assert [each.device.type for each in (*near, *of_near)] == ["meta", "meta"]
        assert near[0].shape == of_near[0].shape
        assert near[0].numel() <= 16 + difference.numel() // max(shape or (1,))
    assert sum(near[0].numel() for near, _ in pieces) == 2 * difference.numel()


def test_on_one_device_differences_stay_together():
    tensors = [torch.zeros(3), torch.zeros(2, 2)]
    assert [tuple(map(list, each)) for each in brought_near(tensors, tensors)] == [(tensors, tensors)]


# A collective that is queued on the device


class Work:
    """A collective on a device: ``wait`` returns at once."""

    def __init__(self, looks):
        self.looks, self.waits = looks, 0

    def is_completed(self):
        self.looks -= 1
        return self.looks < 0

    def wait(self):
        self.waits += 1


def test_the_host_waits_until_a_queued_sum_is_there():
    work = Work(looks=3)
    WorkTransfer(work, Failure(timedelta(seconds=5), "Mine"), is_queued=True).wait()
    assert (work.looks, work.waits) == (-1, 1)


def test_a_queued_sum_that_never_ends_is_an_error_with_the_deadline():
    transfer = WorkTransfer(Work(looks=10**9), Failure(timedelta(seconds=0.05), "Mine"), is_queued=True)
    with pytest.raises(ExchangeError, match=r"Mine\(timeout=.*has not ended"):
        transfer.wait()


@pytest.mark.parametrize(("looks", "expected"), [(0, "destroyed"), (10**9, "aborted")])
def test_a_group_whose_work_will_not_end_is_aborted(monkeypatch, looks, expected):
    ends = []
    group = SimpleNamespace(abort=lambda: ends.append("aborted"))
    made = {}
    monkeypatch.setattr(channels.dist, "new_group", lambda **arguments: made.update(arguments) or group)
    monkeypatch.setattr(channels.dist, "destroy_process_group", lambda _: ends.append("destroyed"))
    monkeypatch.setattr(channels.dist, "is_initialized", lambda: True)
    own = OwnGroup("nccl", Failure(timedelta(seconds=5), "Mine"))
    assert made["timeout"] > timedelta(seconds=5)  # the watchdog would end the process before the error
    own.transfer(Work(looks), torch.empty(0, device="meta")).is_queued = True
    own.close()
    assert ends == [expected]


# The thread that exchanges


def test_the_exchange_thread_has_the_workers_device():
    devices = []
    with exchange_thread(1, torch.device("cuda", 3), set_device=devices.append) as thread:
        name = thread.submit(lambda: threading.current_thread().name).result()
    assert devices == [torch.device("cuda", 3)]
    assert name.startswith("easgd-exchange")
    with exchange_thread(1, None, set_device=devices.append) as thread:
        assert thread.submit(torch.get_num_threads).result() == 1
    assert len(devices) == 1
