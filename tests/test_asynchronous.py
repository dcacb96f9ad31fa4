"""Asynchronous EASGD and the DOWNPOUR family through the real Trainer."""

import csv
import os
import re
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from ranks import end_ranks, run_ranks
from reference import synchronous_trace
from test_elastic import ASYNCHRONOUS, ASYNCHRONOUS_MOMENTUM
from test_faults import Terminate, Uneven, fail
from test_strategy import Adversarial, Watched, arrays, equal
from toys import BROADCASTS, MINIMA, Quadratic, Regression, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.averagers.served import averaging as serving
from lightning_easgd.averagers.served.parameters import ServedParameters
from lightning_easgd.callbacks import ElasticMonitor, LocalEnergyMonitor, TimeSplit, WorkerEvaluation

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=6)
DOWNPOUR = [
    (1, 0.6, 1),
    (1, 0.24, 1),
    (1, -0.084, 0.24),
    (1, -0.3756, 0.24),
    (0.316, -0.63804, -0.3756),
    (0.3844, -0.874236, -0.3756),
]


class Rows(Quadratic):
    """Reads the center when all ranks have made their step."""

    def on_train_batch_end(self, *_):
        self.trainer.strategy.barrier()
        super().on_train_batch_end()
        self.trainer.strategy.barrier()


def test_golden_traces_in_round_robin_order():
    cases = [
        (EASGDStrategy(mode="async", order="round_robin", tau=2, alpha=0.2), ASYNCHRONOUS),
        (EASGDStrategy(mode="async", order="round_robin", tau=2, alpha=0.2, momentum=0.9), ASYNCHRONOUS_MOMENTUM),
        (DownpourStrategy(order="round_robin", tau=2), DOWNPOUR),
    ]

    def train():
        return [fitted(Rows(), strategy, 2).trace for strategy, _ in cases]

    for (strategy, rows), first, second in zip(cases, *map(np.array, run_ranks(train, 2)), strict=True):
        made = np.column_stack([first[:, 0], second[:, 0], second[:, 1]])
        assert made == pytest.approx(np.array(rows), abs=2e-6), strategy


class Gradients(Quadratic):
    """Records where each gradient is taken; by hand, it is taken before the strategy knows of the step."""

    def __init__(self, by_hand):
        super().__init__(steps=7, record=False)
        self.automatic_optimization = not by_hand
        self.points = []

    def training_step(self, batch, index):
        self.points.append(self.x.item())
        loss = super().training_step(batch, index)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


@pytest.mark.parametrize("average", [None, "polyak"])
def test_downpour_takes_gradients_at_the_new_point_also_in_manual_optimization(average):
    def train(by_hand):
        module = Gradients(by_hand)
        return fitted(module, DownpourStrategy(order="round_robin", tau=2, average=average), 2).points

    results = run_ranks(lambda: (train(False), train(True)), 2)
    assert all(automatic == by_hand for automatic, by_hand in results)
    assert results[0][0][3:5] == pytest.approx([1, 0.24])  # without a gradient: the center came in between


def test_one_worker_is_the_recursion():
    cases = [(tau, *rates) for tau in (1, 3) for rates in ((0.3, None), (0.3, 0.7), (0.0, None))]

    class Away(Quadratic):  # it starts at rank 0's minimum
        def training_step(self, batch, index):
            return 0.5 * (self.x - MINIMA[1]).square().sum()

    def train(tau, alpha, beta):
        return fitted(Away(), EASGDStrategy(mode="async", tau=tau, alpha=alpha, beta=beta), 1).trace

    (traces,) = run_ranks(lambda: [train(*each) for each in cases], 1)
    for (tau, alpha, beta), rows in zip(cases, traces, strict=True):
        expected = synchronous_trace(1, 6, tau, alpha, alpha if beta is None else beta, minima=MINIMA[1:])
        assert np.array(rows) == pytest.approx(expected, abs=1e-6), (tau, alpha, beta)


class Linear(Quadratic):
    """f_i = b_i · x with integer b and many elements, and pauses at random."""

    def __init__(self, steps):
        super().__init__(lr=1.0, steps=steps, record=False)
        self.x = torch.nn.Parameter(torch.zeros(1000))

    def training_step(self, batch, index):
        time.sleep(np.random.default_rng(self.global_rank * 1000 + index).exponential(0.001))
        return (self.x * (self.trainer.global_rank + 1)).sum()


@pytest.mark.filterwarnings("ignore:.*is unstable")
def test_conservation_under_concurrency():
    """Σ x_i + x̃ moves by the gradients alone: no update is lost or doubled."""

    def train(alpha):
        strategy = EASGDStrategy(mode="async", tau=1, alpha=alpha)
        module = Linear(steps=120)
        last = None

        class Last(Callback):
            def on_train_end(self, *_):
                nonlocal last
                with strategy.worker_weights():
                    last = module.x.detach().double().numpy().copy()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "open_center", partial(serving.open_center, chunk_elements=300))
            fitted(module, strategy, 3, callbacks=[Last()])
        return last, module.x.detach().double().numpy(), strategy.communication

    expected = np.full(1000, -120.0 * (1 + 2 + 3))
    exact, rounded = zip(*run_ranks(lambda: (train(1.0), train(0.3)), 3), strict=True)
    for results, compare in (
        (exact, np.testing.assert_array_equal), (rounded, partial(np.testing.assert_allclose, rtol=1e-5)),
    ):  # fmt: skip
        compare(sum(x for x, _, _ in results) + results[0][1], expected)
        assert all(statistics.exchanges == 119 for _, _, statistics in results)
        assert any(statistics.staleness > 0 for _, _, statistics in results)


class Slow(Callback):
    def __init__(self, rank, pause):
        self.rank, self.pause = rank, pause

    def on_train_start(self, trainer, module):
        trainer.strategy.barrier()
        self.started = time.monotonic()

    def on_train_batch_start(self, trainer, module, batch, index):
        time.sleep(self.pause if trainer.global_rank == self.rank else 0.003)

    def on_train_epoch_end(self, *_):
        self.seconds = time.monotonic() - self.started


def seconds(free):
    slow = Slow(1, 0.02)
    strategy = EASGDStrategy(mode="async", tau=4)
    if not free:
        strategy.setup = lambda trainer: (EASGDStrategy.setup(strategy, trainer), strategy._ranks.end())[0]
    fitted(Quadratic(steps=60, record=False), strategy, 2, callbacks=[slow])
    return slow.seconds


def test_a_slow_rank_does_not_slow_the_other():
    def share(free):  # the smaller of two: the machine may be busy with something else
        return min(fast / slow for fast, slow in (run_ranks(seconds, 2, free) for _ in range(2)))

    assert share(True) < 0.5
    if BROADCASTS:
        assert share(False) > 0.8


def test_validation_checkpoint_and_end_see_one_center(tmp_path):
    cases = {"easgd": EASGDStrategy(mode="async", tau=2), "downpour": DownpourStrategy(tau=2)}

    def train(name, strategy):
        saver = ModelCheckpoint(tmp_path / name, every_n_train_steps=3, save_top_k=-1)
        module = fitted(
            Watched(batches=12), strategy, 3, val_check_interval=5, callbacks=[saver], enable_checkpointing=True
        )
        return module.seen, arrays(module.parameters()), arrays(strategy.center.values())

    for name, *results in zip(cases, *run_ranks(lambda: [train(*each) for each in cases.items()], 3), strict=True):
        for seen, module, center in results:
            assert equal(module, center), name
            assert equal(module, results[0][1]), name
            assert all(equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True)), name
            for index in range(2):
                assert equal(seen["validation"][index], results[0][0]["validation"][index]), name
                assert equal(seen["validation"][index][: len(center)], seen["center"][index]), name
        assert len(list((tmp_path / name).glob("*.ckpt"))) == 4, name


class Alone(Quadratic):
    """One worker whose gradient is that of ``slope``."""

    def __init__(self, slope, steps):
        super().__init__(steps=steps, record=False)
        self.slope = slope

    def training_step(self, batch, index):
        return (self.slope(self.x.detach()) * self.x).sum()


def final_center(strategy, slope, steps):
    def train():
        return fitted(Alone(slope, steps), strategy, 1).x.item()

    (value,) = run_ranks(train, 1)
    return value


@pytest.mark.parametrize("average", ["polyak", 0.5])
def test_the_average_of_the_center_is_what_is_evaluated(average):
    centers = [1.0, 0.9, 0.8, 0.7]  # exchanges at t = 1, 2, 3
    z = centers[0]
    for t, center in enumerate(centers[1:], start=1):
        z += (1 / (t + 1) if average == "polyak" else average) * (center - z)
    value = final_center(DownpourStrategy(average=average), lambda x: torch.ones(1), steps=4)
    assert value == pytest.approx(z)


def test_momentum_downpour_is_nesterov_at_the_center():
    x, v = 1.0, 0.0
    for _ in range(4):  # the gradient of the last step is not sent any more
        u = -0.1 * (x - 3.0)
        v = 0.9 * v + u
        x = x + 0.9 * v + u
    assert final_center(DownpourStrategy(momentum=0.9), lambda x: x - 3.0, steps=5) == pytest.approx(x, abs=1e-6)


def test_several_optimizers_have_their_own_clocks():
    def train():
        strategy = EASGDStrategy(mode="async", tau=2)
        module = fitted(Adversarial(), strategy, 2)
        return strategy.communication.exchanges, sorted(strategy.center), arrays(module.parameters())

    first, second = run_ranks(train, 2)
    assert first[:2] == (3, ["a.bias", "a.weight", "b.bias", "b.weight"])
    assert equal(first[2], second[2])


@pytest.mark.parametrize("strategy", [EASGDStrategy, DownpourStrategy])
def test_uneven_epochs_end(strategy):
    cases = [(order, iterable) for order in ("free", "round_robin") for iterable in (False, True)]
    mode = {"mode": "async"} if strategy is EASGDStrategy else {}

    def run(order, iterable):
        module = Uneven()
        module.iterable = iterable
        strategy_ = strategy(tau=2, order=order, timeout=timedelta(seconds=20), **mode)
        fitted(module, strategy_, 3, max_epochs=2, use_distributed_sampler=False)
        return [p.detach().numpy().tobytes() for p in module.parameters()]

    for case, first, *others in zip(cases, *run_ranks(lambda: [run(*each) for each in cases], 3), strict=True):
        assert all(other == first for other in others), case


class At(Callback):
    def __init__(self, rank, batch, action):
        self.rank, self.batch, self.action = rank, batch, action

    def on_train_batch_start(self, trainer, module, batch, index):
        time.sleep(0.01)
        if (trainer.global_rank, index) == (self.rank, self.batch):
            self.action()


def train(callbacks, steps=1000, **arguments):
    strategy = EASGDStrategy(mode="async", tau=4, timeout=TIMEOUT, **arguments)
    ranks = int(os.environ["WORLD_SIZE"])
    module = fitted(Quadratic(steps=steps, record=False), strategy, ranks, callbacks=callbacks)
    return strategy.communication.exchanges, module.x.item()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("action", [fail, lambda: os.kill(os.getpid(), signal.SIGKILL)], ids=["raise", "kill"])
def test_a_lost_worker_ends_the_run_with_its_name(rank, action):
    started = time.monotonic()
    outcomes = end_ranks(train, 3, [At(rank, 9, action)], timeout=30)
    assert time.monotonic() - started < 12
    for other in {0, 1, 2} - {rank}:
        assert outcomes[other].exitcode != 0
        # The other survivor may have ended already, and rank 0 takes the store along that tells of a good end.
        named = re.search(r"workers \[([\d, ]+)\] of 3 have died or raised", outcomes[other].error)
        assert named is not None, outcomes[other].error
        assert str(rank) in named[1].split(", ")


def test_the_loss_of_the_rank_with_the_store_ends_the_run():
    outcomes = end_ranks(train, 3, [At(0, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))], timeout=30)
    assert all(outcome.exitcode != 0 for outcome in outcomes)


def test_the_others_go_on_if_asked():
    def run():
        kill = At(2, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
        return train([kill], steps=150, on_worker_loss="continue")

    outcomes = end_ranks(run, 3, timeout=30)
    assert outcomes[2].exitcode == -signal.SIGKILL
    assert [outcome.exitcode for outcome in outcomes[:2]] == [0, 0], outcomes
    (first, x), (second, y) = (outcome.value for outcome in outcomes[:2])
    assert first == second == 37
    assert x == y


def test_a_frozen_worker_does_not_stop_the_others_before_they_meet():
    class Count(Callback):
        def on_train_batch_end(self, trainer, *_):
            counts[trainer.global_rank] = trainer.global_step

        def on_exception(self, trainer, module, exception):
            print("steps", trainer.global_step, flush=True)

    counts = {}

    def run():
        try:
            train([At(1, 9, lambda: os.kill(os.getpid(), signal.SIGSTOP)), Count()], steps=120)
        except Exception as error:
            return counts, str(error)
        return None

    def thaw_later(pids):
        import threading

        threading.Timer(16, os.kill, (pids[1], signal.SIGKILL)).start()

    outcomes = end_ranks(run, 2, timeout=40, interfere=thaw_later)
    assert outcomes[0].value is not None, outcomes[0].error
    counts, error = outcomes[0].value
    assert counts == {0: 120}
    assert "workers [1]" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_any_rank_ends_all(rank):
    def run():
        terminate = Terminate(rank, 9)
        module = Quadratic(steps=4000, record=False)
        try:
            fitted(module, EASGDStrategy(mode="async", tau=4, timeout=TIMEOUT), 2, callbacks=[terminate])
        except SystemExit as end:
            return terminate.end[0], end.code, module.x.item()
        return None

    first, second = run_ranks(run, 2, timeout=40)
    assert first[:2] == second[:2] == ("SIGTERMException", None)
    assert first[2] == second[2]


def test_nothing_is_left_behind():
    def run():
        import threading

        def open_files():
            return {
                os.readlink(f"/proc/self/fd/{n}")
                for n in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{n}")
            }

        fitted(Quadratic(record=False), "easgd", 2)
        threads, files = {t.name for t in threading.enumerate()}, open_files()
        fitted(Quadratic(record=False), EASGDStrategy(mode="async", tau=1), 2)
        time.sleep(0.5)
        left = {t.name for t in threading.enumerate()} - threads, {f for f in open_files() - files if "memfd" in f}
        dist.barrier()
        return left

    assert run_ranks(run, 2) == [(set(), set())] * 2


@pytest.mark.parametrize(
    ("groups", "is_refused"),
    [
        ([[1, 0], [2]], False),
        ([[0], [1, 2]], True),
        ([[0, 2], [1]], True),
        ([[0, 1], [2], []], False),
        ([[0, 1], []], True),
    ],
)
def test_parameters_may_change_their_order_but_not_their_group(groups, is_refused):
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 0.2}])
    served = ServedParameters(optimizer)
    optimizer.param_groups = [{"params": [parameters[index] for index in group]} for group in groups]
    with pytest.raises(RuntimeError, match="or has them in other groups") if is_refused else nullcontext():
        served.check(optimizer)


def test_parameters_added_in_mid_training_are_refused():
    class Add(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 3:
                trainer.optimizers[0].add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})

    def run():
        fitted(Regression(), EASGDStrategy(mode="async", tau=2, timeout=TIMEOUT), 2, callbacks=[Add()])

    for outcome in end_ranks(run, 2):
        assert "the optimizer has got or lost parameters" in outcome.error


def test_sigterm_while_a_rank_waits_at_a_meeting():
    class Late(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_rank == 1:
                time.sleep(0.1)
                if index == 12:
                    os.kill(os.getpid(), signal.SIGTERM)

    def run():
        try:
            fitted(Regression(batches=30), EASGDStrategy(mode="async", timeout=TIMEOUT), 2, callbacks=[Late()])
        except SystemExit as end:
            return type(end).__name__, end.code
        return None

    assert run_ranks(run, 2, timeout=40) == [("SIGTERMException", None)] * 2


def test_fits_one_after_the_other():
    def run():
        centers = []
        for _ in range(8):
            module = Quadratic(record=False)
            fitted(module, EASGDStrategy(mode="async", tau=1, alpha=0.3, timeout=TIMEOUT), 2)
            centers.append(module.x.item())
        return centers

    first, second = run_ranks(run, 2, timeout=40)
    assert first == second


def test_reading_the_center_changes_nothing():
    class Reader(Quadratic):
        def training_step(self, batch, index):
            _ = dict(self.trainer.strategy.center)
            return super().training_step(batch, index)

        def on_before_backward(self, loss):
            _ = dict(self.trainer.strategy.center)

    def run(kind):
        return fitted(kind(), EASGDStrategy(mode="async", tau=1, alpha=0.3, beta=0.5), 1).trace

    ((read, unread),) = run_ranks(lambda: (run(Reader), run(Quadratic)), 1)
    assert read == unread


def test_the_center_that_is_read_is_not_that_of_the_last_validation():
    class Read(Regression):
        def on_train_batch_end(self, trainer, *_):
            centers.append(torch.cat([c.flatten() for c in self.trainer.strategy.center.values()]).clone())

    centers = []

    def run():
        fitted(Read(batches=12), EASGDStrategy(mode="async", tau=2), 1, val_check_interval=4)
        return [bool((a == b).all()) for a, b in pairwise(centers)]

    ((*same,),) = run_ranks(run, 1)
    assert same == [True, False] * 5 + [True]  # it moves at t = 2, 4, …


def test_uneven_epochs_in_round_robin_order_with_collectives_at_their_end():
    class Logged(Uneven):
        def training_step(self, batch, index):
            return super().training_step(batch, index)  # logs with sync_dist at the epoch's end

    def run():
        strategy = EASGDStrategy(mode="async", tau=2, order="round_robin", timeout=timedelta(seconds=20))
        fitted(Logged(), strategy, 2, max_epochs=2, use_distributed_sampler=False, limit_val_batches=0)

    run_ranks(run, 2, timeout=30)


def test_the_others_go_on_to_checkpoints_validations_and_records(tmp_path):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return self.trainer.lightning_module.train_dataloader()

        def val_dataloader(self):
            return Regression().val_dataloader()

        test_dataloader = val_dataloader

    def row_sums(module, batch):
        return batch.sum(), len(batch)

    def run():
        kill = At(2, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
        strategy = EASGDStrategy(mode="async", tau=4, timeout=TIMEOUT, on_worker_loss="continue")
        saver, scores, time_split = ModelCheckpoint(tmp_path), WorkerEvaluation(score=row_sums), TimeSplit()
        energy = LocalEnergyMonitor(tmp_path, sigmas=(0.0,), draws=1, batch_size=32, errors=row_sums)
        records = [ElasticMonitor(directory=tmp_path), scores, time_split, energy]
        module, trainer = Regression(batches=150), {"enable_checkpointing": True, "max_epochs": 2, "devices": 3}
        quiet_trainer(strategy=strategy, callbacks=[kill, saver, *records], **trainer).fit(module, datamodule=Data())
        ends = [p.detach().numpy().tobytes() for p in module.parameters()]
        return ends, scores.last_scores, set(energy.last_energies), len(time_split.seconds)

    outcomes = end_ranks(run, 3, timeout=40)
    assert [outcome.exitcode for outcome in outcomes] == [0, 0, -signal.SIGKILL], outcomes
    assert outcomes[0].value[0] == outcomes[1].value[0]
    assert list(tmp_path.glob("*.ckpt"))
    mean = Regression().val_dataloader().dataset.sum().item() / 32
    for rank in (0, 1):  # each knows of itself alone, and scores the center on all data
        _, scores, measured, count = outcomes[rank].value
        names = {"center", f"worker_{rank}"}
        assert scores == pytest.approx(dict.fromkeys(names, mean))
        assert (measured, count) == (names, 1)
    with (tmp_path / "communication.csv").open() as file:
        assert [(row["rank"], row["steps"]) for row in csv.DictReader(file)] == [("0", "300")]
    with (tmp_path / "local_energy.csv").open() as file:
        samples = {row["samples"] for row in csv.DictReader(file)}
    assert samples == {"256"}
