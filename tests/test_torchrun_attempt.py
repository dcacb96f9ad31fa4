"""Ranks of one attempt of torchrun's find each other in a store that has what those of before have written."""

import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from channels import on_threads
from torch.distributed import HashStore

from lightning_easgd.transport.torchrun_attempt import _name_of_attempt, set_up_group

RANKS = 3


def test_ranks_of_one_attempt_have_a_name_of_their_own():
    store = HashStore()
    names = [
        set(on_threads(lambda rank: _name_of_attempt(store, rank, RANKS, timedelta(seconds=20)), RANKS)) for _ in "ab"
    ]
    assert [len(name) for name in names] == [1, 1]
    assert names[0] != names[1]


def test_who_comes_late_hears_the_name():
    """When rank 0 has already answered the rank of before."""
    store = HashStore()
    on_threads(lambda rank: _name_of_attempt(store, rank, RANKS, timedelta(seconds=20)), RANKS)

    def late(rank):
        time.sleep(0.2 * rank)
        return _name_of_attempt(store, rank, RANKS, timedelta(seconds=20))

    assert len(set(on_threads(late, RANKS))) == 1


def test_who_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] of torchrun's have not come"):
        _name_of_attempt(HashStore(), 0, RANKS, timedelta(seconds=0.05))


def test_others_are_left_alone():
    set_up_group("gloo", timedelta(seconds=1), torch.device("cpu"), {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert not torch.distributed.is_initialized()


def test_a_daemon_does_not_hold_up_the_end_of_a_process():
    script = "from lightning_easgd.transport.daemon import Daemon; import time; Daemon('d').submit(time.sleep, 100)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
