"""One bad worker: what is not finite reaches nobody, and centers that differ end the run."""

import math
import warnings
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from ranks import end_ranks, run_ranks
from test_faults import NO_SAVE_ON_EXCEPTION
from torch import nn
from torch.utils.data import DataLoader
from toys import quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=20)
SYNC = {
    "shared": {},
    "gloo": {"process_group_backend": "gloo"},
    "int8": {"wire_dtype": "int8"},
    "bfloat16": {"wire_dtype": "bfloat16"},
    "rho": {"rho": 2.0},
    "eamsgd": {"momentum": 0.9},
    "cpu": {"center_device": "cpu"},
}
ASYNC = {
    "async": {"mode": "async"},
    "round_robin": {"mode": "async", "order": "round_robin"},
    "asymmetric": {"mode": "async", "alpha": 0.3, "beta": 0.7},
}
ALL = SYNC | ASYNC
MADE = []
"""The modules of this process: what they hold after an error is looked at."""


def strategy_of(name, **more):
    if name == "downpour":
        return DownpourStrategy(tau=2, timeout=TIMEOUT, **more)
    return EASGDStrategy(tau=2, timeout=TIMEOUT, **ALL[name], **more)


class Net(L.LightningModule):
    """Rank 1 meets a batch of infinities or NaNs once; BatchNorm's statistics and the optimizer's state take it in."""

    def __init__(self, bad=4, rank=1, value=float("nan"), optimizer=torch.optim.SGD, epochs=1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.bad, self.rank, self.value, self.make = bad, rank, value, optimizer
        self.centers, self.worker = [], None
        MADE.append(self)

    def training_step(self, batch, index):
        if (self.trainer.global_rank, index, self.current_epoch) == (self.rank, self.bad, 0):
            batch = batch + self.value
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def on_train_batch_start(self, batch, index):
        self.centers.append({name: value.clone() for name, value in self.trainer.strategy.known_center.items()})

    def on_train_end(self):
        with self.trainer.strategy.worker_weights():
            self.worker = {name: value.clone() for name, value in self.state_dict().items()}

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=0.01)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.trainer.global_rank)
        return DataLoader(torch.randn(12 * 8, 4, generator=generator), batch_size=8)


def is_finite(state):
    return all(value.isfinite().all() for value in state.values())


def fit(name, saving=None, ranks=2, more=None, kind=Net, **arguments):
    module = kind(**arguments)
    saver = [ModelCheckpoint(saving, save_on_exception=True, every_n_epochs=100)] if saving else []
    trainer = quiet_trainer(
        strategy=strategy_of(name, **(more or {})), devices=ranks, use_distributed_sampler=False,
        callbacks=saver, enable_checkpointing=bool(saver), limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module)
    return module, [str(each.message) for each in caught if "on_nonfinite" in str(each.message)]


@pytest.mark.skipif(NO_SAVE_ON_EXCEPTION, reason="save_on_exception is not in this Lightning")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("shared", "gloo", "int8", "bfloat16", "async") for value in (math.nan, math.inf)),
        ("rho", math.inf), ("eamsgd", math.nan), ("cpu", math.inf), ("round_robin", math.nan), ("downpour", math.inf),
    ],
)  # fmt: skip
def test_a_worker_that_is_not_finite_ends_the_run_and_is_named(name, value, tmp_path):
    def train():
        try:
            fit(name, tmp_path, value=value)
        except BaseException:
            module = MADE[-1]
            assert is_finite(module.centers[-1])
            assert is_finite(dict(module.named_parameters())), "the module is left at the last finite center"
            raise

    outcomes = end_ranks(train, 2, timeout=60)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exitcode != 0
        assert "on_nonfinite" in outcome.error
        assert "rank 1" in outcome.error
        assert "step 6" in outcome.error, rank  # met at the batch of index 4, known at the exchange at t = 6
        assert ("DownpourStrategy" if name == "downpour" else "EASGDStrategy") in outcome.error
    files = list(tmp_path.rglob("*.ckpt"))
    assert len(files) == 1
    state = torch.load(files[0], weights_only=True)["state_dict"]
    assert is_finite({name: value for name, value in state.items() if "running" not in name})


def test_the_center_is_that_of_the_exchange_before():
    """Bit for bit: what the others contributed to the exchange is not in it either."""

    class Waiting(Net):
        def on_train_batch_start(self, batch, index):
            if index == 6:  # with the exchange at t = 4, which may be under way
                self.centers = {6: {name: value.clone() for name, value in self.trainer.strategy.center.items()}}

    def train(bad):
        try:
            module, _ = fit("shared", bad=bad, ranks=3, kind=Waiting)
        except RuntimeError:
            module = MADE[-1]
            return {name: value.clone() for name, value in module.named_parameters()}
        return module.centers[6]

    for whole, broken in run_ranks(lambda: (train(100), train(4)), 3):
        assert all(broken[name].equal(whole[name]) for name in whole)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_reset_lets_it_start_again_at_the_center(optimizer):
    names = [*ALL, "downpour"]
    if optimizer is torch.optim.Adam:
        names.remove("eamsgd")  # it is SGD

    def train(name):
        module, told = fit(name, ranks=3, more={"on_nonfinite": "reset"}, optimizer=optimizer)
        return module.centers, module.worker, module.state_dict(), told

    for name, *results in zip(names, *run_ranks(lambda: [*map(train, names)], 3), strict=True):
        for rank, (centers, worker, final, told) in enumerate(results):
            assert all(is_finite(center) for center in centers), name
            assert is_finite(final), name
            assert all(value.equal(results[0][2][key]) for key, value in final.items()), name
            assert is_finite(worker), f"{name}: a worker's weights or statistics"
            assert len(told) == (1 if rank == 1 else 0), name
        assert "rank 1" in results[1][3][0], name
        assert "step 6" in results[1][3][0], name


def test_reset_counts_the_bad_difference_as_zero():
    """Three workers on linear losses: the center's move at the exchange is that of the two good ones."""

    class Linear(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1))
            self.trace = []

        def training_step(self, batch, index):
            rank = self.trainer.global_rank
            slope = float("inf") if (rank, index) == (2, 3) else rank + 1.0
            return slope * self.x.sum()

        def on_train_batch_end(self, *_):
            self.trace.append((self.x.item(), self.trainer.strategy.center["x"].item()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

        def train_dataloader(self):
            return DataLoader(torch.zeros(6, 1), batch_size=1)

    def train():
        module = Linear()
        strategy = EASGDStrategy(tau=4, alpha=0.25, on_nonfinite="reset", timeout=TIMEOUT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(strategy=strategy, devices=3, use_distributed_sampler=False).fit(module)
        return module.trace

    traces = run_ranks(train, 3)
    # At t = 4 the workers are at -4, -8, -inf and the center at 0: it moves by 0.25 · (-4 - 8 + 0) = -3.
    assert [trace[4][1] for trace in traces] == [-3.0] * 3
    # Worker 2 begins at the center of before, 0, and makes its gradient step there.
    assert [trace[4][0] for trace in traces] == [-4 - 1 + 1, -8 - 2 + 2, -3]


def test_a_large_but_finite_difference_is_no_error():
    """Its square is not a float32 any more."""

    def train():
        module = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=1, timeout=TIMEOUT))
        fabric.launch()
        module, optimizer = fabric.setup(module, optimizer)
        for _ in range(3):
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, 1e30)
            optimizer.step()
        fabric.strategy.finalize()
        return is_finite(dict(module.named_parameters()))

    assert run_ranks(train, 2) == [True, True]


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("policy", ["fail", "reset"])
def test_a_bad_worker_in_a_fit_without_exchanges(mode, policy):
    """The mean of the workers' weights is as careful as an exchange."""

    def train():
        module = Net(bad=1)
        strategy = EASGDStrategy(tau=100, mode=mode, on_nonfinite=policy, timeout=TIMEOUT)
        trainer = quiet_trainer(strategy=strategy, devices=2, use_distributed_sampler=False, limit_train_batches=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module)
        return is_finite(module.state_dict())

    outcomes = end_ranks(train, 2, timeout=60)
    if policy == "reset":
        assert [outcome.value for outcome in outcomes] == [True, True]
    else:
        assert all(outcome.exitcode and "rank 1" in outcome.error for outcome in outcomes)


def test_a_bad_worker_that_joins_an_exchange_at_the_end_of_its_data():
    class Uneven(Net):
        def train_dataloader(self):
            return DataLoader(torch.randn(8 * (4 if self.trainer.global_rank else 9), 4), batch_size=8)

    def train(policy):
        module = Uneven(bad=3)
        strategy = EASGDStrategy(tau=2, on_nonfinite=policy, timeout=TIMEOUT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(strategy=strategy, devices=2, use_distributed_sampler=False).fit(module)
        return module.state_dict()

    first, second = run_ranks(train, 2, "reset")
    assert is_finite(first)
    assert all(first[name].equal(second[name]) for name in first)
    for outcome in end_ranks(train, 2, "fail", timeout=60):
        assert outcome.exitcode
        assert "rank 1" in outcome.error


def test_under_fabric():
    def train(policy):
        torch.manual_seed(0)
        strategy = FabricEASGDStrategy(tau=2, on_nonfinite=policy, timeout=TIMEOUT)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        module = nn.Linear(4, 1)
        module, optimizer = fabric.setup(module, torch.optim.Adam(module.parameters()))
        for step in range(6):
            optimizer.zero_grad()
            fabric.backward(
                module(torch.ones(1, 4) * (float("nan") if (fabric.global_rank, step) == (1, 2) else 1)).sum()
            )
            optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fabric.strategy.finalize()
        return is_finite(module.state_dict())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_ranks(train, 2, "reset") == [True, True]
    for outcome in end_ranks(train, 2, "fail", timeout=60):
        assert outcome.exitcode
        assert "rank 1" in outcome.error


@pytest.mark.parametrize("make", [EASGDStrategy, DownpourStrategy, FabricEASGDStrategy])
def test_an_unknown_policy_is_refused(make):
    with pytest.raises(ValueError, match=rf"{make.__name__}\(on_nonfinite='ignore'\).*'fail' or 'reset'"):
        make(on_nonfinite="ignore")


class ByHand(Net):
    """The gradient is there before the step begins."""

    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()

    def on_train_batch_end(self, *_):
        self.finite = [*getattr(self, "finite", []), is_finite(dict(self.named_parameters()))]


class Accumulated(Net):
    def on_train_batch_end(self, *_):
        self.finite = [*getattr(self, "finite", []), is_finite(dict(self.named_parameters()))]


@pytest.mark.parametrize(("kind", "options"), [(ByHand, {}), (Accumulated, {"accumulate_grad_batches": 2})])
def test_a_gradient_of_before_the_reset_is_not_applied_after_it(kind, options):
    names = ["shared", "int8", "async", "round_robin", "downpour"]

    def train(name):
        module = kind(bad=3)
        strategy = strategy_of(name, on_nonfinite="reset")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(strategy=strategy, devices=2, use_distributed_sampler=False, **options).fit(module)
        return module.finite

    for name, good, bad in zip(names, *run_ranks(lambda: [*map(train, names)], 2), strict=True):
        assert all(good), name
        if (kind, name) != (ByHand, "downpour"):  # its exchange follows the step at once
            assert not all(bad), f"{name}: the batch did no harm, the test shows nothing"
        assert all(bad[8:]), name


def test_a_gradient_of_before_the_reset_may_be_a_gradient_scalers():
    """Kind: what is dropped is still asked for: a scaler takes an optimizer without gradients for an error."""

    class Poisoned(ByHand):
        def training_step(self, batch, index):
            if (self.trainer.global_rank, index) == (1, 3):  # a batch alone would be no step
                self.net[0].weight.data.fill_(float("nan"))
            super().training_step(batch, index)

    def train():
        module = Poisoned(bad=100)
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
        strategy = strategy_of("shared", on_nonfinite="reset")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(strategy=strategy, devices=2, use_distributed_sampler=False, plugins=[plugin]).fit(module)
        return is_finite(module.state_dict())

    assert run_ranks(train, 2, timeout=60) == [True, True]


def test_a_teacher_that_has_taken_it_in_is_put_right():
    class Taught(Net):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.teacher = nn.Linear(4, 8).requires_grad_(False)

        def training_step(self, batch, index):
            return (
                super().training_step(batch, index) + 0.1 * (self.net[0](batch) - self.teacher(batch)).square().mean()
            )

        def on_train_batch_end(self, *_):
            with torch.no_grad():
                for target, source in zip(self.teacher.parameters(), self.net[0].parameters(), strict=True):
                    target.lerp_(source, 0.1)

    def train():
        module, told = fit("shared", kind=Taught, more={"on_nonfinite": "reset"}, bad=2)
        return is_finite(module.worker), len(told)

    assert run_ranks(train, 2) == [(True, 0), (True, 1)]


# Centers that differ


class Scribble(Callback):
    """Writes into one rank's copy of the center, once."""

    def __init__(self, batch, amount):
        self.batch, self.amount = batch, amount

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (trainer.global_rank, index) == (1, self.batch):
            next(iter(trainer.strategy.center.values())).view(-1)[0].add_(self.amount)


@pytest.mark.parametrize(
    ("name", "amount", "validate"),
    [("shared", 1.0, True), ("shared", 1e-6, False), ("gloo", 1.0, False), ("gloo", 1e-6, True),
     ("int8", 1.0, True), ("int8", 1e-6, False)],
)  # fmt: skip
def test_centers_that_differ_end_the_run(name, amount, validate):
    class Validated(Net):
        def validation_step(self, batch, index):
            pass

        def val_dataloader(self):
            return DataLoader(torch.zeros(2, 4), batch_size=1)

    def train():
        module = (Validated if validate else Net)(bad=100)
        trainer = quiet_trainer(
            strategy=strategy_of(name), devices=2, use_distributed_sampler=False, callbacks=[Scribble(5, amount)],
            val_check_interval=6 if validate else 1.0, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module)

    for outcome in end_ranks(train, 2, timeout=60):
        assert outcome.exitcode
        assert "copies of the center differ" in outcome.error
