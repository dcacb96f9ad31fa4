"""Killed, failing, frozen, slow and early ranks: every process ends, and nobody hangs."""

import inspect
import os
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from ranks import end_ranks, run_ranks
from torch.utils.data import DataLoader, IterableDataset
from toys import Quadratic, Regression, fitted

from lightning_easgd import EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricStrategy

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=6)
NO_SAVE_ON_EXCEPTION = "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters


class At(Callback):
    """Does something on one rank at one batch."""

    def __init__(self, rank, batch, action):
        self.rank, self.batch, self.action = rank, batch, action

    def on_train_batch_start(self, trainer, module, batch, index):
        time.sleep(0.01)
        if (trainer.global_rank, index) == (self.rank, self.batch):
            self.action()


def fail():
    raise ValueError("the user's own error")


def train(callbacks, steps=400, **trainer):
    strategy = EASGDStrategy(tau=4, timeout=TIMEOUT)
    module = Quadratic(steps=steps, record=False)
    return fitted(module, strategy, int(os.environ["WORLD_SIZE"]), callbacks=callbacks, **trainer)


@pytest.mark.parametrize(("rank", "batch"), [(0, 1), (0, 8), (0, 10), (1, 8), (2, 1), (2, 10)])
def test_an_exception_on_one_rank_ends_all(rank, batch):
    outcomes = end_ranks(train, 3, [At(rank, batch, fail)], timeout=40)
    assert all(outcome.exitcode != 0 for outcome in outcomes)
    assert "the user's own error" in outcomes[rank].error
    for other in {0, 1, 2} - {rank}:
        assert "ExchangeError: EASGDStrategy(timeout=0:00:06): an exchange failed" in outcomes[other].error


class FailsEarly(Quadratic):
    def configure_optimizers(self):
        if self.trainer.global_rank == 1:
            fail()
        return super().configure_optimizers()


@pytest.mark.parametrize("given", [{}, {"mode": "async"}, {"devices_per_worker": 2}, "fabric"])
def test_an_exception_before_ranks_open_what_they_exchange_through_ends_all_at_once(given):
    """Kind: waiting in the store for a rank that is lost, of which it does not tell."""

    def run():
        if given != "fabric":
            fitted(FailsEarly(), EASGDStrategy(timeout=timedelta(seconds=90), **given), 2)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricStrategy(timeout=timedelta(seconds=90)))
        fabric.launch()
        module = torch.nn.Linear(1, 1)
        module, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        if fabric.global_rank == 1:
            fail()
        fabric.backward(module(torch.ones(1)).sum())
        optimizer.step()

    outcomes = end_ranks(run, 2, timeout=45)
    assert "the user's own error" in outcomes[1].error
    assert "Ranks [1] have died or raised an error" in outcomes[0].error


def test_an_exception_after_the_last_exchange_ends_all():
    """Nobody would notice without the closing meeting: rank 1 fails, rank 0 trains to its end."""
    outcomes = end_ranks(train, 2, [At(1, 2, fail)], 4, timeout=40)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(rank):
    outcomes = end_ranks(train, 3, [At(rank, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))], timeout=40)
    assert outcomes[rank].exitcode == -signal.SIGKILL
    assert all(outcome.exitcode != 0 for outcome in outcomes)


def test_a_frozen_rank_ends_the_others_within_the_timeout():
    started = time.monotonic()

    def thaw_later(pids):
        threading.Timer(10, os.kill, (pids[1], signal.SIGKILL)).start()

    outcomes = end_ranks(
        train, 2, [At(1, 9, lambda: os.kill(os.getpid(), signal.SIGSTOP))], timeout=40, interfere=thaw_later
    )
    assert outcomes[0].exitcode != 0
    assert "had waited" in outcomes[0].error
    assert time.monotonic() - started < 20


class Terminate(Callback):
    """Sends SIGTERM to one rank, when training starts or at one batch, and records how the run ends."""

    def __init__(self, rank, batch):
        self.rank, self.batch = rank, batch

    def on_train_start(self, trainer, module):
        if (trainer.global_rank, self.batch) == (self.rank, None):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_start(self, trainer, module, batch, index):
        if (trainer.global_rank, self.batch) == (self.rank, index):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, module, exception):
        self.end = type(exception).__name__, trainer.global_step


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("batch", "step"),
    # The exchange at t = 4, or 12, carries the request; the next one that is due has it on all ranks.
    [(None, 9), (9, 17)],
)
def test_sigterm_on_any_rank_ends_all_cleanly_at_the_same_step(rank, batch, step):
    def run():
        terminate = Terminate(rank, batch)
        module = Quadratic(steps=400, record=False)
        try:
            fitted(module, EASGDStrategy(tau=4, timeout=TIMEOUT), 2, callbacks=[terminate])
        except SystemExit as end:
            return terminate.end, end.code, module.x.item()
        return None

    first, second = run_ranks(run, 2, timeout=40)
    assert first[:2] == second[:2] == (("SIGTERMException", step), None)
    assert first[2] == second[2]  # the center


@pytest.mark.parametrize(
    "built_in",
    [False, pytest.param(True, marks=pytest.mark.skipif(NO_SAVE_ON_EXCEPTION, reason="not in this Lightning"))],
)
# OnExceptionCheckpoint makes fit look for an earlier one.
@pytest.mark.filterwarnings("ignore:.*(fit.ckpt_path=None|no last checkpoint)")
def test_an_error_checkpoint_is_written_without_the_others(tmp_path, built_in):
    saver = ModelCheckpoint(tmp_path, save_on_exception=True) if built_in else OnExceptionCheckpoint(tmp_path)

    def run():
        train([At(0, 9, fail), saver], enable_checkpointing=True)

    outcomes = end_ranks(run, 2, timeout=40)
    assert all(outcome.exitcode != 0 for outcome in outcomes)
    assert "the user's own error" in outcomes[0].error
    (file,) = tmp_path.glob("*.ckpt")
    state = torch.load(file, weights_only=True)["state_dict"]
    assert torch.isfinite(state["x"]).all()


class Uneven(Regression):
    """Rank r has more batches than rank r - 1, and may not know how many."""

    iterable = False

    def train_dataloader(self):
        data = torch.randn(8 * (5 + 4 * self.trainer.global_rank), 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(Stream(data) if self.iterable else data, batch_size=8)

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.parametrize("iterable", [False, True])
def test_uneven_epochs_end(iterable):
    def run(tau, validate):
        module = Uneven()
        module.iterable = iterable
        strategy = EASGDStrategy(tau=tau, timeout=timedelta(seconds=20))
        fitted(
            module,
            strategy,
            3,
            max_epochs=2,
            use_distributed_sampler=False,
            limit_val_batches=None if validate else 0,
        )
        return strategy.communication.exchanges, [p.detach().numpy().tobytes() for p in module.parameters()]

    cases = [(tau, number % 2 == iterable) for number, tau in enumerate([1, 2, 7, 100])]
    for case, first, *others in zip(cases, *run_ranks(lambda: [run(*each) for each in cases], 3), strict=True):
        assert all(other == first for other in others), case


def test_uneven_steps_with_a_validation_in_between_are_told():
    def run():
        strategy = EASGDStrategy(tau=3, timeout=TIMEOUT)
        fitted(Uneven(), strategy, 2, val_check_interval=4, use_distributed_sampler=False)

    outcomes = end_ranks(run, 2, timeout=40)
    assert all(outcome.exitcode != 0 for outcome in outcomes)
    assert any("limit_train_batches" in outcome.error for outcome in outcomes)
