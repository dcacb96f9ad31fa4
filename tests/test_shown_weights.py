"""Which weights the module shows: swapping leaves no trace, and after fit all ranks show the same."""

import contextlib
import random

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from ranks import end_ranks, run_ranks
from test_strategy import arrays, equal
from torch import nn
from torch.utils.data import DataLoader
from toys import Regression, fitted, quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.strategies.shown_weights import ShownWeights

pytestmark = pytest.mark.timeout(120)
MODES = ["sync", "async"]


class Dropped(Regression):
    """A network whose training draws random numbers, in a validation loop that draws none."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net.append(nn.Dropout(0.5))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def val_dataloader(self):
        generator = torch.Generator().manual_seed(3)  # else the loader draws its seed from torch's own generator
        return DataLoader(torch.randn(32, 4, generator=generator), batch_size=8, generator=generator)


def everything(module):
    """The bits of all that a swap must not change."""
    (optimizer,) = module.trainer.optimizers
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    gradients = [torch.zeros(0) if p.grad is None else p.grad for p in module.parameters()]
    tensors = [*module.parameters(), *module.buffers(), *state, *gradients, torch.get_rng_state()]
    return [a.tobytes() for a in arrays(tensors)], np.random.get_state()[1].tobytes(), random.getstate()


class Watch(Callback):
    """What everything is before and after each validation, which lies within an accumulation."""

    def __init__(self):
        self.before, self.after, self.seen = [], [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.last = everything(module)

    def on_validation_start(self, trainer, module):
        self.before.append(self.last)
        self.seen.append(everything(module))

    def on_train_batch_start(self, trainer, module, *_):
        if len(self.after) < len(self.before):
            self.after.append(everything(module))


class Nested(Callback):
    """Looks at the center from within the worker's weights, and saves it from there."""

    def __init__(self, path):
        self.path, self.found = path, []

    def on_validation_end(self, trainer, module):
        center = everything(module)
        parameters = arrays(module.parameters())
        with trainer.strategy.worker_weights():
            worker = everything(module)
            trainer.save_checkpoint(self.path)
            with trainer.strategy.center_weights():
                self.found.append(everything(module) == center)
                with trainer.strategy.worker_weights():
                    self.found.append(everything(module) == worker)
            self.found.append(everything(module) == worker != center)
        self.found.append(everything(module) == center)
        saved = torch.load(self.path, weights_only=True)["state_dict"]
        self.found.append(equal(arrays(saved[name] for name, _ in module.named_parameters()), parameters))

    on_train_end = on_validation_end


@pytest.mark.parametrize("mode", MODES)
def test_a_validation_leaves_everything_as_it_was(mode, tmp_path):
    def train():
        watch, nested = Watch(), Nested(tmp_path / "nested.ckpt")
        fitted(
            Dropped(batches=12), EASGDStrategy(mode=mode, tau=1), 2, val_check_interval=5, num_sanity_val_steps=0,
            accumulate_grad_batches=4, callbacks=[watch, nested],
        )  # fmt: skip
        gradients = any(np.frombuffer(bits, np.float32).any() for bits in watch.before[0][0][-7:-1])
        left = watch.before == watch.after, len(watch.after), watch.seen[0] != watch.before[0], gradients
        return left, nested.found

    assert run_ranks(train, 2) == [((True, 2, True, True), [True] * 15)] * 2


@pytest.mark.parametrize("mode", MODES)
def test_an_error_at_the_center_leaves_everything_as_it_was(mode):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 4:
                before = everything(module)
                with contextlib.suppress(ValueError), trainer.strategy.center_weights():
                    shown.append(everything(module) != before)
                    raise ValueError
                shown.append(everything(module) == before)

    shown = []

    def train():
        fitted(Dropped(), EASGDStrategy(mode=mode, tau=1), 2, accumulate_grad_batches=2, callbacks=[Fails()])
        return shown

    assert run_ranks(train, 2) == [[True, True]] * 2


@pytest.mark.parametrize("mode", MODES)
def test_a_validation_that_raises(mode):
    """The worker can be read bit for bit in on_exception; afterwards the module holds the center."""

    class Raises(Dropped):
        def validation_step(self, batch, index):
            raise ValueError("the user's own error")

    class Kept(Watch):
        def on_exception(self, trainer, module, exception):
            with trainer.strategy.worker_weights():
                self.after.append(everything(module))

    def train():
        watch = Kept()
        module = Raises(batches=12)
        strategy = EASGDStrategy(mode=mode, tau=1)
        with pytest.raises(ValueError, match="the user's own error"):
            fitted(
                module, strategy, 2, val_check_interval=5, num_sanity_val_steps=0, accumulate_grad_batches=4,
                callbacks=[watch],
            )  # fmt: skip
        return watch.before == watch.after, equal(arrays(module.parameters()), arrays(strategy.center.values()))

    outcomes = end_ranks(train, 2, timeout=40)
    assert [outcome.value for outcome in outcomes] == [(True, True)] * 2, outcomes


@pytest.mark.parametrize("mode", MODES)
def test_what_a_validation_writes_to_a_buffer_stays_and_in_center_weights_it_does_not(mode):
    class Thresholds(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("threshold", torch.zeros(()))

        def on_validation_epoch_end(self):
            self.threshold += 1

        def on_train_epoch_end(self):
            with self.trainer.strategy.center_weights():
                self.threshold -= 5

    def train():
        return fitted(Thresholds(), EASGDStrategy(mode=mode, tau=1), 2, max_epochs=3).threshold.item()

    assert run_ranks(train, 2) == [3.0] * 2


@pytest.mark.parametrize("mode", MODES)
def test_fit_validate_test_and_predict_after_each_other(mode):
    class Full(Regression):
        def test_step(self, batch, index):
            self.log("test_loss", self.loss(batch), sync_dist=True)

        def predict_step(self, batch, index):
            return self.net(batch)

        test_dataloader = predict_dataloader = Regression.val_dataloader

    def run():
        module = Full()
        trainer = quiet_trainer(strategy=EASGDStrategy(mode=mode, tau=2), devices=2, use_distributed_sampler=False)
        (alone,) = trainer.validate(module, verbose=False)
        trainer.test(module, verbose=False)
        trainer.predict(module, return_predictions=False)
        start = arrays(module.parameters())
        trainer.fit(module)
        center = arrays(trainer.strategy.center.values())
        last = trainer.callback_metrics["val_loss"].item()
        (after,) = trainer.validate(module, verbose=False)
        (tested,) = trainer.test(module, verbose=False)
        predicted = trainer.predict(module)
        same = equal(center, arrays(module.parameters()))
        assert last == after["val_loss"] == tested["test_loss"] != alone["val_loss"]
        return same, equal(start, center), [p.numpy().tobytes() for p in predicted]

    first, second = run_ranks(run, 2)
    assert first[:2] == (True, False)
    assert first == second


# Callbacks that leave weights of their own


class Slow(Regression):
    """Without BatchNorm, so that its buffers do not interfere; each rank its own data."""

    def __init__(self, norm=False, **arguments):
        super().__init__(**arguments)
        if not norm:
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


class OwnAverages(Callback):
    """What each rank's module holds when all callbacks are done, and before the strategy has acted."""

    def on_train_end(self, trainer, module):
        self.own = arrays(module.parameters())


def final_weights(makes, mode, norm=False):
    """On each rank, for each callback."""

    def train(make):
        own = OwnAverages()
        strategy = EASGDStrategy(mode=mode, tau=3, order="round_robin" if mode == "async" else "free")
        module = fitted(Slow(norm=norm), strategy, 2, callbacks=[make(), own], max_epochs=3, limit_val_batches=0)
        center = arrays(strategy.center.values())
        return own.own, arrays(module.parameters()), center, arrays(module.buffers())

    return run_ranks(lambda: [*map(train, makes)], 2)


AVERAGING = {"swa": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)}
if hasattr(callbacks, "WeightAveraging"):  # from Lightning 2.6 on
    AVERAGING |= {"ema": lambda: callbacks.EMAWeightAveraging(decay=0.9), "mean": callbacks.WeightAveraging}


@pytest.mark.parametrize("mode", MODES)
def test_averages_of_the_workers_become_one(mode):
    for name, first, second in zip(AVERAGING, *final_weights(AVERAGING.values(), mode), strict=True):
        assert not equal(first[0], second[0]), name  # each rank's own
        assert equal(first[1], second[1]), name
        assert not equal(first[1], first[2]), name  # not the center: the user asked for the average
        for mean, one, other in zip(first[1], first[0], second[0], strict=True):
            expected = ((one.astype(np.float64) + other) / 2).astype(np.float32)
            np.testing.assert_array_equal(mean, expected, name)


def test_swa_with_batch_norm_adds_an_epoch_without_exchanges():
    (first,), (second,) = final_weights([AVERAGING["swa"]], "sync", norm=True)
    assert equal(first[1], second[1])
    assert equal(first[3], second[3])
    assert not equal(first[1], first[2])
    np.testing.assert_allclose(
        np.concatenate([a.ravel() for a in first[1]]),
        np.concatenate([((a + b) / 2).ravel() for a, b in zip(first[0], second[0], strict=True)]),
        rtol=1e-6,
    )


def test_without_such_callbacks_the_center_keeps_its_bits():
    (first,), (second,) = final_weights([Callback], "sync", norm=True)
    assert equal(first[1], first[2])
    assert equal(first[1], second[1])
    assert equal(first[3], second[3])


class Normalized(Slow):
    """Two layers with spectral normalization, of both kinds, whose singular vectors have another sign on rank 1."""

    def __init__(self):
        super().__init__()
        self.net[0] = nn.utils.parametrizations.spectral_norm(self.net[0])
        self.net[2] = nn.utils.spectral_norm(self.net[2])
        self.norms = []

    def on_train_batch_end(self, *_):
        if self.global_rank == 1 and self.trainer.global_step == 1:
            for vector in self.buffers():
                vector.neg_()

    def on_validation_start(self):
        self.net(torch.zeros(1, 4))
        self.norms.append([torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (self.net[0], self.net[2])])


@pytest.mark.parametrize("mode", MODES)
def test_spectral_normalization_is_that_of_the_center(mode):
    def train():
        module = fitted(Normalized(), EASGDStrategy(mode=mode, tau=2), 2, max_epochs=2)
        module.eval().on_validation_start()
        return module.norms, [a.tobytes() for a in arrays(module.buffers())]

    (norms, buffers), (_, theirs) = run_ranks(train, 2)
    assert buffers == theirs
    np.testing.assert_allclose(norms, np.ones((3, 2)), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:EASGDStrategy.*were not finite:RuntimeWarning")
@pytest.mark.parametrize("mode", MODES)
def test_spectral_normalization_is_that_of_the_center_beside_a_worker_that_is_not_finite(mode):
    class Diverges(Normalized):
        def on_train_batch_end(self, batch, outputs, index):
            if self.global_rank == 0 and self.current_epoch == 0 and self.trainer.is_last_batch:
                for vector in self.buffers():
                    vector.fill_(torch.nan)

    def train():
        strategy = EASGDStrategy(mode=mode, tau=2, on_nonfinite="reset")
        module = fitted(Diverges(), strategy, 2, max_epochs=2)
        module.eval().on_validation_start()
        return module.norms

    (norms, _) = run_ranks(train, 2)
    np.testing.assert_allclose(norms, np.ones((3, 2)), rtol=1e-3)


def test_spectral_normalization_of_wide_complex_weights():
    class Wide(Normalized):
        def __init__(self):
            super().__init__()
            self.wide = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2, dtype=torch.complex128))

        def training_step(self, batch, index):
            wide = self.wide(torch.ones(2, dtype=torch.complex128) * self.global_rank)
            return super().training_step(batch, index) + wide.abs().sum()

    def train():
        return [a.tobytes() for a in arrays(fitted(Wide(), EASGDStrategy(tau=2), 2).buffers())]

    first, second = run_ranks(train, 2)
    assert first == second


def test_a_buffer_of_two_modules_that_a_validation_replaces_stays_one():
    module = nn.ModuleList([nn.Module(), nn.Module()])
    for part in module:
        part.register_buffer("bank", torch.zeros(2))
    shown = ShownWeights(module, [], keeps_writes=True)
    shown.show_center({})
    with torch.inference_mode():
        module[0].bank = module[1].bank = torch.ones(2)
    shown.show_worker()
    assert module[0].bank is module[1].bank
    assert not module[0].bank.is_inference()


def test_a_module_that_a_validation_writes_to_and_takes_away():
    module = nn.ModuleDict({"stays": nn.BatchNorm1d(2), "goes": nn.BatchNorm1d(2)})
    shown = ShownWeights(module, [], keeps_writes=True)
    shown.show_center({})
    for part in module.values():
        part.running_mean += 1
    del module["goes"]
    assert shown.altered == {"stays.running_mean"}


class Deep(Regression):
    """Saves, or looks at the center, between the forward and the backward pass of a step without an exchange."""

    def __init__(self, what, path=None):
        super().__init__()
        self.net.append(nn.Linear(1, 1))
        self.what, self.path = what, path
        self.register_buffer("scale", torch.full((4,), 0.5))  # what a multiplication keeps for the backward pass
        self.teacher = nn.Linear(4, 4).requires_grad_(False)

    def training_step(self, batch, index):
        with torch.no_grad():
            self.teacher.weight.add_(0.01 * (1 + self.global_rank))
        loss = self.loss(self.teacher(batch * self.net[0].weight[0]) * self.scale)
        if self.what == "step" and index == 3:
            self.trainer.save_checkpoint(self.path)
        if self.what == "center" and index == 3:
            with self.trainer.strategy.center_weights():
                center = self.loss(batch)
            with self.trainer.strategy.center_weights(), self.trainer.strategy.worker_weights():
                again = self.loss(batch)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                center.backward()  # of weights that are not there any more
            self.zero_grad()
            again.backward()  # the worker's
            self.zero_grad()
        return loss

    def on_before_backward(self, loss):
        if self.what == "hook" and self.trainer.global_step == 3:
            self.trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    "arguments", [{}, {"mode": "async", "order": "round_robin"}, {"process_group_backend": "gloo"}]
)
def test_a_checkpoint_or_the_center_between_forward_and_backward(arguments, tmp_path):
    def train(what):
        torch.manual_seed(1)
        module = fitted(Deep(what, tmp_path / "x.ckpt"), EASGDStrategy(tau=2, **arguments), 2, limit_val_batches=0)
        return arrays(list(module.net.parameters()))

    whats = ("step", "hook", "center")
    for plain, *looked in run_ranks(lambda: [*map(train, ("", *whats))], 2):
        for what, each in zip(whats, looked, strict=True):
            assert equal(plain, each), what


def test_the_center_between_forward_and_backward_under_fabric():
    def train():
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2))
        fabric.launch()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        module, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
        batch = torch.ones(1, 2) * (1 + fabric.global_rank)
        for step in range(6):
            optimizer.zero_grad()
            loss = module(batch).square().sum()
            if step == 3:
                with fabric.strategy.center_weights(module):
                    module(batch)
            fabric.backward(loss)
            optimizer.step()
        fabric.strategy.finalize()

    run_ranks(train, 2)
