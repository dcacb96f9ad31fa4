"""The center in shared memory under kill, stop and fork, and what is left of it afterwards."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from service_ranks import Rank, die, is_stopped, running, wait_until

from lightning_easgd.method.rules import CenterRule, PushExchange, SymmetricExchange
from lightning_easgd.served_center import (
    CenterError,
    CenterTimeoutError,
    Layout,
    SharedMemoryCenter,
    SharedMemoryUnavailableError,
)
from lightning_easgd.transport import shared_segment

ELEMENTS, CHUNKS = 3 * 40_000, 3
LAYOUT = Layout.cut([(0, ELEMENTS)], ELEMENTS // CHUNKS)
HELD = range(CHUNKS)


def create(rule, timeout=20.0, rank=0):
    return SharedMemoryCenter(LAYOUT, torch.float64, rule, held=HELD, rank=rank, timeout=timeout)


def attach(address, rule, rank, timeout=20.0):
    return SharedMemoryCenter(LAYOUT, torch.float64, rule, held=HELD, rank=rank, timeout=timeout, address=address)


def whole(center):
    into = torch.empty(ELEMENTS, dtype=torch.float64)
    return into, center.read_all(into)


class HalfDone(CenterRule):
    """Adds the message to the first half of a chunk; what happens then is given."""

    def __init__(self, then):
        self._then = then

    def move_(self, stores, difference, rate, version):
        half = difference.numel() // 2
        stores[0][:half] += difference[:half]
        self._then()
        stores[0][half:] += difference[half:]


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def fork_and_die():
    if os.fork() == 0:
        time.sleep(30)  # a data loader's worker outlives its rank
        os._exit(0)
    die()


def swap_with_center(address, rank, exchanges):
    """Exchange at rate 1, where worker and center swap their values, and add known integers in between."""
    center = attach(address, SymmetricExchange(), rank)
    generator = random.Random(rank)
    x = torch.zeros(ELEMENTS, dtype=torch.float64)
    added = 0
    for _ in range(exchanges):
        step = generator.randrange(1000)
        x += step
        added += step
        message = x.clone()
        center.exchange_all(message, [1.0])
        x -= message
        if generator.random() < 0.2:
            time.sleep(0.001)
    center.close()
    return x.numpy(), added


def test_concurrent_exchanges_conserve_integers_exactly():
    center = create(SymmetricExchange())
    with running(*[Rank(swap_with_center, center.address, rank, 200) for rank in range(3)]) as ranks:
        results = [rank.result() for rank in ranks]
    values, versions = whole(center)
    assert versions == [600] * CHUNKS
    total = values + sum(torch.from_numpy(x) for x, _ in results)
    assert torch.equal(total, torch.full_like(total, sum(added for _, added in results)))
    center.close()


def push_units(address, rank, unit, seconds):
    center = attach(address, PushExchange(), rank)
    message = torch.empty(ELEMENTS, dtype=torch.float64)
    pushes = 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message.fill_(unit)
        center.exchange_all(message, [1.0])
        pushes += 1
    return pushes


def test_kills_at_random_moments_leave_the_rest_exact():
    """Each worker adds a unit of its own, so that the center's digits count every worker's exchanges."""
    center = create(PushExchange())
    base = 100_000
    with running(*[Rank(push_units, center.address, rank, base**rank, 6.0) for rank in range(2)]) as survivors:
        moments = random.Random(0)
        for _ in range(20):
            before = _third_digit(center)
            with running(Rank(push_units, center.address, 2, base**2, 60.0)) as (victim,):
                wait_until(lambda before=before: _third_digit(center) > before)
                time.sleep(moments.uniform(0, 0.02))
                victim.send(signal.SIGKILL)
                victim.process.join(5)
        pushes = [survivor.result() for survivor in survivors]
    values, _ = whole(center)
    torn = center.interruptions()
    for chunk, part in enumerate(LAYOUT.chunks):
        counts = [(values[part] // base**rank) % base for rank in range(3)]
        for rank in range(2):
            assert (counts[rank] == pushes[rank]).all()
        spread = int(counts[2].max() - counts[2].min())
        assert spread <= torn.get(chunk, 0)
    center.close()


def _third_digit(center):
    values = torch.empty(LAYOUT.size(0), dtype=torch.float64)
    center.read(0, values)
    return int(values[0] // 100_000**2)


def exchange_once(address, rank, then, chunk):
    center = attach(address, PushExchange(HalfDone(then)), rank)
    center.exchange(chunk, torch.ones(LAYOUT.size(chunk), dtype=torch.float64), 1.0)


@pytest.mark.parametrize("then", [die, fork_and_die])
def test_a_lock_is_free_as_soon_as_its_holder_is_dead(then):
    center = create(PushExchange(), timeout=5.0)
    with running(Rank(exchange_once, center.address, 1, then, 1)) as (victim,):
        assert victim.ends_within(20)
    started = time.monotonic()
    for chunk in HELD:
        center.exchange(chunk, torch.zeros(LAYOUT.size(chunk), dtype=torch.float64), 1.0)
    assert time.monotonic() - started < 1.0
    assert center.interruptions() == {1: 1}
    values, versions = whole(center)
    assert versions == [1, 1, 1]
    half = LAYOUT.size(1) // 2
    start = LAYOUT.chunks[1].start
    assert int(values.sum()) == half
    assert (values[start : start + half] == 1).all()
    center.close()


def test_a_stopped_holder_is_named_and_other_chunks_go_on():
    center = create(PushExchange(), timeout=0.5)
    with running(Rank(exchange_once, center.address, 7, stop, 1)) as (holder,):
        wait_until(lambda: is_stopped(holder.process.pid), 20)
        message = torch.ones(LAYOUT.size(1), dtype=torch.float64)
        started = time.monotonic()
        with pytest.raises(CenterTimeoutError, match="rank 7 holds"):
            center.exchange(1, message, 1.0)
        assert 0.4 < time.monotonic() - started < 2.0
        center.exchange(0, message, 1.0)
        center.exchange(2, torch.ones(LAYOUT.size(2), dtype=torch.float64), 1.0)
        holder.send(signal.SIGCONT)
        holder.result()
        assert center.exchange(1, torch.zeros_like(message), 1.0) == 1
        assert center.interruptions() == {}
    center.close()


def open_files():
    return {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _exists(name)}


def _exists(name):
    return os.path.lexists(f"/proc/self/fd/{name}")


def test_close_gives_everything_back():
    before, segments = len(open_files()), os.listdir("/dev/shm")
    for _ in range(5):
        center = create(SymmetricExchange())
        other = attach(center.address, SymmetricExchange(), 1)
        other.exchange_all(torch.ones(ELEMENTS, dtype=torch.float64), [0.5])
        other.close()
        center.close()
        center.close()
    assert len(open_files()) == before
    assert "lightning_easgd-center" not in Path("/proc/self/maps").read_text()
    assert os.listdir("/dev/shm") == segments
    with pytest.raises(CenterError, match="closed"):
        center.read(0, torch.empty(LAYOUT.size(0), dtype=torch.float64))


def allocate_with_limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    try:
        shared_segment.SharedSegment.create(size, "test", "A test")
    except CenterError as error:
        return str(error)
    return None


def test_too_little_memory_says_how_much_is_needed(monkeypatch):
    with running(Rank(allocate_with_limit, 32 * 2**20)) as (rank,):
        assert "needs 32.0 MiB" in rank.result()
    monkeypatch.setattr(shared_segment, "available_memory", lambda: 2**20)
    with pytest.raises(CenterError, match=r"needs 2\.7 MiB of shared memory, but 1\.0 MiB are available"):
        create(PushExchange(ThreeStores()))


class ThreeStores(CenterRule):
    names = ("center", "one", "two")

    def move_(self, stores, difference, rate, version):
        """Moves nothing."""


def test_a_platform_without_memfd_is_told_apart(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(SharedMemoryUnavailableError):
        create(SymmetricExchange())


def test_a_wrong_address_is_refused():
    center = create(SymmetricExchange())
    path = center.address.partition("#")[0]
    with pytest.raises(SharedMemoryUnavailableError, match="something else than the memory"):
        attach(path + "#" + "00" * 64, SymmetricExchange(), 1)
    with pytest.raises(SharedMemoryUnavailableError, match="one process namespace"):
        attach("/proc/self/fd/99999#00", SymmetricExchange(), 1)
    center.close()
