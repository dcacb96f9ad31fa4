"""The whole served center in real processes: one node, simulated nodes, deaths, and cleanup."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from service_ranks import connect, die, wait_until, world

from lightning_easgd.method.rules import AveragedRule, PlainRule, PolyakRate, PushExchange, SymmetricExchange
from lightning_easgd.served_center import CenterError, CenterTimeoutError, WorkerLostError, open_center

LAYOUTS = {
    "one node": [[0, 1, 2]],
    "two nodes of two": [[0, 1], [2, 3]],
    "uneven nodes": [[0, 1, 2], [3]],
    "sockets only": [[0], [1], [2]],
}
SEGMENTS = [(0, 5000), (5000, 12000)]


def opened(port, rank, nodes, **changes):
    arguments = {
        "rank": rank,
        "nodes": nodes,
        "segments": SEGMENTS,
        "dtype": torch.float64,
        "exchange": SymmetricExchange(),
        "initial": torch.full((12000,), 3.0) if rank == 0 else None,
        "timeout": 20.0,
        "chunk_elements": 1000,
    }
    return open_center(connect(port), **(arguments | changes))


def everything(center):
    into = torch.empty(12000, dtype=torch.float64)
    return into, center.read_all(into)


def trace_of_resources():
    return (
        sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("easgd")),
        sum("memfd:lightning_easgd" in line for line in Path("/proc/self/maps").read_text().splitlines()),
        sum(
            "memfd:lightning_easgd" in os.readlink(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{name}")
        ),
    )


def swap(port, rank, nodes, exchanges):
    center = opened(port, rank, nodes)
    generator = random.Random(rank)
    x = torch.zeros(12000, dtype=torch.float64)
    added = 0
    for _ in range(exchanges):
        step = generator.randrange(1000)
        x += step
        added += step
        message = x.clone()
        center.exchange_all(message, [1.0, 1.0])
        x -= message
        if generator.random() < 0.2:
            time.sleep(0.002)
    center.control.meet("swapped")
    values, versions = everything(center)
    center.control.meet("read")
    center.close()
    return x.numpy(), added, values.numpy(), versions, trace_of_resources()


@pytest.mark.parametrize("nodes", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_concurrent_exchanges_conserve_integers_exactly(nodes):
    size = sum(map(len, nodes))
    with world(swap, size, nodes, 60) as (_, ranks):
        results = [rank.result() for rank in ranks]
        for rank in ranks:
            assert rank.ends_within(10)
    for _, _, values, versions, resources in results:
        assert (values == results[0][2]).all()
        assert versions == [60 * size] * 12
        assert resources == ([], 0, 0)
    total = results[0][2] + sum(x for x, *_ in results)
    assert (total == 3.0 + sum(added for _, added, *_ in results)).all()


def read_stores(port, rank, nodes):
    center = opened(
        port, rank, nodes, exchange=PushExchange(AveragedRule(PlainRule(), PolyakRate())), name=f"of {len(nodes)}"
    )
    average = torch.empty(12000, dtype=torch.float64)
    center.read_all(average, 1)
    center.control.meet("read")
    if rank == 0:
        center.write_all(torch.full((12000,), 7.0, dtype=torch.float64), 1, version=40)
    center.control.meet("written")
    changed = torch.empty(12000, dtype=torch.float64)
    versions = center.read_all(changed, 1)
    center.control.meet("read again")
    center.close()
    return float(average.min()), float(average.max()), float(changed.min()), versions


@pytest.mark.parametrize("nodes", [[[0, 1]], [[0], [1]]])
def test_stores_are_initialised_and_restored(nodes):
    with world(read_stores, 2, nodes) as (_, ranks):
        for rank in ranks:
            assert rank.result() == (3.0, 3.0, 7.0, [40] * 12)
        for rank in ranks:
            assert rank.ends_within(10)


def open_twice(port, rank):
    for value in (1.0, 2.0):
        center = opened(port, rank, [[0], [1]], initial=torch.full((12000,), value))
        assert (everything(center)[0] == value).all()
        center.control.meet("read")
        center.close()


def test_a_center_can_be_opened_again():
    with world(open_twice, 2) as (_, ranks):
        for rank in ranks:
            rank.result()


def without_shared_memory(port, rank):
    if rank == 1:
        del os.memfd_create
    if rank == 0:
        with pytest.warns(RuntimeWarning, match="use sockets instead"):
            center = opened(port, rank, [[1, 0]])
    else:
        center = opened(port, rank, [[1, 0]])
    message = torch.ones(12000, dtype=torch.float64)
    center.exchange_all(message, [0.0, 0.0])
    center.control.meet("done")
    center.close()
    return float(message.abs().sum())


def test_sockets_serve_local_ranks_where_memory_cannot_be_shared():
    with world(without_shared_memory, 2) as (_, ranks):
        for rank in ranks:
            assert rank.result() == 0.0


def open_in_vain(port, rank, changes, timeout=20.0):
    try:
        opened(port, rank, [[0], [1]], timeout=timeout, **changes[rank])
    except CenterError as error:
        return type(error).__name__, str(error), trace_of_resources()
    return None


@pytest.mark.parametrize(
    ("changes", "difference", "remedy"),
    [
        ({"segments": [(0, 12000)]}, "the center of rank 1 has another layout", "same model and optimizers"),
        ({"dtype": torch.float32}, "the center of rank 1 has another layout", "same model and optimizers"),
        ({"exchange": PushExchange()}, "exchange is SymmetricExchange(rule=PlainRule()) on rank 0 and PushExchange(",
         "same arguments"),
        ({"wire_dtype": "int8"}, "the wire's dtype is None on rank 0 and 'int8' on rank 1", "same arguments"),
    ],
)  # fmt: skip
def test_ranks_that_open_different_centers_are_told_in_what(changes, difference, remedy):
    with world(open_in_vain, 2, [{"user": "MyStrategy"}, {"user": "MyStrategy"} | changes]) as (_, ranks):
        for rank in ranks:
            name, text, resources = rank.result()
            assert name == "CenterError"
            assert text.startswith("MyStrategy: ")
            assert difference in text
            assert remedy in text
            assert resources == ([], 0, 0)


def test_a_rank_that_never_comes_is_named():
    with world(open_in_vain, 1, [{}], 1.0) as (_, (rank,)):
        name, text, _ = rank.result()
        assert name == "CenterTimeoutError"
        assert "ranks [1] have not come" in text


def live_among(port, rank, nodes, victim, killer):
    """Rank ``victim`` ends itself; the others exchange with whom they can, and report."""
    center = opened(port, rank, nodes, timeout=3.0)
    center.control.meet("open")
    if rank == victim:
        time.sleep(0.2)
        killer()
    started = time.monotonic()
    error = None
    try:
        center.control.meet("never")
    except CenterError as failure:
        error = failure
    noticed = time.monotonic() - started
    message = torch.zeros(12000, dtype=torch.float64)
    reached, lost = [], set()
    for chunk, part in enumerate(center.chunks):
        try:
            center.exchange(chunk, message[part], 0.0)
            reached.append(chunk)
        except WorkerLostError as failure:
            lost |= failure.ranks
    wait_until(lambda: center.control.dead_ranks() or center.control.silent_ranks(), 5)
    center.control.meet("reported", among=[other for node in nodes for other in node if other != victim])
    dead, silent = center.control.dead_ranks(), center.control.silent_ranks()
    center.close()
    return type(error), str(error), noticed, reached, lost, dead, silent, trace_of_resources()


@pytest.mark.parametrize(("nodes", "victim"), [([[0, 1, 2]], 1), ([[0, 1], [2, 3]], 3)])
def test_a_killed_rank_is_noticed_by_all_within_a_second(nodes, victim):
    size = sum(map(len, nodes))
    with world(live_among, size, nodes, victim, die) as (_, ranks):
        for number, rank in enumerate(ranks):
            if number == victim:
                continue
            kind, text, noticed, reached, lost, dead, silent, resources = rank.result(20)
            assert kind is WorkerLostError
            assert f"ranks [{victim}] have died" in text
            assert noticed < 2.0
            assert dead == {victim}
            assert silent == frozenset()
            # Only the partner of the dead rank on the other node has lost the chunks that it served.
            partner = len(nodes) > 1 and number == 1
            assert reached == list(range(6 if partner else 12))
            assert lost == ({victim} if partner else set())
            assert resources == ([], 0, 0)
            assert rank.ends_within(10)


def stop_self():
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_rank_is_silent_not_dead_and_others_go_on():
    with world(live_among, 3, [[0, 1, 2]], 1, stop_self) as (_, ranks):
        for number in (0, 2):
            kind, text, noticed, reached, _, dead, silent, _ = ranks[number].result(20)
            assert kind is CenterTimeoutError
            assert "[1] have not come" in text
            assert 2.5 < noticed < 5
            assert reached == list(range(12))
            assert (dead, silent) == (frozenset(), {1})


def ask_to_stop(port, rank):
    center = opened(port, rank, [[0], [1]])
    assert not center.control.stop_requested
    center.control.meet("before")
    if rank == 1:
        center.control.request_stop()
    wait_until(lambda: center.control.stop_requested, 5)
    center.control.meet("asked")
    if rank == 1:
        center.close()
    else:
        wait_until(lambda: center.control.left_ranks() == {1}, 5)
        assert center.control.dead_ranks() == frozenset()
        center.close()


def test_the_flag_to_stop_and_leaving_reach_the_others():
    with world(ask_to_stop, 2) as (_, ranks):
        for rank in ranks:
            rank.result()


@pytest.mark.parametrize("nodes", [[[0, 1]], [[0], [1]]])
def test_survivors_of_a_kill_end_clean_after_an_exchange_storm(nodes):
    with world(storm, 2, nodes) as (_, ranks):
        ranks[0].result()
        time.sleep(0.3)
        ranks[1].send(signal.SIGKILL)
        assert ranks[1].ends_within(5)
        assert ranks[0].ends_within(10)
    assert not [line for line in os.listdir("/dev/shm") if "easgd" in line]


def storm(port, rank, nodes):
    center = opened(port, rank, nodes, timeout=6.0)
    thread = threading.Thread(target=_storm, args=(center,), daemon=True)
    thread.start()
    if rank == 1:
        thread.join()
    threading.Thread(target=_close_when_dead, args=(center,)).start()


def _storm(center):
    message = torch.zeros(12000, dtype=torch.float64)
    try:
        while True:
            center.exchange_all(message, [0.0, 0.0])
    except CenterError:
        pass


def _close_when_dead(center):
    wait_until(lambda: center.control.dead_ranks() == {1}, 20)
    center.close()
    assert trace_of_resources()[0] == []
