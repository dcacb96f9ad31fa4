"""Kind: who is silent, dead or to blame, as the control plane tells it."""

import time

import pytest
from torch.distributed import TCPStore

from lightning_easgd.served_center import CenterTimeoutError, ControlPlane, WorkerLostError
from lightning_easgd.transport.liveness import Heartbeats, alive, dead, left
from lightning_easgd.transport.store_client import StoreClient

pytestmark = pytest.mark.timeout(60)


def wait_until(condition, timeout=15.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


@pytest.fixture
def planes():
    """Three ranks in this process; each has a client of its own."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [StoreClient(server, 1.0) for _ in range(3)]
    made = [
        ControlPlane(client.under("c"), rank=rank, nodes=[[0, 1, 2]], processes={}, lost=set(), timeout=1.0)
        for rank, client in enumerate(clients)
    ]
    yield made
    for plane, client in zip(made, clients, strict=True):
        plane.close()
        client.close()


def test_a_heartbeat_without_progress_is_silence(planes):
    def others_are_silent():
        for plane in planes[:2]:
            plane.note_progress()
        return planes[0].silent_ranks() == {2} and planes[1].silent_ranks() == {2}

    wait_until(others_are_silent)
    assert "main thread has not got on" in planes[0].describe({2})
    planes[2].note_progress()
    wait_until(lambda: (planes[0].note_progress(), planes[1].note_progress(), planes[0].silent_ranks() == set())[2])


def test_who_waits_at_a_meeting_gets_on(planes):
    with pytest.raises(CenterTimeoutError, match=r"ranks \[1, 2\] have not come"):
        planes[0].meet("never", timeout=3.0)
    time.sleep(0.5)
    assert 0 not in planes[1].silent_ranks()


def test_a_reason_reaches_the_others(planes):
    planes[1].resign("ValueError: nonsense")
    wait_until(lambda: planes[0].dead_ranks() == planes[2].dead_ranks() == {1})
    assert planes[0].reasons() == {1: "ValueError: nonsense"}
    with pytest.raises(WorkerLostError, match="rank 1: ValueError: nonsense"):
        planes[0].meet("anything")
    assert planes[1].dead_ranks() == frozenset()


class TestHeartbeats:
    def test_silence_is_measured_up_to_the_last_look(self, monkeypatch):
        now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: now)
        beats = Heartbeats([0, 1])
        beats.see({0: alive(1, 1), 1: alive(1, 1)})
        now = 105.0
        beats.see({0: alive(2, 2), 1: alive(2, 1)})
        now = 999.0  # the store has not answered since
        assert beats.unmoved(4.0) == {1}
        assert beats.unmoved(6.0) == beats.unheard(4.0) == frozenset()

    def test_who_has_left_or_died(self):
        beats = Heartbeats([0, 1, 2])
        beats.see({0: alive(1, 1), 1: left(), 2: dead("OSError: no space left")})
        assert beats.left == {1}
        assert beats.dead == {2: "OSError: no space left"}
