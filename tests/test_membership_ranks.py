"""A worker of several ranks among others that come and go: all of its ranks are told the same; threads, no torchft."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from channels import Hub, on_threads

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.transport.membership import Membership

WORKERS, RANKS = 2, 2


class Group:
    """The ranks of one coordinate, one of each worker."""

    def __init__(self):
        self.barrier = threading.Barrier(WORKERS, timeout=20)
        self.sent = None

    def of(self, worker):
        return _Member(self, worker)


class _Member:
    def __init__(self, group, worker):
        self.group, self.worker = group, worker

    def broadcast(self, tensors, options):
        (tensor,) = tensors
        if self.worker == options.rootRank:
            self.group.sent = tensor
        self.group.barrier.wait()
        tensor.copy_(self.group.sent)
        self.group.barrier.wait()
        return self

    def wait(self):
        pass


class Manager:
    """What torchft's does on one rank, as the test has it."""

    def __init__(self, worker, step=0, gives=None, fails=False, ranks=None):
        self.worker, self.step, self.gives, self.fails, self.ranks = worker, step, gives, fails, ranks
        self.error, self.loads = None, {}

    def register_state_dict_fn(self, key, load, state):
        self.loads[key] = load

    def start_quorum(self, timeout):
        self.error = None
        if self.fails:
            self.report_error(RuntimeError("no route to the other worker"))
        elif self.gives is not None:
            self.step, states = self.gives
            for key, value in states.items():
                self.loads[key](value)

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]

    def current_step(self):
        return self.step

    def errored(self):
        return self.error

    def report_error(self, error):
        self.error = SimpleNamespace(original_exception=error)

    others = 1  # 1 more than the checksum of the other worker

    def allreduce(self, buffer, reduce_op):
        if buffer.dtype == torch.int32:
            buffer[1 - self.worker] = self.others
        assert buffer.numel()  # gloo has no sum of nothing
        return SimpleNamespace(wait=lambda: None)

    def num_participants(self):
        return WORKERS

    def participating_rank(self):
        return self.worker

    def should_commit(self, timeout):
        good = torch.tensor([int(self.error is None)])
        self.ranks.sum(good).wait()
        return int(good) == self.ranks.size


def member(manager, channel, *, group=None, states=("own", "common"), least=1):
    """A membership over this manager; what it has been given is in ``given``."""
    members = Membership(
        "http://none", manager.worker, numbers=2, min_replica_size=least, timeout=1.0, strategy="S", inside=channel
    )
    members.given = {}
    for key in states:
        keep = lambda value, key=key: members.given.__setitem__(key, value)  # noqa: E731
        give = lambda key=key: f"{key} of worker {manager.worker}, rank {channel.rank}"  # noqa: E731
        members.add_state(key, give, keep, is_common=key == "common")
    for state in members._states.values():
        manager.register_state_dict_fn(state.key, state.keep, state.give)
    members._manager, members._group = manager, group
    members._thread = ThreadPoolExecutor(1)
    return members


def test_all_begin_where_the_first_worker_is():
    insides, groups = [Hub(RANKS) for _ in range(WORKERS)], [Group() for _ in range(RANKS)]

    def begin(number):
        worker, rank = divmod(number, RANKS)
        members = member(Manager(worker), insides[worker].channel(rank), group=groups[rank].of(worker))
        members.request()
        assert members.has_come(5)
        return members.given

    given = on_threads(begin, WORKERS * RANKS)
    assert given[:RANKS] == [{}, {}]
    assert given[RANKS:] == [
        {"own": f"own of worker 0, rank {rank}", "common": "common of worker 0, rank 0"} for rank in range(RANKS)
    ]


def test_what_is_common_is_what_the_first_rank_has_got():
    inside = Hub(RANKS)

    def come(rank):
        source = rank  # torchft lets each rank have it from another worker
        states = {"own": f"of {source}", "common": f"at {source}"}
        members = member(Manager(1, gives=(7, states)), inside.channel(rank))
        members.request()
        assert members.has_come(5)
        assert members.behind == 7
        return members.given

    assert on_threads(come, RANKS) == [{"own": f"of {rank}", "common": "at 0"} for rank in range(RANKS)]


@pytest.mark.parametrize("bad", [0, 1])
def test_what_one_rank_has_not_got_none_has(bad):
    """Else the ranks of one worker would be at different moves of the center."""
    inside, commits = Hub(RANKS), Hub(RANKS)

    def come(rank):
        states = {"own": "new", "common": "new"}
        manager = Manager(1, step=3, gives=(7, states), fails=rank == bad, ranks=commits.channel(rank))
        members = member(manager, inside.channel(rank))
        members.request()
        assert members.has_come(5)
        assert members.behind == 0
        members.exchange(lambda: None, int)
        assert not members.commit()
        assert members.has_failed
        assert manager.step == 3
        return members.given, members.problem

    for rank, (given, problem) in enumerate(on_threads(come, RANKS)):
        assert given == {}
        said = "no route to the other worker" if rank == bad else "it has failed on another rank of this worker"
        assert problem == said


def test_what_one_rank_has_lost_all_have():
    inside, commits = Hub(RANKS), Hub(RANKS)

    def exchange(rank):
        manager = Manager(0, step=3, ranks=commits.channel(rank))
        members = member(manager, inside.channel(rank))
        members.request()
        assert members.has_come(5)

        def add_up():
            if rank == 1:
                manager.report_error(RuntimeError("connection closed"))

        members.exchange(add_up, int)
        return members.commit(), members.has_failed, members.failed

    assert on_threads(exchange, RANKS) == [(False, True, 1)] * RANKS


@pytest.mark.parametrize("fails", [False, True])
def test_with_too_few_workers_it_matters_whether_the_others_state_has_come(fails):
    channel = Hub(1).channel(0)
    manager = Manager(1, step=3, gives=(7, {"own": "new", "common": "new"}), fails=fails, ranks=channel)
    manager.should_commit = lambda timeout: False
    members = member(manager, channel, least=3)
    members.request()
    assert members.has_come(5)
    members.exchange(lambda: None, int)
    assert not members.commit()
    assert members.has_failed == fails


def test_who_is_answered_late_makes_all_wait():
    inside = Hub(RANKS)
    held = threading.Event()

    class Late(Manager):
        def start_quorum(self, timeout):
            assert held.wait(20)

    def come(rank):
        members = member((Late if rank else Manager)(0, step=3), inside.channel(rank))
        members.request()
        first = members.has_come(0.2)
        held.set()
        return first, members.has_come(5)

    assert on_threads(come, RANKS) == [(False, True)] * RANKS


def test_an_error_of_the_first_rank_ends_all():
    inside = Hub(RANKS)

    def check(rank):
        members = member(Manager(0), inside.channel(rank))

        def act():
            raise ExchangeError("no lighthouse")

        with pytest.raises(ExchangeError) as raised:
            members._of_first(act)
        return str(raised.value)

    said = on_threads(check, RANKS)
    assert said == ["no lighthouse", "S: the first rank of this worker has failed; look for its error."]


def test_nothing_to_add_up_is_no_operation():
    members = member(Manager(0, step=3), Hub(1).channel(0))
    members.all_reduce(torch.empty(0))
    members.all_reduce(torch.ones(1))


@pytest.mark.parametrize("worker", range(WORKERS))
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1), ()])
def test_of_workers_with_different_centers_all_but_the_first_begin_anew(worker, which):
    """They have each gone on alone, one after the other; of several ranks perhaps one has a slice that differs."""
    inside, commits = Hub(RANKS), Hub(RANKS)

    def exchange(rank):
        manager = Manager(worker, step=3, ranks=commits.channel(rank))
        manager.others = 8 if rank in which else 1
        members = member(manager, inside.channel(rank))
        members.request()
        assert members.has_come(5)
        members.exchange(lambda: None, int)
        return members.commit(), manager.step

    counts = not which
    assert on_threads(exchange, RANKS) == [(counts, 3 if counts or worker == 0 else 0)] * RANKS
