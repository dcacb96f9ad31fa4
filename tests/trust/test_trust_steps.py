"""Steps that nobody counts: every step of a worker's optimizer takes part, however it is made, and once."""

import contextlib
import gc
import weakref
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins.precision import MixedPrecision
from ranks import end_ranks, run_ranks
from torch import nn
from torch.utils.data import DataLoader
from toys import quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.averagers import ExchangeLine, SynchronousAverager, all_reduced_sums
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.method.position import LookAheadPosition, make_nesterov
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.transport.channel import LoneChannel

pytestmark = pytest.mark.timeout(120)
NO_OPTIMIZER = pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
TIMEOUT = timedelta(seconds=30)
STRATEGIES = {
    "sync": lambda: EASGDStrategy(tau=2, timeout=TIMEOUT),
    "eamsgd": lambda: EASGDStrategy(tau=2, momentum=0.9, timeout=TIMEOUT),
    "round_robin": lambda: EASGDStrategy(tau=2, mode="async", order="round_robin", timeout=TIMEOUT),
    "downpour": lambda: DownpourStrategy(tau=2, order="round_robin", timeout=TIMEOUT),
}


class Net(L.LightningModule):
    """Two layers on data of each rank's own; writes down its weights after each batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.trace = []

    def loss(self, batch):
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def training_step(self, batch, index):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        data = torch.randn(56, 4, generator=torch.Generator().manual_seed(self.trainer.global_rank))
        return DataLoader(data, batch_size=8)

    def on_train_batch_end(self, *_):
        self.trace.append(nn.utils.parameters_to_vector(self.parameters()).detach().numpy().tobytes())


class Wrapped(Net):
    automatic_optimization = False
    wrapped = True

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Bare(Wrapped):
    wrapped = False


class WrappedWithClosure(Wrapped):
    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class BareWithClosure(WrappedWithClosure):
    wrapped = False


class Overridden(Net):
    """What many projects do to schedule the learning rate."""

    def optimizer_step(self, epoch, batch_index, optimizer, closure):
        optimizer.optimizer.step(closure=closure)


class ClosureFirst(Net):
    def optimizer_step(self, epoch, batch_index, optimizer, closure):
        closure()
        optimizer.optimizer.step()


class Nested(torch.optim.SGD):
    """torch's hooks are called once more for the parent's step."""

    def step(self, closure=None):
        return super().step(closure)


class NestedBare(Bare):
    def configure_optimizers(self):
        torch.optim.SGD(self.parameters(), lr=0.05)  # so that the parent's step has torch's hooks, too
        return Nested(self.parameters(), lr=0.05)


class NestedWrapped(NestedBare):
    wrapped = True


def fitted(kind, strategy):
    module = kind()
    trainer = quiet_trainer(strategy=STRATEGIES[strategy](), devices=2, use_distributed_sampler=False)
    trainer.fit(module)
    return module.trace, trainer.strategy.communication.exchanges, module.state_dict()["net.0.weight"].tolist()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bare_step_is_a_step_like_any_other(strategy):
    cases = {
        Wrapped: [Bare, NestedBare, NestedWrapped],
        WrappedWithClosure: [BareWithClosure],
        # DOWNPOUR takes the center over a hook earlier than a gradient that is taken before the step.
        Net: [Overridden] if strategy == "downpour" else [Overridden, ClosureFirst],
    }
    kinds = [kind for wrapped, all_bare in cases.items() for kind in (wrapped, *all_bare)]
    first, second = (
        dict(zip(kinds, results, strict=True))
        for results in run_ranks(lambda: [fitted(kind, strategy) for kind in kinds], 2)
    )
    for wrapped, all_bare in cases.items():
        assert first[wrapped][0] != second[wrapped][0], f"the workers do not differ: {wrapped} shows nothing"
        assert first[wrapped][1] == second[wrapped][1] == 3, wrapped
        for bare in all_bare:
            assert first[bare] == first[wrapped], bare
            assert second[bare] == second[wrapped], bare


class Pair(Net):
    """Two optimizers, of which one is stepped bare."""

    automatic_optimization = False
    wrapped = (True, True)

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        loss = self.loss(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer, wrapped in zip(optimizers, self.wrapped, strict=True):
            (optimizer if wrapped else optimizer.optimizer).step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[layer].parameters(), lr=0.05) for layer in (0, 2)]


class HalfBare(Pair):
    wrapped = (True, False)


@pytest.mark.parametrize("strategy", ["sync", "round_robin"])
def test_of_two_optimizers_one_is_stepped_bare(strategy):
    for half_bare, wrapped in run_ranks(lambda: (fitted(HalfBare, strategy), fitted(Pair, strategy)), 2):
        assert half_bare == wrapped


def test_bare_steps_under_fabric():
    def train(bare):
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2, timeout=TIMEOUT))
        fabric.launch()
        model, optimizer = fabric.setup(net := nn.Linear(4, 1), torch.optim.SGD(net.parameters(), lr=0.05))
        for batch in torch.randn(7, 8, 4, generator=torch.Generator().manual_seed(fabric.global_rank)):
            optimizer.zero_grad()
            fabric.backward((model(batch) - 1).square().mean())
            (optimizer.optimizer if bare else optimizer).step()
        fabric.strategy.finalize()
        return fabric.strategy.communication.exchanges, model.state_dict()["weight"].tolist()

    for one, other in run_ranks(lambda: (train(True), train(False)), 2):
        assert one == other
        assert one[0] == 3


class Unknown(Net):
    """An optimizer of the module's own, which configure_optimizers does not return."""

    automatic_optimization = False
    clear = False

    def on_fit_start(self):
        self.own = torch.optim.SGD(self.net.parameters(), lr=0.05)

    def training_step(self, batch, index):
        self.own.zero_grad()
        self.loss(batch).backward()
        self.own.step()
        if self.clear:
            self.own.zero_grad()

    def configure_optimizers(self):
        return None


class UnknownAndCleared(Unknown):
    clear = True


class UnknownBeside(Unknown):
    """One layer has an optimizer that the strategy knows."""

    def on_fit_start(self):
        self.own = torch.optim.Adam(self.net[2].parameters(), lr=0.05)

    def training_step(self, batch, index):
        super().training_step(batch, index)
        self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), lr=0.05)


class ByHand(Unknown):
    def training_step(self, batch, index):
        self.zero_grad()
        self.loss(batch).backward()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.sub_(parameter.grad, alpha=0.05)


@NO_OPTIMIZER
@pytest.mark.parametrize(
    ("kind", "names", "strategy"),
    [
        (Unknown, "net.0.weight", "sync"),
        (UnknownAndCleared, "net.0.weight", "sync"),
        (UnknownBeside, "net.2.weight", "sync"),
        (ByHand, "net.0.weight", "sync"),
        (Unknown, "net.0.weight", "round_robin"),
        (ByHand, "net.0.weight", "round_robin"),
        (UnknownAndCleared, "net.0.weight", "downpour"),
        (UnknownBeside, "net.2.weight", "downpour"),
    ],
)
def test_parameters_that_an_unknown_optimizer_trains_are_named(kind, names, strategy):
    outcomes = end_ranks(fitted, 2, kind, strategy, timeout=60)
    assert all(outcome.exitcode for outcome in outcomes)
    for outcome in outcomes:
        assert names in outcome.error
        assert "configure_optimizers" in outcome.error
        assert ("DownpourStrategy" if strategy == "downpour" else "EASGDStrategy") in outcome.error


class Unused(Net):
    """Gradients that nobody applies are nobody's training."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), lr=0.05)


@pytest.mark.parametrize("strategy", ["sync", "round_robin"])
def test_gradients_that_nobody_applies_are_no_error(strategy):
    first, second = run_ranks(fitted, 2, Unused, strategy)
    assert first[2] == second[2] == Unused().state_dict()["net.0.weight"].tolist()


class Nothing(Net):
    """There is nothing to train."""

    def training_step(self, batch, index):
        return None

    def configure_optimizers(self):
        return None


@NO_OPTIMIZER
@pytest.mark.parametrize("strategy", ["sync", "round_robin"])
def test_a_module_without_optimizers_runs(strategy):
    class Quiet(Nothing):
        automatic_optimization = False

    assert run_ranks(fitted, 2, Quiet, strategy)[0][1] == 0


# A step that ends with an exception


def linear(rank):
    """The gradient of rank i's linear loss."""
    return float(rank + 1)


@pytest.mark.parametrize("strategy", ["sync", "round_robin", "async"])
def test_a_step_that_is_tried_again_exchanges_once(strategy):
    """Σ x_i + x̃ changes by the gradient steps alone, whatever the closures raise."""

    class Linear(L.LightningModule):
        automatic_optimization = False

        def __init__(self, failing):
            super().__init__()
            self.x = nn.Parameter(torch.ones(1))
            self.failures = list(failing)

        def training_step(self, batch, index):
            optimizer = self.optimizers()

            def closure():
                if index in self.failures:
                    self.failures.remove(index)
                    raise ValueError("the batch is corrupt")
                self.x.grad = torch.full((1,), linear(self.trainer.global_rank))

            for _ in range(4):
                with contextlib.suppress(ValueError):
                    optimizer.step(closure=closure)
                    break

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return DataLoader(torch.zeros(8, 1), batch_size=1)

        def on_train_end(self):
            with self.trainer.strategy.worker_weights():
                self.final = self.x.item()

    def train(failing):
        module = Linear(failing)
        mode = "sync" if strategy == "sync" else "async"
        order = "round_robin" if strategy == "round_robin" else "free"
        easgd = EASGDStrategy(tau=2, alpha=0.25, mode=mode, order=order, timeout=TIMEOUT)
        quiet_trainer(strategy=easgd, devices=2, use_distributed_sampler=False).fit(module)
        return module.final, easgd.center["x"].item(), easgd.communication.exchanges

    cases = [(2,), (2, 2, 4), (3, 4, 6)]
    results = run_ranks(lambda: [*map(train, cases)], 2)
    for failing, (x0, center, exchanges), (x1, same, _) in zip(cases, *results, strict=True):
        assert center == same, failing
        assert exchanges == 3, failing
        assert x0 + x1 + center == pytest.approx(3 - 0.1 * 8 * (linear(0) + linear(1)), abs=1e-5), failing


# The position of EAMSGD


def averager_of(optimizer):
    make_nesterov(optimizer, 0.9)
    sums = all_reduced_sums(LoneChannel, 100)
    return SynchronousAverager(
        optimizer, ExchangeLine(LoneChannel()), sums, number=0, tau=100, rates=MovingRates(), position=LookAheadPosition
    )


def position(averager):
    into = averager.center.values.like()
    with torch.no_grad():
        averager._position.write(into, averager.parameters)
    return into.flat.tolist()


def test_a_step_that_was_skipped_leaves_the_position_under_a_changing_learning_rate():
    x = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([x], lr=0.1)
    averager = averager_of(optimizer)
    for lr in (0.1, 0.05):
        optimizer.param_groups[0]["lr"] = lr
        averager.begin()
        x.grad = torch.ones(1)
        optimizer.step()
        averager.finish()
    before = position(averager)
    for lr in (0.01, 0.001):
        optimizer.param_groups[0]["lr"] = lr
        averager.begin()  # a gradient scaler has found an inf: no step
        averager.finish()
        assert position(averager) == before


def test_a_parameter_without_gradient_keeps_the_factor_of_its_own_last_step():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    averager = averager_of(optimizer)
    velocity = {a: 0.0, b: 0.0}
    x = {a: 1.0, b: 1.0}
    for lr, with_gradient in ((0.1, (a, b)), (0.1, (a,)), (0.01, (a,)), (0.001, (a,)), (0.001, (b,)), (0.5, (a, b))):
        optimizer.param_groups[0]["lr"] = lr
        averager.begin()
        for parameter in (a, b):
            has = any(parameter is each for each in with_gradient)
            parameter.grad = torch.ones(1) if has else None
        optimizer.step()
        averager.finish()
        for parameter in with_gradient:  # b' = 0.9 b + g; y' = y - lr (g + 0.9 b'); x' = y' + lr 0.9 b' = y - lr g
            before = x[parameter] - velocity[parameter]  # y, in torch's coordinates
            momentum = optimizer.state[parameter]["momentum_buffer"].item()
            x[parameter] = before - lr
            velocity[parameter] = lr * 0.9 * momentum
        assert position(averager) == pytest.approx([x[a], x[b]], abs=1e-6)


def test_factors_are_those_of_the_run_that_is_resumed():
    x = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([x], lr=0.1)
    averager = averager_of(optimizer)
    x.grad = torch.ones(1)
    averager.begin(), optimizer.step(), averager.finish()
    optimizer.param_groups[0]["lr"] = 0.001
    expected, state, of_optimizer = position(averager), averager.state_dict(), optimizer.state_dict()
    other = torch.optim.SGD([x], lr=0.001)
    resumed = averager_of(other)
    other.load_state_dict(of_optimizer)  # its groups are new objects
    resumed.load_state_dict(state)
    assert position(resumed) == expected


def test_an_inf_under_a_real_gradient_scaler():
    class Scaled(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.positions = []

        def training_step(self, batch, index):
            loss = 0.5 * (self.w - 3).square().sum()
            return loss * float("inf") if index == 4 else loss

        def on_train_batch_end(self, outputs, batch, index):
            (averager,) = self.trainer.strategy._averaging.averagers.values()
            self.positions.append((self.w.item(), position(averager)[0]))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD([self.w], lr=0.1)
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [4], 0.1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def train_dataloader(self):
            return DataLoader(torch.zeros(14, 1), batch_size=1)

    def train():
        module = Scaled()
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
        strategy = EASGDStrategy(tau=100, momentum=0.9, timeout=TIMEOUT)
        quiet_trainer(strategy=strategy, devices=2, plugins=[precision]).fit(module)
        return module.positions

    positions = run_ranks(train, 2)[0]
    assert positions[4] == positions[3], "the skipped step moved the worker"
    assert positions[5] != positions[4]


# Steps of optimizers inside of others, and of others on the same parameters


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization, as it is written everywhere: an optimizer around another one."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=0.01)

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["old"])
        self.base.step()

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class SamByHand(Wrapped):
    """Its own step is never called: the inner one's is the worker's step."""

    def training_step(self, batch, index):
        optimizer = self.optimizers(use_pl_optimizer=False)
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            step()

    def configure_optimizers(self):
        return Sam(self.parameters(), lr=0.05)


class SamByClosure(WrappedWithClosure):
    """Its step counts once, the inner one's inside of it not at all."""

    def configure_optimizers(self):
        return Sam(self.parameters(), lr=0.05)


@pytest.mark.parametrize("strategy", ["sync", "round_robin"])
def test_an_inner_optimizers_step_is_the_workers(strategy):
    results = run_ranks(lambda: (fitted(SamByHand, strategy), fitted(SamByClosure, strategy)), 2)
    assert all(by_hand == by_closure for by_hand, by_closure in results)
    assert results[0][0][0] != results[1][0][0]
    assert all(by_hand[1] == 3 for by_hand, _ in results)


def test_an_inner_optimizers_step_is_the_workers_under_fabric():
    def train(by_hand):
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2, timeout=TIMEOUT))
        fabric.launch()
        model, optimizer = fabric.setup(net := nn.Linear(4, 1), Sam(net.parameters(), lr=0.05))
        for batch in torch.randn(7, 8, 4, generator=torch.Generator().manual_seed(fabric.global_rank)):

            def closure(batch=batch):
                optimizer.zero_grad()
                fabric.backward((model(batch) - 1).square().mean())

            if by_hand:
                for step in (optimizer.optimizer.first_step, optimizer.optimizer.second_step):
                    closure()
                    step()
            else:
                optimizer.step(closure)
        fabric.strategy.finalize()
        return fabric.strategy.communication.exchanges, model.state_dict()["weight"].tolist()

    for one, other in run_ranks(lambda: (train(True), train(False)), 2):
        assert one == other
        assert one[0] == 3


class ByGradient(Wrapped):
    """Nothing requires a gradient: it is computed apart and written into ``grad``."""

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        parameters = dict(self.net.named_parameters())
        loss = lambda values: (torch.func.functional_call(self.net, values, batch) - batch.sum(1, True)).square().mean()  # noqa: E731
        for name, gradient in torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()}).items():
            parameters[name].grad = gradient
        optimizer.step()

    def configure_optimizers(self):
        self.net.requires_grad_(False)
        return super().configure_optimizers()


@pytest.mark.parametrize("strategy", ["sync", "round_robin"])
def test_parameters_that_are_frozen_and_trained_all_the_same(strategy):
    (first, wrapped), (second, _) = run_ranks(lambda: (fitted(ByGradient, strategy), fitted(Wrapped, strategy)), 2)
    assert first[2] == second[2]
    assert torch.allclose(torch.tensor(first[2]), torch.tensor(wrapped[2]))


@pytest.mark.parametrize("strategy", ["sync", "round_robin"])
def test_a_step_at_the_center_would_be_lost_and_is_refused(strategy):
    class Adapting(Bare):
        def validation_step(self, batch, index):
            with torch.enable_grad():
                self.training_step(batch, index)

        def val_dataloader(self):
            return DataLoader(torch.ones(8, 4), batch_size=8)

    def train():
        quiet_trainer(strategy=STRATEGIES[strategy](), devices=2, num_sanity_val_steps=0).fit(Adapting())

    for outcome in end_ranks(train, 2, timeout=60):
        assert outcome.exitcode
        assert "would be taken at the center" in outcome.error


def test_an_optimizer_of_other_tensors_does_not_keep_them():
    """As those of adversarial examples and inner loops are."""

    class Inner(Net):
        def training_step(self, batch, index):
            delta = nn.Parameter(torch.zeros_like(batch))
            optimizer = torch.optim.SGD([delta], lr=0.1)
            self.loss(batch + delta).backward()
            optimizer.step()
            self.alive.append(weakref.ref(delta))
            return self.loss(batch + delta.detach())

    def train():
        module = Inner()
        module.alive = []
        quiet_trainer(strategy=STRATEGIES["sync"](), devices=2).fit(module)
        gc.collect()
        return sum(reference() is not None for reference in module.alive)

    assert run_ranks(train, 2) == [0, 0]


def test_the_position_survives_groups_that_are_loaded():
    x = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([x], lr=0.1)
    averager = averager_of(optimizer)
    for _ in range(2):
        averager.begin()
        x.grad = torch.ones(1)
        optimizer.step()
        averager.finish()
    before = position(averager)
    optimizer.param_groups[0]["lr"] = 0.001
    optimizer.load_state_dict(optimizer.state_dict())
    assert position(averager) == before


@pytest.mark.parametrize("settings", [{"nesterov": False}, {"momentum": 0, "nesterov": False}])
def test_a_worker_of_eamsgd_stays_nesterov(settings):
    """Whatever settings are loaded in mid-training."""

    class Loads(Wrapped):
        def on_train_batch_start(self, batch, index):
            if index == 3:
                (optimizer,) = self.trainer.optimizers
                state = optimizer.state_dict()
                state["param_groups"][0] |= settings
                optimizer.load_state_dict(state)

        def on_train_end(self):
            group = self.trainer.optimizers[0].param_groups[0]
            self.trace = [group["nesterov"], group["momentum"]]

    assert run_ranks(fitted, 2, Loads, "eamsgd")[0][0] == [True, 0.9]
