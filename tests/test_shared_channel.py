"""Sums of a few integers in memory that the workers share."""

import random
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from channels import Hub, LoneChannel, on_threads, rendezvous_of

from lightning_easgd.averagers import ExchangeError, SharedChannel
from lightning_easgd.transport.shared_channel import ROW
from lightning_easgd.transport.shared_vectors import SharedVectors

pytestmark = pytest.mark.timeout(60)
SECONDS = timedelta(seconds=20)
ROWS, UNDER_WAY = 6, 2


def vectors_of(store, rank, workers, timeout=SECONDS):
    return SharedVectors(ROWS * ROW, torch.int64, rendezvous_of(store, rank, workers, timeout))


def on_channels(work, workers, timeout=SECONDS):
    """Call ``work(rank, channel)`` on a thread per worker."""
    store, hub, barrier = dist.HashStore(), Hub(workers), threading.Barrier(workers)

    def run(rank):
        vectors = vectors_of(dist.PrefixStore("channel", store), rank, workers, timeout)
        vectors.attach()
        barrier.wait(10)
        channel = SharedChannel(vectors, hub.channel(rank))
        try:
            return work(rank, channel)
        finally:
            channel.close()

    return on_threads(run, workers)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_worker_gets_every_sum(workers):
    """More sums than there is room for, up to a few under way, workers at paces of their own."""

    def work(rank, channel):
        pace, sums, under_way = random.Random(rank), [], []
        for number in range(300):
            buffer = torch.tensor([number, rank * number, -(2**40) * rank, 7][: 1 + number % 4])
            under_way.append((buffer, channel.sum(buffer)))
            if pace.random() < 0.02:
                time.sleep(0.002)
            while len(under_way) > min(UNDER_WAY, number):
                buffer, transfer = under_way.pop(0)
                transfer.wait()
                sums.append(buffer.tolist())
        return sums

    ranks = sum(range(workers))
    expected = [
        [workers * number, ranks * number, -(2**40) * ranks, 7 * workers][: 1 + number % 4] for number in range(300)
    ]
    assert on_channels(work, workers) == [expected[: len(expected) - UNDER_WAY]] * workers


def test_sums_may_be_waited_for_in_any_order():
    def work(rank, channel):
        buffers = [torch.tensor([rank + number]) for number in range(3)]
        transfers = [channel.sum(buffer) for buffer in buffers]
        for number in (2, 0, 1):
            transfers[number].wait()
        return [buffer.item() for buffer in buffers]

    assert on_channels(work, 2) == [[1, 3, 5]] * 2


def test_a_worker_waits_before_it_overwrites_what_another_has_not_read():
    """Rank 1 is as many sums behind as there are rows: rank 0's next one would take the row of the first."""
    ahead, waited = threading.Event(), []

    def work(rank, channel):
        transfers = []
        for number in range(ROWS):
            transfers.append(channel.sum(torch.tensor([number])))
        if rank == 0:
            for transfer in transfers:
                transfer.wait()
            ahead.set()
            started = time.monotonic()
            transfers.append(channel.sum(torch.tensor([ROWS])))
            waited.append(time.monotonic() - started)
        else:
            assert ahead.wait(10)
            time.sleep(0.3)
            for transfer in transfers:
                transfer.wait()
            transfers.append(channel.sum(torch.tensor([ROWS])))
        transfers[-1].wait()

    on_channels(work, 2)
    assert waited[0] > 0.2


def test_other_sums_go_elsewhere():
    events = []
    vectors = vectors_of(dist.HashStore(), 0, 1)
    vectors.attach()
    channel = SharedChannel(vectors, LoneChannel(events))
    for other in (torch.zeros(3), torch.zeros(10, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)):
        channel.sum(other).wait()
    assert events == ["start", "wait"] * 3
    channel.sum(torch.zeros(9, dtype=torch.int64)).wait()
    assert len(events) == 6
    channel.close()


def test_a_sum_that_was_cut_short_is_started_again(monkeypatch):
    """An exception before a worker's part is published: the next sum takes its turn."""

    def work(rank, channel):
        if rank == 0:
            with monkeypatch.context() as patch:
                patch.setattr(channel._vectors, "publish_written", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    channel.sum(torch.tensor([100]))
        sums = []
        for number in range(3):
            buffer = torch.tensor([number])
            channel.sum(buffer).wait()
            sums.append(buffer.item())
        return sums

    def interrupt(number):
        raise KeyboardInterrupt

    assert on_channels(work, 2) == [[0, 2, 4]] * 2


def test_different_sums_are_told():
    def work(rank, channel):
        with pytest.raises(ExchangeError, match="add up different things"):
            channel.sum(torch.zeros(2 + rank, dtype=torch.int64)).wait()

    on_channels(work, 2)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_worker_that_does_not_come_ends_the_wait(leaves):
    """One that has let go of its memory at once, one that hangs after the timeout."""
    done = threading.Event()

    def work(rank, channel):
        transfer = channel.sum(torch.tensor([1]))
        transfer.wait()
        if rank == 1:
            if leaves:
                channel.close()
            assert done.wait(20)
            return None
        started = time.monotonic()
        try:
            with pytest.raises(ExchangeError, match=r"ranks \[1\] have (died|not come)") as error:
                channel.sum(torch.tensor([1])).wait()
        finally:
            done.set()
        return time.monotonic() - started, "died" in str(error.value)

    waited, died = on_channels(work, 2, timeout=timedelta(seconds=1 if not leaves else 20))[0]
    assert died == leaves
    assert waited < 2


def test_a_worker_may_leave_when_it_has_done_its_part():
    def work(rank, channel):
        transfer = channel.sum(torch.tensor([rank + 1]))
        if rank == 1:
            transfer.wait()
            channel.close()
            return None
        time.sleep(0.2)
        transfer.wait()
        return transfer.buffer.item()

    assert on_channels(work, 2)[0] == 3
