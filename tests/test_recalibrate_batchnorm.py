"""BatchNorm's statistics of the center, estimated at the center, and nothing else changed."""

import copy
from functools import partial

import pytest
import torch
from application import composed
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from ranks import run_ranks
from test_curvature import seed
from test_shown_weights import everything
from test_strategy import arrays
from torch import nn
from torch.utils.data import DataLoader
from toys import Regression, quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.callbacks import RecalibrateBatchNorm
from lightning_easgd.lab.building import build_trainer

pytestmark = pytest.mark.timeout(120)
MODES = ["sync", "async"]


class Noisy(Regression):
    """BatchNorm after a layer that differs between the workers; dropout; a step that writes to its batch."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, index):
        batch.mul_(1 + index / 10)
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.trainer.global_rank)
        return DataLoader(torch.randn(self.batches * 8, 4, generator=generator), batch_size=8)


def strategy(mode, **arguments):
    return EASGDStrategy(mode=mode, tau=2, order="round_robin" if mode == "async" else "free", **arguments)


class Watch(Callback):
    """What training is after each batch; the batches, and the state of the module at each validation."""

    def __init__(self):
        self.training, self.batches, self.shown = [], [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append((batch.clone(), index))

    def on_train_batch_end(self, trainer, module, *_):
        self.training.append(everything(module))

    def on_validation_start(self, trainer, module):
        self.shown.append(copy.deepcopy(module.net.state_dict()))


def fitted(make, mode, *callbacks, **trainer):
    seed()
    module = make()
    defaults = {"devices": 2, "val_check_interval": 5, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    quiet_trainer(strategy=strategy(mode), callbacks=list(callbacks), **(defaults | trainer)).fit(module)
    return module


def updated(state, batches):
    """What torch's own update_bn makes of these batches."""
    net = Noisy().net
    net.load_state_dict(state)
    net[2].p = 0.0
    inputs = [batch * (1 + index / 10) for batch, index in batches]
    torch.optim.swa_utils.update_bn(inputs, net)
    return net[1].running_mean, net[1].running_var


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_those_of_update_bn_with_all_workers_batches(mode):
    def train():
        watch = Watch()
        module = fitted(partial(Noisy, batches=11), mode, RecalibrateBatchNorm(batches=3), watch)
        return watch.batches, watch.shown, module.net.state_dict()

    (ours, shown, final), (theirs, other, last) = run_ranks(train, 2)
    assert len(shown) == 2
    for state, same in [*zip(shown, other, strict=True), (final, last)]:
        assert all(torch.equal(state[name], same[name]) for name in state)
    for state, end in ((shown[0], 5), (shown[1], 10), (final, 11)):
        mean, var = updated(state, ours[end - 3 : end] + theirs[end - 3 : end])
        torch.testing.assert_close(state["1.running_mean"], mean)
        torch.testing.assert_close(state["1.running_var"], var)
        assert state["1.num_batches_tracked"] == 3


@pytest.mark.parametrize("mode", MODES)
def test_training_is_bitwise_the_same_and_the_center_differs_in_its_statistics_only(mode):
    def train():
        seen = []
        for callbacks in ([], [RecalibrateBatchNorm(batches=3)]):
            watch = Watch()
            module = fitted(partial(Noisy, batches=11), mode, *callbacks, watch, max_epochs=2)
            seen.append((watch.training, arrays(module.parameters()), arrays(module.buffers())))
        (training, parameters, buffers), (again, same, others) = seen
        equal = [a.tobytes() for a in parameters] == [a.tobytes() for a in same]
        return training == again, equal, [a.tobytes() == b.tobytes() for a, b in zip(buffers, others, strict=True)]

    assert run_ranks(train, 2) == [(True, True, [False, False, False])] * 2


def test_the_strategys_argument_is_the_callback():
    """The same statistics to the bit, fit after fit; afterwards the trainer has its own callbacks."""

    def train(own, *callbacks):
        seed()
        trainer = quiet_trainer(
            strategy=EASGDStrategy(tau=2, recalibrate_batchnorm=own), devices=2, callbacks=list(callbacks)
        )
        before, buffers = list(trainer.callbacks), []
        for _ in range(2):
            module = Noisy(batches=7)
            trainer.fit(module)
            buffers.append(arrays(module.buffers()))
        assert trainer.callbacks == before
        return [[each.tobytes() for each in fit] for fit in buffers]

    def both():
        return train(3), train(0, RecalibrateBatchNorm(batches=3)), train(0)

    for by_argument, by_callback, without in run_ranks(both, 2):
        assert by_argument == by_callback
        assert by_argument != without


def test_every_checkpoint_has_them(tmp_path):
    def train():
        savers = [
            ModelCheckpoint(tmp_path, filename="light", every_n_train_steps=3, save_weights_only=True),
            ModelCheckpoint(tmp_path, filename="full", save_on_train_epoch_end=True),
        ]
        watch = Watch()
        recalibrate = RecalibrateBatchNorm(batches=2)
        module = fitted(
            partial(Noisy, batches=5),
            "sync",
            recalibrate,
            watch,
            *savers,
            enable_checkpointing=True,
            val_check_interval=1.0,
        )
        return watch.batches, module.net.state_dict(), watch.shown[-1]

    (ours, final, shown), (theirs, *_) = run_ranks(train, 2)
    for name, end in (("light", 3), ("full", 5)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        state = {key.removeprefix("net."): value for key, value in saved.items()}
        mean, var = updated(state, ours[end - 2 : end] + theirs[end - 2 : end])
        torch.testing.assert_close(state["1.running_mean"], mean)
        torch.testing.assert_close(state["1.running_var"], var)
    # The same center and the same batches: the same bits at the validation, in the checkpoint and after fit.
    assert all(torch.equal(state[key], final[key]) and torch.equal(shown[key], final[key]) for key in final)


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_goes_on_has_those_of_its_checkpoint_until_there_is_a_batch(mode, tmp_path):
    """The workers' mean is another model: a job that goes on from its last batch, and tests, would score that one."""

    def train():
        def run(ckpt_path=None):
            watch = Watch()
            saver = ModelCheckpoint(tmp_path / str(ckpt_path is None), every_n_train_steps=5, filename="last")
            seed()
            module = Noisy(batches=5)
            trainer = quiet_trainer(
                strategy=strategy(mode, recalibrate_batchnorm=2),
                callbacks=[watch, saver],
                devices=2,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
                enable_checkpointing=True,
            )
            trainer.fit(module, ckpt_path=ckpt_path)
            return module.net.state_dict(), len(watch.batches)

        (whole, _), (again, batches) = run(), run(tmp_path / "True" / "last.ckpt")
        return batches, [name for name in whole if not torch.equal(whole[name], again[name])]

    assert run_ranks(train, 2) == [(0, [])] * 2


def test_layers_that_do_not_train_or_are_not_reached_keep_the_mean_of_the_workers():
    class Partly(Noisy):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.frozen = nn.BatchNorm1d(4)
            self.spare = nn.BatchNorm1d(4)

        def on_train_batch_start(self, *_):
            self.frozen.eval()

        def training_step(self, batch, index):
            if index == 0:
                self.spare(batch)
            return self.loss(self.frozen(batch))

    def train(*callbacks):
        return {name: value.clone() for name, value in fitted(Partly, "sync", *callbacks).named_buffers()}

    def both():
        return train(), train(RecalibrateBatchNorm(batches=2))

    for without, recalibrated in run_ranks(both, 2):
        same = {name for name in without if torch.equal(without[name], recalibrated[name])}
        assert same == {name for name in without if name.startswith(("frozen", "spare"))}
        assert without["spare.num_batches_tracked"] == 1


def test_without_a_center_there_is_nothing_to_do():
    callbacks = [RecalibrateBatchNorm(batches=3)]
    trainer = quiet_trainer(strategy=SingleDeviceStrategy("cpu"), callbacks=callbacks, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"RecalibrateBatchNorm\(batches=3\): SingleDeviceStrategy has no center"):
        trainer.fit(Regression())


def test_manual_optimization_needs_a_forward_pass():
    class Manual(Regression):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def train():
        with pytest.raises(TypeError, match=r"RecalibrateBatchNorm\(forward=None\) with manual optimization"):
            fitted(Manual, "sync", RecalibrateBatchNorm(batches=2), devices=1)
        given = RecalibrateBatchNorm(2, forward=lambda module, batch: module.net(batch))
        return fitted(Manual, "sync", given, devices=1).net[1].num_batches_tracked.item()

    assert run_ranks(train, 1, timeout=60) == [2]


def test_bad_number():
    with pytest.raises(ValueError, match=r"RecalibrateBatchNorm\(batches=-1\)"):
        RecalibrateBatchNorm(batches=-1)


def test_hydra_option(tmp_path):
    overrides = ("callbacks.recalibrate_batchnorm.batches=7", "callbacks.curvature_monitor.every_n_steps=9")
    config = composed(tmp_path, *overrides)
    callbacks = {type(callback).__name__: callback for callback in build_trainer(config).callbacks}
    assert callbacks["RecalibrateBatchNorm"].batches == 7
    assert callbacks["CurvatureMonitor"].every_n_steps == 9
