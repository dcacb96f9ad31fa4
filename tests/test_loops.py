"""Lightning's loops, callbacks and optimizers around the strategy: each works, or is refused with a remedy."""

import time
from datetime import timedelta
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    Timer,
)
from ranks import end_ranks, run_ranks
from test_faults import Uneven
from test_strategy import arrays, equal
from torch.utils.data import DataLoader, IterableDataset
from toys import Regression, fitted

from lightning_easgd import EASGDStrategy

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=20)


def easgd(mode, **arguments):
    return EASGDStrategy(**({"mode": mode, "tau": 2, "timeout": TIMEOUT} | arguments))


both = pytest.mark.parametrize("mode", ["sync", "async"])


# Triggers inside an epoch, where the ranks have different numbers of batches


def ends_early_with_an_error(callback, mode, timeout=60):
    def run():
        strategy = easgd(mode, timeout=timedelta(seconds=timeout))
        fitted(
            Uneven(), strategy, 2, callbacks=[callback()], enable_checkpointing=True,
            use_distributed_sampler=False, limit_val_batches=0,
        )  # fmt: skip

    started = time.monotonic()
    outcomes = end_ranks(run, 2, timeout=25)
    assert all(outcome.exitcode != 0 for outcome in outcomes), outcomes
    assert any("limit_train_batches" in outcome.error for outcome in outcomes), outcomes
    assert time.monotonic() - started < 15


@both
def test_a_checkpoint_in_mid_epoch_that_one_rank_does_not_reach_is_an_error_at_once(mode, tmp_path):
    """Rank 0 has 5 batches, rank 1 has 9 and saves at 8."""
    ends_early_with_an_error(partial(ModelCheckpoint, tmp_path, every_n_train_steps=4, save_top_k=-1), mode)


READ_THE_TIME = {
    "max_time": lambda: Timer(timedelta(minutes=1)),
    "train_time_interval": lambda: ModelCheckpoint(train_time_interval=timedelta(minutes=1)),
}


@both
@pytest.mark.filterwarnings("ignore:.*asks all ranks for the time")
@pytest.mark.parametrize("name", READ_THE_TIME)
def test_a_clock_that_all_ranks_read_after_each_batch_does_not_hang(mode, name):
    ends_early_with_an_error(READ_THE_TIME[name], mode)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4)


@both
@pytest.mark.filterwarnings("ignore:.*asks all ranks for the time")
def test_max_time_ends_endless_data(mode):
    class Stream(Regression):
        def train_dataloader(self):
            return DataLoader(Endless(), batch_size=4)

    def run():
        module = fitted(
            Stream(), easgd(mode), 2, max_time=timedelta(seconds=1), max_epochs=-1, limit_val_batches=0,
        )  # fmt: skip
        return module.trainer.global_step > 5, arrays(module.parameters())

    first, second = run_ranks(run, 2, timeout=30)
    assert first[0]
    assert second[0]
    assert equal(first[1], second[1])


@both
@pytest.mark.parametrize("iterable", [False, True])
def test_max_steps_ends_all_ranks_at_the_same_step(mode, iterable):
    class Stream(Regression):
        def train_dataloader(self):
            return DataLoader(Endless() if iterable else torch.ones(160, 4), batch_size=4)

    def run():
        module = fitted(Stream(), easgd(mode), 2, max_steps=13, max_epochs=-1, limit_val_batches=0)
        return module.trainer.global_step, arrays(module.parameters())

    first, second = run_ranks(run, 2, timeout=30)
    assert first[0] == second[0] == 13
    assert equal(first[1], second[1])


@both
@pytest.mark.parametrize("interval", [3, 0.25, 1.0, 100])
def test_validation_intervals(mode, interval):
    """After every 3 batches; after a quarter of the epoch; at its end; after 100 batches, whatever the epochs."""

    class Counted(Regression):
        validations = 0

        def on_validation_start(self):
            if not self.trainer.sanity_checking:
                self.validations += 1
                shown.append(arrays(self.parameters()))

    shown = []

    def run():
        every = None if interval == 100 else 1
        module = fitted(
            Counted(batches=12), easgd(mode), 2, val_check_interval=interval, check_val_every_n_epoch=every,
            max_epochs=9 if every is None else 1,
        )  # fmt: skip
        return module.validations, shown

    first, second = run_ranks(run, 2)
    assert first[0] == second[0] == {3: 4, 0.25: 4, 1.0: 1, 100: 1}[interval]
    assert all(equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@both
def test_limits_and_the_sanity_check(mode):
    class Counted(Regression):
        def __init__(self):
            super().__init__()
            self.counts = {"sanity": 0, "val": 0}

        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            self.counts["sanity" if self.trainer.sanity_checking else "val"] += 1

    def run():
        module = fitted(
            Counted(), easgd(mode), 2, limit_train_batches=5, limit_val_batches=1, num_sanity_val_steps=2, max_epochs=2
        )
        return module.counts, module.trainer.global_step, module.trainer.strategy.communication.exchanges

    assert run_ranks(run, 2) == [({"sanity": 1, "val": 2}, 10, 4)] * 2
