"""Every wait has a deadline, knows whether the peer lives and gets on, and names the right rank."""

import errno
import os
import re
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Timer
from ranks import end_ranks, run_ranks
from torch.utils.data import DataLoader
from toys import Quadratic, Regression, fitted

from lightning_easgd import DownpourStrategy, EASGDStrategy

pytestmark = pytest.mark.timeout(150)
SHORT = timedelta(seconds=3)
LONG = timedelta(seconds=60)


class At(Callback):
    """Does something on one rank, at one batch or where training starts."""

    def __init__(self, rank, action, batch=None):
        self.rank, self.action, self.batch = rank, action, batch

    def on_train_start(self, trainer, module):
        if (trainer.global_rank, self.batch) == (self.rank, None):
            self.action()

    def on_train_batch_start(self, trainer, module, batch, index):
        time.sleep(0.01)
        if (trainer.global_rank, index) == (self.rank, self.batch):
            self.action()


def fail():
    raise ValueError("the user's own error\nwith a second line")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    while True:
        time.sleep(1)


def survivors(run, ranks, victim, timeout=60):
    """The errors of all ranks but one that never ends by itself: it is killed when the others have ended."""

    def finish(pids):
        others = [pid for rank, pid in enumerate(pids) if rank != victim]
        deadline = time.monotonic() + timeout
        while any(map(lives, others)) and time.monotonic() < deadline:
            time.sleep(0.1)
        hanging.extend(filter(lives, others))
        os.kill(pids[victim], signal.SIGKILL)

    hanging = []
    outcomes = end_ranks(run, ranks, timeout=10, interfere=finish)
    assert not hanging, "the others hang"
    return [outcome.error for rank, outcome in enumerate(outcomes) if rank != victim]


def lives(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("order", ["free", "round_robin"])
def test_a_rank_whose_main_thread_hangs_is_named(order):
    """Kind: the heartbeat lives, the rank does not get on."""

    def run():
        strategy = EASGDStrategy(mode="async", order=order, tau=2, timeout=SHORT)
        fitted(Quadratic(steps=20, record=False), strategy, 2, callbacks=[At(1, hang, 5)])

    (error,) = survivors(run, 2, victim=1)
    assert {"free": "workers [1] do not come", "round_robin": "worker 1 has not taken its turn"}[order] in error
    assert "main thread has not got on" in error


class Slow(Regression):
    """Steps, batches and validation batches that are each short, and together far longer than the timeout."""

    def training_step(self, batch, index):
        if self.trainer.global_rank == 1:
            time.sleep(0.2)
        return super().training_step(batch, index)

    def validation_step(self, batch, index):
        time.sleep(0.1)
        super().validation_step(batch, index)


@pytest.mark.parametrize(
    "trainer",
    [{"accumulate_grad_batches": 100}, {"accumulate_grad_batches": 1}],
    ids=["no optimizer step", "slow steps"],
)
@pytest.mark.parametrize("order", ["free", "round_robin"])
def test_a_slow_rank_that_gets_on_is_waited_for(order, trainer):
    """Kind: slow is not silent; batches that are accumulated make no optimizer step, and count as well."""

    def run():
        strategy = EASGDStrategy(mode="async", order=order, tau=1, timeout=SHORT)
        fitted(Slow(batches=20), strategy, 2, limit_val_batches=4, **trainer)

    run_ranks(run, 2, timeout=60)


@pytest.mark.parametrize("strategy", [EASGDStrategy, DownpourStrategy])
def test_in_round_robin_order_a_stopped_store_has_a_deadline(strategy):
    """Kind: whoever reads the store; its server is stopped. The strategy that fails has its own name in the error."""

    def run():
        mode = {"mode": "async"} if strategy is EASGDStrategy else {}
        each = strategy(order="round_robin", tau=2, timeout=SHORT, **mode)
        fitted(Quadratic(steps=400, record=False), each, 2, callbacks=[At(0, stop, 9)])

    (error,) = survivors(run, 2, victim=0)
    assert re.search(rf"{strategy.__name__}\(.*rank 0", error)
    assert strategy is EASGDStrategy or "EASGDStrategy" not in error.replace("lightning_easgd", "")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_the_one_to_blame(mode, victim):
    """Kind: of the others nobody blames another, nor itself."""

    def run():
        strategy = EASGDStrategy(mode=mode, tau=2, timeout=SHORT)
        fitted(Quadratic(steps=60, record=False), strategy, 3, callbacks=[At(victim, stop, 9)])

    for error in survivors(run, 3, victim):
        text = error.replace("\n", " ")
        assert re.search(rf"\[{victim}\]|rank {victim} is stopped", text), error
        others = {0, 1, 2} - {victim}
        assert not any(re.search(rf"(ranks|workers) \[{other}\] (do not|hang|are stopped)", text) for other in others)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("action", [die, fail])
def test_a_rank_that_ends_before_the_center_is_open_is_noticed_at_once(mode, action):
    """Kind: death where ranks set up what they share; nobody is told that every rank must open the center."""

    def run():
        strategy = EASGDStrategy(mode=mode, tau=2, timeout=LONG)
        fitted(Quadratic(steps=20, record=False), strategy, 3, callbacks=[At(1, action)])

    outcomes = end_ranks(run, 3, timeout=40)  # the timeout of the strategy is longer
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.exitcode != 0
        assert "every rank must open" not in outcome.error
        if mode == "async":
            assert "ranks [1] have died or raised an error" in outcome.error
            assert action is die or "rank 1: ValueError: the user's own error" in outcome.error


@pytest.mark.parametrize("rank", [0, 1])
def test_others_quote_the_error_of_the_rank_that_failed(rank):
    """Kind: the first error is in every rank's error, also where the rank that failed serves the store."""

    def run():
        strategy = EASGDStrategy(mode="async", tau=2, timeout=LONG)
        fitted(Quadratic(steps=400, record=False), strategy, 3, callbacks=[At(rank, fail, 9)])

    outcomes = end_ranks(run, 3, timeout=40)
    assert all(outcome.exitcode != 0 for outcome in outcomes)
    for other in {0, 1, 2} - {rank}:
        assert f"rank {rank}: ValueError: the user's own error)" in outcomes[other].error, outcomes[other].error


class Uneven(Regression):
    """Rank r has more batches than rank r - 1; validation loaders are made anew, too."""

    def train_dataloader(self):
        data = torch.randn(8 * (5 + 4 * self.trainer.global_rank), 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(data, batch_size=8)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_uneven_ranks_meet_before_lightnings_own_collectives(mode):
    """Kind: a barrier or broadcast of Lightning's between two of our meetings."""

    def run():
        for trainer in (
            {"reload_dataloaders_every_n_epochs": 1},
            {"reload_dataloaders_every_n_epochs": 1, "limit_val_batches": 0},
            {"num_sanity_val_steps": 0},
            {"callbacks": [Timer("00:01:00:00", interval="epoch")], "limit_val_batches": 0},
        ):
            strategy = EASGDStrategy(mode=mode, tau=2, timeout=timedelta(seconds=20))
            fitted(Uneven(), strategy, 3, max_epochs=2, use_distributed_sampler=False, **trainer)

    run_ranks(run, 3, timeout=60)


class LongHook(Callback):
    """A hook of one rank that takes longer than the timeout, before Lightning or a meeting needs all ranks."""

    def __init__(self, rank, name):
        setattr(self, name, lambda trainer, *_, **__: trainer.global_rank == rank and time.sleep(7.5))


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(
    ("name", "rank"),
    [("setup", 1), ("on_fit_start", 0), ("on_train_start", 0), ("on_train_epoch_end", 1), ("on_validation_end", 0)],
)
def test_a_hook_longer_than_the_timeout_is_told_in_words(mode, name, rank):
    """Kind: what waits is gloo's or Lightning's own; the error names the rank and the remedy."""

    def run():
        strategy = EASGDStrategy(mode=mode, tau=2, timeout=SHORT)
        fitted(Regression(), strategy, 2, max_epochs=2, callbacks=[LongHook(rank, name)])

    outcomes = end_ranks(run, 2, timeout=60)
    error = outcomes[1 - rank].error
    assert outcomes[1 - rank].exitcode != 0
    assert re.search(rf"(?i)(ranks|workers) \[{rank}\]", error), error
    assert "timeout" in error


def test_threads_end_with_the_run_when_the_store_is_stopped():
    """Kind: closing waits for nobody who does not answer."""

    def run():
        strategy = EASGDStrategy(mode="async", tau=2, timeout=SHORT)
        try:
            fitted(Quadratic(steps=60, record=False), strategy, 2, callbacks=[At(0, stop, 9)])
        finally:
            names = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("easgd"))
            assert set(names) <= {"easgd-store"}  # in a call that never returns

    (error,) = survivors(run, 2, victim=0)
    assert "rank 0 is stopped by a signal" in error


def test_a_rank_without_descriptors_declares_nobody_dead(monkeypatch):
    """It cannot look at another process: that says nothing of that process."""
    from lightning_easgd.transport.liveness import WatchedProcess, own_process

    def no_descriptor(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    watched = WatchedProcess.find(own_process())
    monkeypatch.setattr("builtins.open", no_descriptor)
    assert not watched.has_ended
    assert not watched.is_stopped


def test_an_errors_first_line_can_be_handed_on_whatever_it_holds():
    from lightning_easgd.strategies.failures import first_line

    assert first_line(ValueError("a file \udcff\nmore")).encode() == b"ValueError: a file ?"
