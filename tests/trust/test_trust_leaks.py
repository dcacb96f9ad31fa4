"""Kind: what a fit holds does not grow, and is given back when it ends, not when the garbage collector comes by."""

import copy
import gc
import os
import pickle
import threading
import time
import weakref
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
from ranks import run_ranks
from toys import Quadratic, fitted

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.tensors.group_numbers import GroupNumbers

pytestmark = pytest.mark.timeout(120)
STRATEGIES = {
    "async": lambda **k: EASGDStrategy(mode="async", **k),
    "round robin": lambda **k: EASGDStrategy(mode="async", order="round_robin", **k),
    "downpour": DownpourStrategy,
    "sync": EASGDStrategy,
    "sync over gloo": lambda **k: EASGDStrategy(process_group_backend="gloo", **k),
}


def held():
    """Descriptors and threads of this process."""
    names = [thread.name for thread in threading.enumerate()]
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            targets.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
    return sorted(targets), sorted(names), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_a_fit_leaves_no_descriptor_and_no_thread(make):
    def run():
        gc.disable()
        fits = []
        for _ in range(3):
            fitted(Quadratic(steps=6, record=False), make(tau=2, timeout=timedelta(seconds=30)), 2)
            torch.distributed.barrier()
            time.sleep(0.3)  # the store's server is told a moment later that the other rank has closed a connection
            fits.append(held())
        return fits

    for first, _, last in run_ranks(run, 2):
        assert last[0] == first[0]
        assert last[1] == first[1]
        assert not [name for name in first[1] if name.startswith("easgd")]
        assert last[2] <= first[2]


@pytest.mark.parametrize("arguments", [{"rho": 0.5}, {"momentum": 0.9}, {"mode": "async", "rho": 0.5}])
def test_learning_rates_that_are_new_tensors_at_every_step_are_not_kept(arguments):
    class Fresh(Quadratic):
        rates = ()

        def on_train_batch_start(self, batch, index):
            rate = torch.tensor(0.1 / (1 + index))
            self.trainer.optimizers[0].param_groups[0]["lr"] = rate
            self.rates = (*self.rates, weakref.ref(rate))

        def on_train_end(self):
            self.left = sum(rate() is not None for rate in self.rates)

    def train():
        strategy = EASGDStrategy(tau=1, timeout=timedelta(seconds=30), **arguments)
        return fitted(Fresh(steps=20, record=False), strategy, 2).left

    assert max(run_ranks(train, 2)) <= 2


def test_a_number_is_read_again_where_it_was_written_to_or_is_another_tensors():
    numbers, rate = GroupNumbers(), torch.tensor(0.5)
    assert [numbers.of(rate), numbers.of(rate.fill_(0.25)), numbers.of(0.125)] == [0.5, 0.25, 0.125]
    assert [numbers.of(torch.tensor(float(n))) for n in range(100)] == list(range(100))
    for other in (copy.deepcopy(numbers), pickle.loads(pickle.dumps(numbers))):
        assert other.of(rate) == 0.25
