"""Lightning's loops, callbacks and optimizers around the strategy: each works, or is refused with a remedy."""

import time
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    Timer,
)
from ranks import end_ranks, run_ranks
from test_faults import Uneven
from test_strategy import arrays, equal
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from toys import Regression, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy, LocalStrategy

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=20)


def easgd(mode, **arguments):
    return EASGDStrategy(**({"mode": mode, "tau": 2, "timeout": TIMEOUT} | arguments))


both = pytest.mark.parametrize("mode", ["sync", "async"])


# Triggers inside an epoch, where the ranks have different numbers of batches


def ends_early_with_an_error(callback, mode, module=Uneven, **trainer):
    def run():
        strategy = easgd(mode, timeout=timedelta(seconds=60))
        fitted(
            module(), strategy, 2, callbacks=[callback()], enable_checkpointing=True,
            use_distributed_sampler=False, limit_val_batches=0, **trainer,
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


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_best_checkpoint_is_rank_0s_where_each_rank_gives_it_a_name_of_its_own(tmp_path, recwarn):
    """After 5 and after 9 steps, as the default name has it; each worker goes on from its own state beside that one."""

    def fit_and(run):
        saver = ModelCheckpoint(tmp_path, monitor="val_loss")
        strategy = EASGDStrategy(tau=2, timeout=TIMEOUT, worker_state="sidecar")
        given = {"callbacks": [saver], "enable_checkpointing": True, "use_distributed_sampler": False}
        module = fitted(Uneven(), strategy, 2, **given)
        name = str(saver.best_model_path)
        run(module, saver)
        return name, arrays(module.parameters()), [str(each.message) for each in recwarn]

    def score(module, saver):
        best = module.trainer.validate(module, ckpt_path="best", verbose=False)[0]["val_loss"]
        assert best == pytest.approx(float(saver.best_model_score))

    def go_on(module, saver):
        strategy = EASGDStrategy(tau=2, timeout=TIMEOUT, worker_state="sidecar")
        trainer = quiet_trainer(strategy=strategy, devices=2, max_epochs=2, use_distributed_sampler=False)
        trainer.fit(module, ckpt_path=saver.best_model_path)

    for run in (score, go_on):
        (first, center, said), (second, other, _) = run_ranks(partial(fit_and, run), 2)
        assert first != second
        assert equal(center, other)
        assert not any("missing or torn" in each for each in said)


READ_THE_TIME = {
    "max_time": lambda: Timer(timedelta(minutes=1)),
    "train_time_interval": lambda: ModelCheckpoint(train_time_interval=timedelta(minutes=1)),
}


@both
@pytest.mark.filterwarnings("ignore:.*asks all ranks for the time")
@pytest.mark.parametrize("name", READ_THE_TIME)
def test_a_clock_that_all_ranks_read_after_each_batch_does_not_hang(mode, name):
    ends_early_with_an_error(READ_THE_TIME[name], mode)


@both
@pytest.mark.filterwarnings("ignore:.*asks all ranks for the time")
def test_nor_does_it_where_a_limit_is_all_that_is_known_of_the_data(mode):
    class Streamed(Uneven):
        iterable = True

    ends_early_with_an_error(READ_THE_TIME["max_time"], mode, Streamed, limit_train_batches=9)


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
def test_max_steps_ends_all_ranks_at_the_same_step(mode):
    class Stream(Regression):
        iterable = False

        def train_dataloader(self):
            return DataLoader(Endless() if self.iterable else torch.ones(160, 4), batch_size=4)

    class Iterable(Stream):
        iterable = True

    def run(kind):
        module = fitted(kind(), easgd(mode), 2, max_steps=13, max_epochs=-1, limit_val_batches=0)
        return module.trainer.global_step, arrays(module.parameters())

    kinds = (Stream, Iterable)
    for kind, first, second in zip(kinds, *run_ranks(lambda: [*map(run, kinds)], 2, timeout=30), strict=True):
        assert first[0] == second[0] == 13, kind
        assert equal(first[1], second[1]), kind


@both
def test_validation_intervals(mode):
    """After every 3 batches; after a quarter of the epoch; at its end; after 100 batches, whatever the epochs."""

    class Counted(Regression):
        validations = 0

        def on_validation_start(self):
            if not self.trainer.sanity_checking:
                self.validations += 1
                self.shown.append(arrays(self.parameters()))

    def run(interval):
        every = None if interval == 100 else 1
        module = Counted(batches=12)
        module.shown = []
        fitted(
            module, easgd(mode), 2, val_check_interval=interval, check_val_every_n_epoch=every,
            max_epochs=9 if every is None else 1,
        )  # fmt: skip
        return module.validations, module.shown

    expected = {3: 4, 0.25: 4, 1.0: 1, 100: 1}
    for interval, first, second in zip(expected, *run_ranks(lambda: [*map(run, expected)], 2), strict=True):
        assert first[0] == second[0] == expected[interval], interval
        assert all(equal(a, b) for a, b in zip(first[1], second[1], strict=True)), interval


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


# Optimizers, schedulers and what comes between backward and step


class Plain(Regression):
    """Without BatchNorm; ranks differ by their data."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class Quasi(Plain):
    """LBFGS calls its closure several times in each step."""

    closures = 0

    def training_step(self, batch, index):
        self.closures += 1
        return super().training_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")


class OwnClosure(Plain):
    """Manual optimization, with the closure handed to the optimizer."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class ByHand(OwnClosure):
    """Manual optimization with clipping by hand, and steps of its own choice."""

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if index % 3 == 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


CASES = {
    "plain": (Plain, {}),
    "accumulated": (Plain, {"accumulate_grad_batches": 3}),
    "clipped_by_norm": (Plain, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}),
    "clipped_by_value": (Plain, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "lbfgs": (Quasi, {}),
    "manual_closure": (OwnClosure, {}),
    "manual_accumulation_and_clipping": (ByHand, {}),
}
STEPS = {"accumulated": 4, "manual_accumulation_and_clipping": 4}


PULLS = {"without": {"alpha": 0}, "with": {}}


def fit_cases(strategy):
    """Final worker weights, exchanges and steps of each case, one after the other in the same processes."""
    results = {}
    for name, (module_class, options) in CASES.items():
        torch.manual_seed(5)
        module = module_class(batches=12)
        last = []
        module.on_train_batch_end = lambda *_, module=module, last=last: last.append(arrays(module.parameters()))
        trainer = fitted(module, strategy(), 2, limit_val_batches=0, **options).trainer
        communication = getattr(trainer.strategy, "communication", None)
        results[name] = (
            last[-1],
            communication and communication.exchanges,
            trainer.global_step,
            arrays(module.parameters()),
        )
    return results


def test_workers_are_those_of_local_training_without_a_pull_and_come_to_one_center_near_them_with_one():
    """α = 0 with exchanges at every second step: whatever comes between backward and step is as without us."""
    makes = {
        "local": LocalStrategy,
        **{(mode, pull): partial(easgd, mode, **pulls) for mode in ("sync", "async") for pull, pulls in PULLS.items()},
    }
    ranks = run_ranks(lambda: {key: fit_cases(make) for key, make in makes.items()}, 2, timeout=90)
    local = [results["local"] for results in ranks]
    assert not equal(local[0]["plain"][0], local[0]["clipped_by_norm"][0])
    assert not equal(local[0]["plain"][0], local[0]["clipped_by_value"][0])
    for mode in ("sync", "async"):
        for rank, results in enumerate(ranks):
            for name, (worker, exchanges, steps, _) in results[mode, "without"].items():
                assert equal(worker, local[rank][name][0]), (mode, name)
                assert steps == local[rank][name][2] == STEPS.get(name, 12), (mode, name)
                assert exchanges == (steps - 1) // 2, (mode, name)
        first, second = (results[mode, "with"] for results in ranks)
        for name, (worker, _, _, center) in first.items():
            assert equal(center, second[name][3]), (mode, name)
            assert not equal(worker, local[0][name][0]), (mode, name)
            if mode == "async":
                continue  # the center moves between the workers' pulls, so that one exchange may part them
            distances = [
                sum(np.square(a - b).sum() for a, b in zip(one[name][0], other[name][0], strict=True))
                for one, other in ((first, second), local)
            ]
            assert distances[0] < distances[1], name  # pulled together


class Scheduled(Plain):
    def __init__(self, scheduler, **config):
        super().__init__(batches=8)
        self.scheduler, self.config, self.rates = scheduler, config, []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), **self.config}}

    def on_train_batch_start(self, *_):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])


@both
def test_schedulers_per_step_and_per_epoch(mode):
    """α = lr ρ follows the schedule of each step."""

    def run(interval, frequency):
        scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        module = Scheduled(scheduler, interval=interval, frequency=frequency)
        fitted(module, easgd(mode, rho=1.0), 2, max_epochs=2, limit_val_batches=0)
        return module.rates, arrays(module.parameters())

    decays = {
        ("step", 1): range(16),
        ("step", 3): [t // 8 * 2 + t % 8 // 3 for t in range(16)],
        ("epoch", 1): [t // 8 for t in range(16)],
    }
    for case, first, second in zip(decays, *run_ranks(lambda: [run(*each) for each in decays], 2), strict=True):
        assert first[0] == second[0] == pytest.approx([0.1 * 0.5**n for n in decays[case]]), case
        assert equal(first[1], second[1]), case


@both
def test_plateau_and_early_stopping_decide_the_same_on_all_ranks(mode):
    class Worse(Scheduled):
        """Validated on different data, so that only the reduced value is the same; it never gets better."""

        def validation_step(self, batch, index):
            own.append(float(self.global_rank + self.current_epoch))
            self.log("val_loss", own[-1], sync_dist=True)

    class Seen(torch.optim.lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics, epoch=None):
            seen.append(float(metrics))
            super().step(metrics, epoch)

    own, seen = [], []

    def run():
        module = Worse(partial(Seen, patience=0, factor=0.5), monitor="val_loss")
        stop = EarlyStopping("val_loss", patience=3)
        trainer = fitted(module, easgd(mode), 2, max_epochs=9, num_sanity_val_steps=0, callbacks=[stop]).trainer
        return seen, module.rates[::8], trainer.current_epoch, own

    first, second = run_ranks(run, 2)
    assert first[:3] == second[:3] == ([0.5, 1.5, 2.5, 3.5], [0.1, 0.1, 0.05, 0.025], 4)
    assert first[3] != second[3]


def test_the_learning_rate_finder_with_a_served_center(tmp_path):
    class Found(Plain):
        lr = 0.05

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def on_train_start(self):
            self.started = arrays(self.parameters())

    def run():
        torch.manual_seed(3)
        module = Found()
        initial = arrays(module.parameters())
        finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
        fitted(module, easgd("async"), 2, callbacks=[finder], default_root_dir=tmp_path)
        return equal(initial, module.started), arrays(module.parameters())

    first, second = run_ranks(run, 2)
    assert first[0]
    assert equal(first[1], second[1])


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


@pytest.mark.parametrize("strategy", [EASGDStrategy(mode="async"), DownpourStrategy()])
def test_finetuning_with_a_served_center_is_refused_before_training(strategy):
    class Never(Plain):
        def training_step(self, batch, index):
            pytest.fail("training has started")

    for outcome in end_ranks(lambda: fitted(Never(), strategy, 2, callbacks=[Unfreeze()]), 2, timeout=30):
        assert "with Unfreeze: a finetuning callback gives the optimizer parameters" in outcome.error
        assert "mode='sync'" in outcome.error


class FrozenFirst(Callback):
    """The remedy: all parameters are in the optimizer from the start."""

    def on_train_epoch_start(self, trainer, module):
        module.net[0].requires_grad_(trainer.current_epoch > 0)

    def on_train_epoch_end(self, trainer, module):
        module.ends.append(arrays(module.net[0].parameters()))


@both
def test_parameters_that_are_frozen_first_and_trained_later(mode):
    def run():
        module = Plain()
        module.ends = [arrays(module.net[0].parameters())]
        fitted(module, easgd(mode), 2, max_epochs=2, callbacks=[FrozenFirst()])
        start, frozen, trained = module.ends
        return equal(start, frozen), equal(frozen, trained), arrays(module.parameters())

    first, second = run_ranks(run, 2)
    assert first[:2] == (True, False)
    assert equal(first[2], second[2])


def test_nothing_is_compiled_again_because_of_us():
    """As many graphs as without any communication, across exchanges and validations at the center."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    def run(whole, ranks):
        graphs = []
        for strategy in (LocalStrategy(), easgd("sync"), easgd("async")):
            torch._dynamo.reset()
            counters.clear()
            module = Regression(batches=8)
            if whole:
                compiled = torch.compile(module, backend="eager")
            else:
                compiled = module
                module.net = torch.compile(module.net, backend="aot_eager")
            fitted(compiled, strategy, ranks, val_check_interval=4)
            assert not counters["recompiles"]
            graphs.append(counters["stats"]["unique_graphs"])
        return graphs

    # Steps take longer to compile than a network: one worker exchanges with the center as two do.
    for whole, ranks in ((True, 1), (False, 2)):
        for local, synchronous, asynchronous in run_ranks(run, ranks, whole, ranks):
            assert local == synchronous == asynchronous >= 2
