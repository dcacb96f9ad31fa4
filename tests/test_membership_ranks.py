"""A worker of several ranks among others that come and go: all of its ranks are told the same; threads, no torchft."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
import torch
from channels import Hub, on_threads
from torch.distributed import ReduceOp

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.transport.channel import LoneChannel
from lightning_easgd.transport.device_queue import HostQueue
from lightning_easgd.transport.lighthouse import Heard, Lighthouse
from lightning_easgd.transport.manager import _make_transport
from lightning_easgd.transport.membership import Membership

WORKERS, RANKS = 2, 2


class Group:
    """The ranks of one coordinate, one of each worker."""

    def __init__(self):
        self.barrier = threading.Barrier(WORKERS, timeout=20)
        self.sent = None
        self.rows = {}

    def of(self, worker):
        return _Member(self, worker)


class _Member:
    def __init__(self, group, worker):
        self.group, self.worker = group, worker

    def errored(self):
        return None

    def broadcast(self, tensors, options):
        (tensor,) = tensors
        if self.worker == options.rootRank:
            self.group.sent = tensor
        self.group.barrier.wait()
        tensor.copy_(self.group.sent)
        self.group.barrier.wait()
        return self

    def allgather(self, lists, tensors, options):
        (rows,), (own,) = lists, tensors
        self.group.rows[self.worker] = own
        self.group.barrier.wait()
        for worker, row in enumerate(rows):
            row.copy_(self.group.rows[worker])
        self.group.barrier.wait()
        return self

    def wait(self):
        pass


class Alone:
    """A group in which the other workers say what a test has them say.

    Number, checksum, how far they were behind, and the milliseconds of a step; what is left out is 0.
    """

    def __init__(self, worker, *others):
        self.worker, self.others = worker, list(others)
        self.waited = []  # seconds for others that have not come
        self.is_lost = False

    def errored(self):
        return None

    def allgather(self, lists, tensors, options):
        self.waited.append(options.timeout.total_seconds())
        if self.is_lost:
            raise RuntimeError("timed out")
        (rows,), (own,) = lists, tensors
        said = [*self.others[: self.worker], own.tolist(), *self.others[self.worker :]]
        for row, numbers in zip(rows, said, strict=True):
            row.copy_(torch.tensor([*numbers, *[0] * (len(own) - len(numbers))]))
        return self

    def allreduce(self, buffers, options):
        assert options.reduceOp == ReduceOp.SUM
        assert all(buffer.numel() for buffer in buffers)  # gloo has no sum of nothing
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

    def shutdown(self, wait):
        pass

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

    others = 0  # the checksum of the other worker

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
        "http://none", manager.worker, min_replica_size=least, timeout=1.0, strategy="S", inside=channel, fit=1
    )
    members.given = {}
    for key in states:
        keep = lambda value, key=key: members.given.__setitem__(key, value)  # noqa: E731
        give = lambda key=key: f"{key} of worker {manager.worker}, rank {channel.rank}"  # noqa: E731
        members.add_state(key, give, keep, is_common=key == "common")
    for state in members._states.values():
        manager.register_state_dict_fn(state.key, state.keep, state.give)
    members._manager = manager
    members._group = group or Alone(manager.worker, [1 - manager.worker, manager.others, 0])
    members._thread = ThreadPoolExecutor(1)
    return members


def met(manager, channel, **arguments):
    """Members that have asked for an exchange, to which the others have come."""
    members = member(manager, channel, **arguments)
    members.request()
    assert members.has_come(5)
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
        members = met(manager, inside.channel(rank))
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
        members = met(manager, inside.channel(rank))

        def add_up():
            if rank == 1:
                manager.report_error(RuntimeError("connection closed"))

        members.exchange(add_up, int)
        return members.commit(), members.has_failed, members.failed

    assert on_threads(exchange, RANKS) == [(False, True, 1)] * RANKS


class Stuck(HostQueue):
    """A device that does not get on with an exchange, until it is ended; or not even then."""

    is_ended, ends = False, True

    @property
    def has_come(self):
        return self.is_ended and self.ends


class NCCL(Alone):
    """Of a worker whose device is stuck; it may know that another worker is lost."""

    error = None

    def errored(self):
        return self.error

    def abort(self):
        self.members._queue.is_ended = True


def exchange_of_a_stuck_device(ends=True, error=None):
    channel = Hub(1).channel(0)
    manager = Manager(0, step=3, ranks=channel)
    group = NCCL(0, [1, 0, 0])
    members = met(manager, channel, group=group)
    members._timeout = timedelta(seconds=0.3)
    members._queue, group.members, group.error = Stuck(), members, error
    members._queue.ends = ends
    began = time.monotonic()
    members.exchange(lambda: None, int)
    return members.commit(), members.problem, time.monotonic() - began


def test_what_does_not_end_on_a_device_is_lost_in_time():
    counts, problem, seconds = exchange_of_a_stuck_device()
    assert (counts, problem) == (False, "it has not ended on the GPU within 0.3 s")
    assert 0.3 <= seconds < 2


def test_a_worker_that_nccl_knows_to_be_lost_is_not_waited_for():
    counts, problem, seconds = exchange_of_a_stuck_device(error=RuntimeError("NCCL has lost another worker"))
    assert (counts, problem) == (False, "NCCL has lost another worker")
    assert seconds < 0.25


def test_a_group_that_has_an_error_before_an_exchange_makes_none():
    channel = Hub(1).channel(0)
    manager = Manager(0, step=3, ranks=channel)
    group = NCCL(0, [1, 0, 0])
    members = met(manager, channel, group=group)
    members._queue, group.members, group.error = Stuck(), members, RuntimeError("it was aborted")
    asked = []
    group.allgather = lambda *_: asked.append(1)
    members.exchange(lambda: None, int)
    assert (members.commit(), members.problem, asked) == (False, "it was aborted", [])


def test_who_leaves_ends_what_its_device_does_with_the_others():
    channel = Hub(1).channel(0)
    group = NCCL(0, [1, 0, 0])
    members = met(Manager(0, step=3, ranks=channel), channel, group=group)
    members._kind, members._queue, group.members = "nccl", Stuck(), members
    members.close()
    assert members._queue.is_ended


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (Heard(0, kind="nccl"), Heard(1), r"replica_id=1 has .*process_group='gloo'\), and this one 'nccl'; give all"),
        (Heard(0), Heard(1, kind="nccl"), r"replica_id=1 has .*process_group='nccl'\), and this one 'gloo'; give all"),
        (Heard(0, 2), Heard(1), r"replica_id=1 has 1 ranks, and this one 2"),
        (Heard(3), Heard(3), r"replica_id=3 is alive already \(11-a\)"),
        (Heard(0), Heard(1, fit=2), r"replica_id=1 is in fit 2 of the job"),
        (Heard(0, 8, 2, "nccl"), Heard(1234567, 8, 2, "nccl"), None),
    ],
)
def test_beside_whom_a_worker_cannot_be(own, other, said, monkeypatch):
    page = f"<li>{other.name}:11-a: seen 0.1s ago</li>"
    assert Heard.all_on(page) == [replace(other, launch="11-a", age=0.1)]
    lighthouse = Lighthouse("http://none", own, "S")
    monkeypatch.setattr(lighthouse, "heard", lambda: Heard.all_on(page))
    monkeypatch.setattr("lightning_easgd.transport.lighthouse._LOOKS", 0.0)
    with pytest.raises(ExchangeError, match=said) if said else nullcontext():
        lighthouse.refuse_others("")


@pytest.mark.parametrize("ends", [False, True])
def test_who_waits_for_an_earlier_fit_says_so(ends, monkeypatch):
    """Kind: a wait of minutes says for what; a fit that is tried again waits in vain."""
    pytest.importorskip("torchft")
    lighthouse = Lighthouse("http://none", Heard(0, fit=2), "S")
    heard = iter([[Heard(1, age=0.0)]] * 3)
    monkeypatch.setattr(lighthouse, "heard", lambda: next(heard, []) if ends else [Heard(1, age=0.0)])
    monkeypatch.setattr(lighthouse, "_check_page", lambda: None)
    monkeypatch.setattr("torchft.coordination.LighthouseClient", lambda *_, **__: None)
    monkeypatch.setattr("lightning_easgd.transport.lighthouse._SOON", 0.0)
    said = r"^S\(timeout=1 s\): this is fit 2 of the job, and waits for .* replica_id=1, which is still in fit 1; where"
    refused = nullcontext() if ends else pytest.raises(ExchangeError, match="replica_id=1 is still in fit 1; wait")
    with pytest.warns(RuntimeWarning, match=said), refused:
        lighthouse.check(1.0)


def test_a_device_that_never_gets_on_ends_the_run():
    with pytest.raises(ExchangeError, match=r"^S: an exchange that has been lost .* does not end on the GPU; start"):
        exchange_of_a_stuck_device(ends=False)


@pytest.mark.parametrize("fails", [False, True])
def test_with_too_few_workers_it_matters_whether_the_others_state_has_come(fails):
    channel = Hub(1).channel(0)
    manager = Manager(1, step=3, gives=(7, {"own": "new", "common": "new"}), fails=fails, ranks=channel)
    manager.should_commit = lambda timeout: False
    members = met(manager, channel, least=3)
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


def test_who_waits_for_the_others_sees_that_a_rank_of_its_own_is_lost():
    """Kind: nobody answers a rank whose worker is not all there, so that it would wait as long as for the others."""

    class Unanswered(Manager):
        def start_quorum(self, timeout):
            ends.wait(60)

    class Inside(LoneChannel):
        size = RANKS

        def sum(self, buffer):
            raise ExchangeError("ranks [1] have died")

    ends = threading.Event()
    members = member(Unanswered(0), Inside())
    members.request()
    begun = time.monotonic()
    with pytest.raises(ExchangeError, match="have died"):
        members.has_come(40)
    assert time.monotonic() < begun + 20
    ends.set()


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
        manager.others = 7 if rank in which else 0
        members = met(manager, inside.channel(rank))
        members.exchange(lambda: None, int)
        return members.commit(), manager.step

    counts = not which
    assert on_threads(exchange, RANKS) == [(counts, 3 if counts or worker == 0 else 0)] * RANKS


def test_who_begins_anew_as_the_centers_differed_has_missed_what_came_since_all_met():
    """Kind: a number that stands for something else (0 for "as if it had never exchanged") is counted with.

    With it ``restart_after_missed`` would throw away a worker that has missed one move of a thousand.
    """
    ranks = Hub(1).channel(0)
    manager = Manager(1, step=1000, ranks=ranks)
    members = member(manager, ranks, group=Alone(1, [0, 0, 0]))

    def exchange(common):
        members.request()
        assert members.has_come(5)
        missed = members.behind
        members.exchange(lambda: None, lambda: common)
        return missed, members.commit()

    assert exchange(common=0) == (0, True)
    manager.step = 1003  # two alone, as the other one has made
    assert exchange(common=7) == (0, False)
    manager.gives = 1004, {"own": "theirs", "common": "theirs"}
    assert exchange(common=0) == (4, True)


def test_of_those_that_begin_together_the_one_that_is_furthest_gives_its_state():
    """They may all have been started again, from checkpoints of different steps."""
    group = Group()

    def begin(worker):
        members = member(Manager(worker), Hub(1).channel(0), group=group.of(worker))
        members.progress = lambda: 60 + 540 * worker
        members.request()
        assert members.has_come(5)
        return members.given

    assert on_threads(begin, WORKERS) == [
        {"own": "own of worker 1, rank 0", "common": "common of worker 1, rank 0"}, {}
    ]  # fmt: skip


@pytest.mark.parametrize("lives", [True, False])
def test_none_begin_anew_beside_one_that_trains(lives):
    """They have come between two of its exchanges, and are enough for the lighthouse to go on without it."""
    insides, commits = ([Hub(RANKS) for _ in range(WORKERS)] for _ in range(2))
    groups = [Group() for _ in range(RANKS)]
    others = [
        Heard(0, RANKS, 1, "gloo", "0", 0.1),
        Heard(1, RANKS, 1, "gloo", "1", 0.1),
        Heard(4, RANKS, 1, "gloo", "4", 9.0),
    ]

    def begin(number):
        worker, rank = divmod(number, RANKS)
        manager = Manager(worker, ranks=commits[worker].channel(rank))
        members = member(manager, insides[worker].channel(rank), group=groups[rank].of(worker))
        has_heard = lives and number == RANKS  # one of them alone
        members._lighthouse.heard = lambda: [*others, Heard(5, RANKS, 1, "gloo", "5", 0.1)] if has_heard else others
        members.request(comes=True)
        assert members.has_come(5)
        members.exchange(lambda: None, int)
        return members.commit(), members.awaited, members.failed, members.all_begin

    assert on_threads(begin, WORKERS * RANKS) == [(not lives, 5 if lives else None, 0, True)] * WORKERS * RANKS


def exchanged(manager, *others, replica_id=0, commits=True):
    """A membership after an exchange with others who say this."""
    manager.ranks = Hub(1).channel(0)
    manager.num_participants = lambda: 1 + len(others)
    if not commits:
        manager.should_commit = lambda timeout: False
    members = member(manager, manager.ranks, group=Alone(manager.worker, *others))
    members.replica_id = replica_id
    members.request()
    assert members.has_come(5)
    members.exchange(lambda: None, int)
    return members


def test_a_number_may_be_as_large_as_a_jobs():
    members = exchanged(Manager(1, step=3), [0, 0, 0], replica_id=4_023_117)
    assert members.commit()
    assert members.living == (0, 4_023_117)
    alone = exchanged(Manager(0, step=3), replica_id=1024)
    assert alone.commit()
    assert alone.living == (1024,)


def test_who_is_in_the_middle_of_a_long_step_is_waited_for():
    """Kind: a transfer's timeout is no limit of a step's length; of other workers' steps a worker hears."""
    manager = Manager(0, step=3)
    members = exchanged(manager, [1, 0, 0, 7000])
    assert members.commit()
    group = members._group

    def waited(**settings):
        vars(group).update(settings, waited=[])
        members.request()
        assert members.has_come(5)
        members.exchange(lambda: None, int)
        assert members.commit() != group.is_lost
        return group.waited

    members.pace = 2.0  # longer than the second that a transfer may take
    assert waited(others=[[1, 0, 0, 500]]) == [8.0]
    assert waited() == [3.0]
    assert waited(is_lost=True) == [3.0]  # perhaps since somebody's steps are longer than is known
    assert waited() == [5.0]
    assert waited(is_lost=False) == [9.0]
    assert waited() == [3.0]
    members.expect(4.0)
    assert waited() == [5.0]


def test_who_lives_is_known_where_there_are_too_few():
    """The worker that saved may have died, and another one is to save."""
    members = exchanged(Manager(0, step=3), replica_id=1, commits=False)
    members.living = (0, 1)
    assert not members.commit()
    assert members.living == (1,)


@pytest.mark.parametrize(
    ("behind", "theirs", "ends"),
    [(4, 0, True), (0, 4, False), (0, 0, False)],
    ids=["that stood still", "that took its place", "of the same moment"],
)
def test_of_two_workers_of_one_number_the_older_one_ends(behind, theirs, ends):
    class Behind(Manager):
        def start_quorum(self, timeout):
            self.step += behind

    members = exchanged(Behind(0, step=3), [0, 0, theirs])
    if ends:
        with pytest.raises(ExchangeError, match="another worker with replica_id=0 takes part"):
            members.commit()
    else:
        assert not members.commit()
        assert members.problem == "two workers have one replica_id"


@pytest.mark.parametrize("deaf", [(), (0,), (1,), (0, 1)])
def test_who_lives_is_the_same_on_all_ranks(deaf):
    """Who saves follows from it, and they save together; of an exchange that is lost one rank may have heard."""
    inside, commits = Hub(RANKS), Hub(RANKS)

    def exchange(rank):
        manager = Manager(1, step=3, ranks=commits.channel(rank))
        members = met(manager, inside.channel(rank))

        def add_up():
            manager.report_error(RuntimeError("connection closed"))

        def common():
            if rank in deaf:
                add_up()
            return 0

        members.exchange(add_up, common)
        assert not members.commit()
        return members.living

    assert on_threads(exchange, RANKS) == [(1,) if deaf else (0, 1)] * RANKS


@pytest.mark.parametrize(
    ("heard", "ranks", "is_first"),
    [
        ({0: 0.1, 2: 0.1}, 1, False),
        ({0: 9.0, 2: 0.1}, 1, True),
        ({2: 0.1}, 1, True),
        ({}, 1, False),  # no lighthouse: as of the last exchange
        ({0: 9.0, 2: 0.1}, RANKS, False),  # ranks that save together do not look each for itself
    ],
)
@pytest.mark.parametrize("is_open", [True, False])  # it also saves after a fit, when nobody is missed any more
def test_who_is_not_heard_of_is_not_the_first(monkeypatch, heard, ranks, is_first, is_open):
    members = member(Manager(0), Hub(ranks).channel(0))
    members.replica_id, members.living = 2, (0, 2)
    seen = [Heard(number, ranks, 1, "gloo", "name", age) for number, age in heard.items()]
    if not is_open:
        members._manager = None
    monkeypatch.setattr(members._lighthouse, "heard", lambda: seen)
    assert members.is_first() == is_first


@pytest.fixture
def gives():
    """A transport that gives a state, which is longer than what a connection holds, and the state."""
    pytest.importorskip("torchft")
    transport = _make_transport(timedelta(seconds=10))
    state = {"torchft": {"step": 3}, "user": [torch.full((1 << 22,), float(number)) for number in range(3)]}
    transport.send_checkpoint([1], 3, state, timedelta(seconds=10))
    yield transport, state
    transport.shutdown()
    transport._server.server_close()


def test_who_receives_too_slowly_does_not_hold_up_the_giver(gives):
    """Kind: whatever a worker that comes does, those that live go on; torchft's giver would end with an error."""
    transport, _ = gives
    address = urlsplit(transport.metadata())
    with socket.create_connection(("localhost", address.port)) as slow:
        slow.sendall(b"GET /checkpoint/3/full HTTP/1.0\r\n\r\n")
        assert slow.recv(1)
        begins = time.monotonic()
        transport.disallow_checkpoint()
        assert time.monotonic() - begins < 2
        slow.settimeout(5)
        while slow.recv(1 << 20):  # what was under way, and then the end
            pass


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_part_of_a_state_is_none(gives):
    transport, state = gives
    port = urlsplit(transport.metadata()).port
    received = transport._load_from_address(f"http://localhost:{port}/checkpoint/3/full", timedelta(seconds=5))
    assert all(torch.equal(a, b) for a, b in zip(received["user"], state["user"], strict=True))

    with socket.create_server(("localhost", 0)) as server:

        def give_half():
            with server.accept()[0] as receiver:
                receiver.recv(1000)
                with socket.create_connection(("localhost", port)) as giver, giver.makefile("rb") as answer:
                    giver.sendall(b"GET /checkpoint/3/full HTTP/1.0\r\n\r\n")
                    receiver.sendall(answer.read(3 << 22))

        thread = threading.Thread(target=give_half)
        thread.start()
        with pytest.raises(ConnectionError, match="their state has not come whole: "):
            transport._load_from_address(
                f"http://localhost:{server.getsockname()[1]}/checkpoint/3/full", timedelta(seconds=5)
            )
        thread.join()
