"""The largest curvature at the center: power iteration, the callback, and its verdict."""

import itertools
import math
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from ranks import run_ranks
from test_shown_weights import everything
from test_strategy import arrays
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy, LocalStrategy
from lightning_easgd.callbacks import CurvatureMonitor
from lightning_easgd.callbacks.curvature import HessianProduct, PowerIteration
from lightning_easgd.callbacks.stable_region import NotJudgedError, region_of
from lightning_easgd.stability import downpour, outer, round_robin, synchronous

pytestmark = pytest.mark.timeout(120)


# Power iteration


def diagonal(*values):
    return lambda vector: [torch.tensor(values, dtype=torch.float64) * vector[0]]


def estimate(power, *values):
    return power.estimate(diagonal(*values), [torch.zeros(len(values), dtype=torch.float64)])


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ((10.0, 5.0, 1.0, 0.0), 10.0),
        ((3.0, -8.0, 1.0), 3.0),  # the largest in modulus is below zero
        ((4.0, -4.0, 1.0), 4.0),  # plain power iteration stands still on a mixture
        ((-1.0, -5.0), -1.0),
        ((0.0, 0.0), 0.0),
    ],
)
def test_power_iteration_finds_the_largest_eigenvalue(values, largest):
    found = estimate(PowerIteration(200, 1e-6), *values)
    assert found.converged
    assert found.value == pytest.approx(largest, rel=1e-3, abs=1e-6)


def test_power_iteration_goes_on_from_the_last_eigenvector():
    power = PowerIteration(100, 1e-4)
    cold = estimate(power, 10.0, 8.0, 7.0, 1.0)
    warm = estimate(power, 10.1, 8.0, 7.1, 1.0)
    assert warm.products == 2 < cold.products
    assert warm.value == pytest.approx(10.1, rel=1e-3)


def test_power_iteration_that_ends_early_underestimates():
    found = estimate(PowerIteration(3, 1e-9), 10.0, 9.9, 9.8, 9.7)
    assert not found.converged
    assert found.value < 10


def test_power_iteration_recovers_from_what_is_not_finite():
    power = PowerIteration(50, 1e-4)
    assert math.isnan(estimate(power, math.nan, 1.0).value)
    assert estimate(power, 2.0, 1.0).value == pytest.approx(2.0, rel=1e-3)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 2)
        self.out = nn.Linear(2, 1)

    def forward(self, x):
        return self.out(self.lstm(x)[0]).square().mean()


@pytest.mark.parametrize("make", [Recurrent, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))])
def test_hessian_product_is_that_of_the_dense_hessian(make):
    torch.manual_seed(0)
    net = make().double()
    data = torch.randn(5, 1, 2).double() if isinstance(net, Recurrent) else torch.randn(5, 3).double()
    shapes = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in shapes.values()]

    def loss(point):
        return torch.func.functional_call(net, dict(point), (data,)).square().mean()

    def flat_loss(x):
        parts = torch.split(x, sizes)
        return loss({name: part.view_as(p) for part, (name, p) in zip(parts, shapes.items(), strict=True)})

    dense = torch.autograd.functional.hessian(flat_loss, torch.cat([p.flatten() for p in shapes.values()]))
    steps = {name: 0.25 if index == 0 else 1.0 for index, name in enumerate(shapes)}
    roots = torch.cat([torch.full((n,), math.sqrt(steps[name])) for n, name in zip(sizes, shapes, strict=True)])
    vector = [torch.randn_like(p) for p in shapes.values()]
    product = HessianProduct(loss, shapes, steps=steps, decay=dict.fromkeys(shapes, 0.5))
    expected = roots * ((dense + 0.5 * torch.eye(len(dense))) @ (roots * torch.cat([v.flatten() for v in vector])))
    torch.testing.assert_close(torch.cat([p.flatten() for p in product(vector)]), expected.double())


# The callback on one device


class Bowl(L.LightningModule):
    """f(x) = ½ Σ hᵢ xᵢ², in two parameters; the batches are zeros."""

    def __init__(self, lr=0.01, **sgd):
        super().__init__()
        self.first = nn.Parameter(torch.ones(3))
        self.second = nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.groups = [{"params": [self.first], "lr": lr}, {"params": [self.second], "lr": lr}]
        self.lr, self.sgd = lr, sgd

    def training_step(self, batch):
        squares = torch.cat([torch.tensor([10.0, 4.0, 1.0]) * self.first**2, torch.tensor([6.0, 2.0]) * self.second**2])
        return 0.5 * squares.sum() + (batch * self.frozen).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.groups, lr=self.lr, **self.sgd)

    def train_dataloader(self):
        return DataLoader(torch.zeros(48), batch_size=2)


def watch(module, monitor=None, **trainer):
    monitor = monitor or CurvatureMonitor(every_n_steps=4, iterations=100, tolerance=1e-5)
    fit = quiet_trainer(callbacks=[monitor], **({"devices": 1, "max_steps": 9} | trainer))
    fit.fit(module)
    return monitor.readings


def test_curvature_of_a_bowl():
    readings = watch(Bowl())
    assert [reading.step for reading in readings] == [1, 4, 8]
    for reading in readings:
        assert reading.curvature == pytest.approx(10, rel=1e-3)
        assert reading.scaled_lr == pytest.approx(0.1, rel=1e-3)
        assert reading.limit == pytest.approx(2)
    assert readings[1].products == 2


def test_weight_decay_belongs_to_the_curvature():
    assert watch(Bowl(weight_decay=0.5))[0].curvature == pytest.approx(10.5, rel=1e-3)


def test_groups_with_other_learning_rates():
    module = Bowl()
    module.groups[0]["lr"] = 0.002  # its 10 counts a fifth of that of the second, with 6
    (reading, *_) = watch(module)
    assert (reading.curvature, reading.scaled_lr) == pytest.approx((6, 0.06), rel=1e-3)


def test_readings_follow_optimizer_steps_not_batches():
    readings = watch(Bowl(), CurvatureMonitor(every_n_steps=2), accumulate_grad_batches=3, max_steps=6)
    assert [reading.step for reading in readings] == [1, 2, 4, 6]


def test_several_batches_are_waited_for():
    class Scaled(Bowl):
        def training_step(self, batch):
            return super().training_step(batch) * batch.mean()

        def train_dataloader(self):
            return DataLoader(torch.tensor([1.0, 3.0] * 10), batch_size=1)

    readings = watch(Scaled(), CurvatureMonitor(every_n_steps=4, batches=2, iterations=100, tolerance=1e-5))
    assert [reading.step for reading in readings] == [2, 4, 8]
    assert readings[0].curvature == pytest.approx(20, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision(precision):
    class Exact(Bowl):
        def training_step(self, batch):
            seen.append((self.first.dtype, torch.is_autocast_enabled("cpu")))
            return super().training_step(batch)

    seen = []
    (reading, *_) = watch(Exact(), precision=precision)
    assert reading.curvature == pytest.approx(10, rel=1e-3)
    training, rehearsed = seen[:2]
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert rehearsed == (wide, False)
    if precision != "64-true":
        assert training == (torch.bfloat16, False) if precision == "bf16-true" else (torch.float32, True)


def test_fused_attention_has_a_second_derivative():
    class Attends(Bowl):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.groups.append({"params": list(self.attention.parameters())})

        def training_step(self, batch):
            x = torch.randn(2, 3, 4)
            return self.attention(x, x, x, need_weights=False)[0].square().mean() + super().training_step(batch)

    assert len(watch(Attends())) == 3


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def about_the_monitor(caught):
    return [str(each.message) for each in caught if "CurvatureMonitor" in str(each.message)]


# Of neither torch tells: the product is 0, as the path to the parameters ends.
@pytest.mark.parametrize("outer", [torch.sum, torch.linalg.vector_norm])
def test_a_loss_without_second_derivative_turns_it_off(outer):
    class Single(Bowl):
        def training_step(self, batch):
            return outer(Once.apply(self.first))

    with pytest.warns(UserWarning, match="some backward pass has none") as caught:
        assert watch(Single()) == []
    (text,) = about_the_monitor(caught)
    assert "it is off, as the loss cannot be examined at step 1" in text


@pytest.mark.parametrize("seed", [0, 5, 8])
def test_kinks_do_not_turn_it_off(seed):
    """Some of the ReLUs jump between any two points: compared with a difference of gradients, 16 of 40 had it off."""

    class Deep(Bowl):
        def __init__(self):
            super().__init__()
            torch.manual_seed(seed)
            layers = [(nn.Linear(features, 64), nn.BatchNorm1d(64), nn.ReLU()) for features in (32, 64, 64)]
            self.net = nn.Sequential(*itertools.chain.from_iterable(layers), nn.Linear(64, 10))
            self.batch = torch.randn(8, 32), torch.randint(10, (8,))
            self.groups = [{"params": list(self.net.parameters()), "lr": 0.01}]

        def training_step(self, batch):
            inputs, targets = self.batch
            return nn.functional.cross_entropy(self.net(inputs), targets)

    assert len(watch(Deep(), CurvatureMonitor(every_n_steps=4))) == 3


def test_a_linear_loss_has_no_curvature():
    class Linear(Bowl):
        def training_step(self, batch):
            return self.first.sum()

    assert [reading.curvature for reading in watch(Linear())] == [0, 0, 0]


def test_what_it_cannot_examine_is_refused():
    class Manual(Bowl):
        def __init__(self, optimizers=1):
            super().__init__()
            self.automatic_optimization = False
            self.optimizers_made = optimizers

        def training_step(self, batch):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=0.01) for p in (self.first, self.second)][: self.optimizers_made]

    with pytest.raises(TypeError, match=r"CurvatureMonitor\(loss=None\) with manual optimization"):
        watch(Manual())
    with pytest.raises(TypeError, match="2 optimizers"):
        watch(Manual(2))
    given = CurvatureMonitor(loss=lambda module, batch: module.first.square().sum(), iterations=50)
    assert watch(Manual(), given)[0].curvature == pytest.approx(2)


@pytest.mark.parametrize(
    ("argument", "value"), [("every_n_steps", -1), ("batches", 0), ("iterations", 0), ("tolerance", 0.0)]
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=rf"CurvatureMonitor\({argument}={value}\)"):
        CurvatureMonitor(**{argument: value})


def test_zero_steps_switch_it_off():
    assert watch(Bowl(), CurvatureMonitor(every_n_steps=0)) == []


# The verdict

SGD = torch.optim.SGD


def optimizer(make=SGD, **arguments):
    return make([torch.zeros(1, requires_grad=True)], **({"lr": 0.1} | arguments))


NESTEROV = {"momentum": 0.9, "nesterov": True}


def test_regions_are_those_of_the_analysis():
    # α = (4 - 2s) / (2(p + 1) - ps), the synchronous limit for τ = 1
    alpha = float(synchronous.largest_moving_rate(4, 1.5))
    region = region_of(EASGDStrategy(alpha=alpha, tau=1), optimizer(), 4)
    assert region.limit == pytest.approx(1.5)
    assert region.holds(1.4999)
    assert not region.holds(1.5001)
    # α = (4 - 2s) / (4 - s), the limit of workers that take turns, exact for odd p
    alpha = float(round_robin.largest_moving_rate(1.5))
    region = region_of(EASGDStrategy(alpha=alpha, tau=1, mode="async"), optimizer(), 3)
    assert region.limit == pytest.approx(1.5)
    # Nesterov alone: (2 + 2δ) / (1 + 2δ)
    limit = synchronous.nesterov_scaled_lr(0.9)
    assert region_of(SingleDeviceStrategy("cpu"), optimizer(**NESTEROV), 1).limit == pytest.approx(limit)
    assert region_of(LocalStrategy(), optimizer(), 4).limit == pytest.approx(2)
    eamsgd = region_of(EASGDStrategy(momentum=0.9, tau=10), optimizer(**NESTEROV), 4)
    assert eamsgd.limit == synchronous.largest_scaled_lr(0.225, 0.9, workers=4, momentum=0.9, tau=10)
    diloco = EASGDStrategy(tau=4, alpha=1, beta=0.7, outer_momentum=0.9, outer_nesterov=True, pull_to="new")
    region = region_of(diloco, optimizer(), 4)
    assert region.limit == outer.largest_scaled_lr(1, 0.7, workers=4, **diloco.family)
    assert "lower the learning rate" in region.remedy(1.0, 3.0).lower()
    limit = region_of(DownpourStrategy(tau=4), optimizer(), 4).limit
    assert downpour.radius(4, 0.999 * limit, 4) <= 1 < downpour.radius(4, 1.001 * limit, 4)
    assert limit < 0.2


@pytest.mark.parametrize(
    ("strategy", "made", "says"),
    [
        (EASGDStrategy(), optimizer(torch.optim.Adam), "a step of Adam"),
        (EASGDStrategy(), optimizer(**NESTEROV), "eamsgd"),
        (SingleDeviceStrategy("cpu"), optimizer(momentum=0.9), "Nesterov"),
        (EASGDStrategy(mode="async", alpha=0.1, beta=0.9), optimizer(), "beta = p"),
        (DownpourStrategy(tau=1, momentum=0.9), optimizer(), "DOWNPOUR has no momentum"),
        (EASGDStrategy(mode="async"), optimizer(), "65 workers"),
        (EASGDStrategy(mode="async", delay=2), optimizer(), "neither outer_momentum, pull_to nor delay"),
    ],
)
def test_what_the_analysis_does_not_cover(strategy, made, says):
    with pytest.raises(NotJudgedError, match=says):
        region_of(strategy, made, 65)


def test_an_optimizer_that_is_not_judged_is_named_once():
    class Adaptive(Bowl):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.001)

    with pytest.warns(UserWarning, match=r"stability is not judged, as a step of Adam") as caught:
        readings = watch(Adaptive())
    assert len(about_the_monitor(caught)) == 1
    assert readings[0].limit is None
    assert readings[0].curvature == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_warns_when_the_step_leaves_the_region(momentum):
    """Two workers, a learning rate that grows at every step, and a warning at the first that is outside."""

    class Warming(Bowl):
        def on_train_batch_start(self, *_):
            step = self.trainer.global_step
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = limit / 10 * (0.985 + 0.01 * step)

    limit = synchronous.largest_scaled_lr(0.3, 0.6, workers=2, momentum=momentum or 0.0, tau=2)

    def train():
        strategy = EASGDStrategy(alpha=0.3, tau=2, momentum=momentum)
        monitor = CurvatureMonitor(every_n_steps=1, iterations=200, tolerance=1e-7)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(strategy=strategy, devices=2, callbacks=[monitor], max_steps=6).fit(Warming())
        return about_the_monitor(caught), monitor.readings

    (told, readings), (silent, none) = run_ranks(train, 2)
    assert silent == none == []
    outside = [reading.step for reading in readings if reading.scaled_lr > limit]
    assert outside == [3, 4, 5, 6]
    (text,) = told
    assert f"at step {outside[0]} " in text
    assert f"stable up to {limit:.4g} (lightning_easgd.stability.synchronous.largest_scaled_lr)" in text
    assert f"Lower the learning rate below {limit / 10:.3g}" in text
    assert ("momentum=0.9" in text) == (momentum is not None)


# Training is not changed


class Everything(Regression):
    """BatchNorm, dropout, metrics, lists and counters; ranks have different numbers of batches."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net.append(nn.Dropout(0.2))
        self.mean = MeanMetric(sync_on_compute=False)
        self.losses, self.calls, self.sum = [], 0, torch.zeros(1)

    def training_step(self, batch, index):
        batch.mul_(1.0 + index)  # in place
        loss = self.loss(batch) + 0 * F.mse_loss(batch, batch)
        self.mean(loss.detach())
        self.losses.append(loss.item())
        self.calls += 1
        self.sum += loss.detach()
        self.log("loss", loss)
        self.log_dict({"mean": self.mean})
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.002)

    def train_dataloader(self):
        rank = self.trainer.global_rank
        data = torch.randn((self.batches + 3 * rank) * 8, 4, generator=torch.Generator().manual_seed(rank))
        return DataLoader(data, batch_size=8)


class Trace(Callback):
    """All that must not change, bit for bit, after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        own = [module.losses[:], module.calls, module.sum.item(), module.mean.mean_value.item()]
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.seen.append((everything(module), own, logged, module.training))


def seed():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_run_with_the_monitor_is_the_run_without(mode):
    def train(watched):
        seed()
        monitor, trace, module = CurvatureMonitor(every_n_steps=2), Trace(), Everything()
        strategy = EASGDStrategy(mode=mode, tau=2, order="round_robin" if mode == "async" else "free")
        quiet_trainer(
            strategy=strategy, devices=2, callbacks=[*([monitor] if watched else []), trace], max_epochs=2,
            use_distributed_sampler=False, accumulate_grad_batches=2, num_sanity_val_steps=0,
        ).fit(module)  # fmt: skip
        final = [array.tobytes() for array in arrays([*module.parameters(), *module.buffers()])]
        return trace.seen, final, len(monitor.readings)

    def both():
        with_monitor, without = train(True), train(False)
        return with_monitor[:2] == without[:2], len(without[0]), with_monitor[2], without[2]

    judged = run_ranks(both, 2)
    assert [same for same, *_ in judged] == [True, True]
    assert judged[0][1] == 16
    assert judged[0][2] >= 4
    assert judged[0][3] == judged[1][2] == 0


def test_the_center_is_what_is_examined():
    """Workers far apart, each in its own well of curvature; the center's is that of the middle."""

    class Quartic(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.ones(1))

        def training_step(self, batch):
            sign = 1 - 2 * self.trainer.global_rank
            return (self.x - sign).pow(4).sum()  # curvature 12 (x ∓ 1)²

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def train_dataloader(self):
            return DataLoader(torch.zeros(10))

    class At(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            centers.append(trainer.strategy.known_center["x"].item())

    centers = []

    def train():
        monitor = CurvatureMonitor(every_n_steps=1)
        quiet_trainer(
            strategy=EASGDStrategy(tau=2), devices=2, callbacks=[At(), monitor], use_distributed_sampler=False
        ).fit(Quartic())
        return centers, [reading.curvature for reading in monitor.readings]

    (known, curvatures), _ = run_ranks(train, 2)
    np.testing.assert_allclose(curvatures, [12 * (x - 1) ** 2 for x in known], rtol=1e-5, atol=1e-9)
    assert len(set(known)) > 2
