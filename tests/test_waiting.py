"""The one loop in which everything waits for others, and the rendezvous that stands on it, without processes."""

import time

import pytest
import torch.distributed as dist
from channels import rendezvous_of

from lightning_easgd.transport import waiting
from lightning_easgd.transport.discovery import Rendezvous
from lightning_easgd.transport.errors import CenterTimeoutError, WorkerLostError
from lightning_easgd.transport.liveness import Liveness
from lightning_easgd.transport.store_client import StoreClient
from lightning_easgd.transport.waiting import wait_until

pytestmark = pytest.mark.timeout(60)


class Clock:
    """Time passes in sleeps alone, each at least so long."""

    def __init__(self, monkeypatch, step):
        self.now, self.step, self.pauses = 0.0, step, []
        monkeypatch.setattr(waiting.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(waiting.time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += max(seconds, self.step)


def test_what_is_there_costs_one_question(monkeypatch):
    clock = Clock(monkeypatch, 1.0)
    asked = []
    assert wait_until(lambda: asked.append(0) or True, 0.0)
    assert (len(asked), clock.pauses) == (1, [])


def test_pauses_grow_up_to_the_longest(monkeypatch):
    clock = Clock(monkeypatch, 0.0)
    assert wait_until(lambda: len(clock.pauses) == 10, 60.0, longest_pause=1e-3)
    assert clock.pauses[:3] == pytest.approx([20e-6, 40e-6, 80e-6])
    assert clock.pauses[-3:] == [1e-3] * 3


def test_the_deadline_and_the_looks(monkeypatch):
    Clock(monkeypatch, 0.03)
    looks = []
    assert not wait_until(lambda: False, 0.2, look=looks.append)
    assert looks == pytest.approx([0.06, 0.12, 0.18])


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    clock = Clock(monkeypatch, 0.0)

    def is_done():
        if len(clock.pauses) == 5:
            clock.now += 3600.0  # SIGSTOP, and SIGCONT an hour later
        return len(clock.pauses) == 7

    assert wait_until(is_done, 2.0)


class Told(Liveness):
    """What a test says of the ranks."""

    def __init__(self, lost=(), stopped=()):
        self._lost, self._stopped = dict(lost), frozenset(stopped)

    def lost(self, among):
        return {rank: why for rank, why in self._lost.items() if rank in among}

    def stopped(self, among):
        return self._stopped & frozenset(among)

    def _describe(self, rank):
        return "is stopped" if rank in self._stopped else "hangs"


@pytest.mark.parametrize(
    ("told", "kind", "text"),
    [
        (
            Told(lost={2: "OSError: no space"}),
            WorkerLostError,
            r"ranks \[2\] have died .*\(rank 2: OSError: no space\)",
        ),
        (Told(), CenterTimeoutError, r"ranks \[1, 2\] have not come \(rank 1 hangs; rank 2 hangs\)"),
        (Told(stopped={2}), CenterTimeoutError, r"ranks \[2\] have not come \(rank 2 is stopped\)"),
        (Told(lost={3: "it left when it had done its part"}), CenterTimeoutError, r"ranks \[1, 2\] have not come"),
    ],
    ids=["dead", "late", "stopped", "left after its part"],
)
def test_who_does_not_come_is_named(told, kind, text):
    store = dist.HashStore()
    rendezvous_of(store, 3, 4).enter("here", "it is")
    own = Rendezvous(StoreClient(store, 20.0), told, 0, 4, 0.3, user="Mine")
    started = time.monotonic()
    with pytest.raises(kind, match=rf"Mine\(timeout=0.3 s\): the wait for 'here' failed .*{text}"):
        own.gather("here", "at home")
    assert time.monotonic() - started < 5
    assert own.find("here", [0, 3]) == ["at home", "it is"]
    own.close()
