"""The ranks of a worker give each other their slices of the center; threads, with and without shared memory."""

from datetime import timedelta

import pytest
import torch
from channels import Hub, on_threads, rendezvous_of
from torch.distributed import HashStore

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.averagers.sync.choice import memory_joins
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.sync.slice_join import ChannelJoin, MemoryJoin, cut
from lightning_easgd.method.rules import outer_rule
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.shared_vectors import SharedVectors

RANKS = 3
kinds = pytest.mark.parametrize("kind", ["channel", "memory"])


def make_center(numel):
    """A center with two stores."""
    return ReplicatedCenter(FlatTensors([[torch.zeros(numel)]], torch.float64), outer_rule(0.5, nesterov=False))


def make_join(kind, rank, hub, store, center, seconds=20):
    if kind == "channel":
        return ChannelJoin(hub.channel(rank))
    rendezvous = rendezvous_of(store, rank, RANKS, timedelta(seconds=seconds))
    return MemoryJoin(rank, RANKS, SharedVectors(MemoryJoin.room(center, RANKS), torch.float64, rendezvous))


@pytest.mark.parametrize(
    ("numel", "slices"), [(7, [(0, 3), (3, 6), (6, 7)]), (4, [(0, 2), (2, 4), (4, 4)]), (0, [(0, 0)] * 3)]
)
def test_slices_are_all_of_a_vector(numel, slices):
    assert [(part.start, part.stop) for part in cut(numel, RANKS)] == slices


@kinds
@pytest.mark.parametrize("numel", [1, 4, 7, 1000])
def test_all_have_what_each_has_made_of_its_slice(kind, numel):
    hub, store = Hub(RANKS), HashStore()

    def work(rank):
        center = make_center(numel)
        join = make_join(kind, rank, hub, store, center)
        seen = []
        for number in range(5):
            for place, values in enumerate(center.stores):
                values.flat[cut(numel, RANKS)[rank]] = 100.0 * number + 10 * place + rank
            join.join(center)
            seen.append([values.flat.tolist() for values in center.stores])
        join.close()
        return seen

    parts = [[rank] * (part.stop - part.start) for rank, part in enumerate(cut(numel, RANKS))]
    expected = [
        [[100.0 * number + 10 * place + rank for part in parts for rank in part] for place in range(2)]
        for number in range(5)
    ]
    assert on_threads(work, RANKS) == [expected] * RANKS


@kinds
def test_a_center_of_another_size(kind):
    hub, store, meeting = Hub(RANKS), HashStore(), Hub(RANKS)

    def work(rank):
        center = make_center(4)
        join = make_join(kind, rank, hub, store, center)
        join.join(center)
        center = make_center(10)
        join = join.renewed(center)
        center.flat[cut(10, RANKS)[rank]] = rank
        join.join(center)
        meeting.channel(rank).sum(torch.zeros(1)).wait()  # one that is ahead must not take its memory away
        join.close()
        return center.flat.tolist()

    assert on_threads(work, RANKS) == [[0] * 4 + [1] * 4 + [2] * 2] * RANKS


def test_a_rank_that_does_not_come_is_named():
    hub, store = Hub(RANKS), HashStore()

    def work(rank):
        center = make_center(4)
        join = make_join("memory", rank, hub, store, center, seconds=1)
        join.join(center)
        if rank == 2:
            return "away"
        with pytest.raises(ExchangeError, match=r"(?s)timeout=0:00:01.*rank 2"):
            join.join(center)
        return "told"

    assert on_threads(work, RANKS) == ["told", "told", "away"]


@pytest.mark.parametrize("unable", [None, 3])
def test_all_workers_join_in_one_way(unable, monkeypatch):
    """The other way takes process groups, which all ranks make together."""
    everyone, insides, closed = Hub(4), [Hub(2), Hub(2)], []

    class Vectors:
        def close(self):
            closed.append(self)

    def vectors_of(room, dtype, store, inside, timeout):
        return None if store == "of worker 1" and unable is not None else Vectors()

    monkeypatch.setattr("lightning_easgd.averagers.sync.choice.shared_vectors", vectors_of)

    def work(number):
        worker, rank = divmod(number, 2)
        make_join = memory_joins(
            f"of worker {worker}",
            insides[worker].channel(rank),
            everyone.channel(number),
            timedelta(seconds=20),
            otherwise=lambda center: "otherwise",
        )
        return make_join(make_center(4))

    joins = on_threads(work, 4)
    assert [join == "otherwise" for join in joins] == [unable is not None] * 4
    assert len(closed) == (0 if unable is None else 2)
