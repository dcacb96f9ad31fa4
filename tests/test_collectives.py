"""Between two exchanges nothing communicates, and nobody waits."""

import pickle
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from toys import BROADCASTS, Quadratic, Regression, fitted

from lightning_easgd import EASGDStrategy
from lightning_easgd.strategies.process_groups import ProcessGroups
from lightning_easgd.transport.worker_layout import WorkerLayout

pytestmark = pytest.mark.timeout(120)
COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "barrier",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "gather",
    "gather_object",
    "scatter",
    "scatter_object_list",
    "all_to_all",
    "all_to_all_single",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
    "monitored_barrier",
)


class Count(Callback):
    """Counts every collective that starts in this process, by the batch in which it does."""

    def __init__(self):
        self.batch = None
        self.calls = []

    def on_train_start(self, *_):
        for name in COLLECTIVES:
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, self._counted(name, getattr(dist.distributed_c10d, name)))

    def _counted(self, name, function):
        def counted(*arguments, **keywords):
            if self.batch is not None:
                self.calls.append((self.batch, name))
            return function(*arguments, **keywords)

        return counted

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batch = index

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.batch = index + 1  # what comes before the next batch's first hook

    def on_train_epoch_end(self, *_):
        self.batch = None


@pytest.mark.parametrize("module", [Quadratic(steps=23, record=False), Regression(batches=23)])
@pytest.mark.parametrize(("backend", "each"), [(None, 0), ("gloo", 2)])
def test_collectives_of_a_fit_are_those_of_the_exchanges(module, backend, each):
    """Through a process group the header and the payload; workers that share memory have neither."""

    def train():
        count = Count()
        strategy = EASGDStrategy(tau=5, process_group_backend=backend)
        fitted(module, strategy, 2, callbacks=[count], limit_val_batches=0)
        return count.calls

    for calls in run_ranks(train, 2):
        assert calls == [(t, "all_reduce") for t in (5, 10, 15, 20) for _ in range(each)]


@pytest.mark.skipif(not BROADCASTS, reason="this Lightning (before 2.5.2) broadcasts nothing before a batch")
def test_the_count_sees_lightnings_broadcast():
    """The same count under DDP: a broadcast before every batch. It shows that the count can see one."""

    def train():
        count = Count()
        fitted(Regression(), "ddp", 2, callbacks=[count], limit_val_batches=0)
        return [name for _, name in count.calls]

    for names in run_ranks(train, 2):
        assert names.count("broadcast") >= 7


class Pause(Callback):
    def __init__(self, batch):
        self.batch = batch
        self.times = []

    def on_train_batch_start(self, trainer, module, batch, index):
        if (trainer.global_rank, index) == (1, self.batch):
            self.times.append(("pause", time.monotonic()))
            time.sleep(0.5)
            self.times.append(("resume", time.monotonic()))
        self.times.append((index, time.monotonic()))


def test_a_pause_delays_the_other_rank_only_at_the_next_exchange_that_needs_it():
    """Rank 1 pauses before its step 3; rank 0 makes its steps up to t = 10, where the exchange begun at 5 is due."""

    def train():
        pause = Pause(batch=3)
        fitted(Quadratic(steps=14, record=False), EASGDStrategy(tau=5), 2, callbacks=[pause])
        return dict(pause.times)

    free, paused = run_ranks(train, 2)
    assert free[10] < paused["resume"]  # batch 10 starts; its optimizer step then waits
    assert free[11] >= paused["resume"]


def test_a_copy_of_the_groups_in_another_process_is_of_no_run():
    def copied():
        dist.init_process_group("gloo")
        groups = ProcessGroups("S", timedelta(seconds=20))
        groups.enter(dist.get_rank(), dist.get_world_size())
        groups.open_inside("S(devices_per_worker=2)", "gloo", WorkerLayout(2, 2))
        copy = pickle.loads(pickle.dumps(groups))
        return groups.gather_inside(dist.get_rank()), copy.inside, copy.who_is_missing()

    assert run_ranks(copied, 2) == [([0, 1], None, "")] * 2
