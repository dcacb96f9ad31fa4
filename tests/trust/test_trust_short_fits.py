"""A fit that ends before its first exchange has trained all the same: the workers' mean is what is left of it."""

import warnings
from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader
from toys import quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*before the first exchange"),
]
TIMEOUT = timedelta(seconds=20)
STRATEGIES = {
    "sync": lambda tau=10: EASGDStrategy(tau=tau, timeout=TIMEOUT),
    "gloo": lambda tau=10: EASGDStrategy(tau=tau, timeout=TIMEOUT, process_group_backend="gloo"),
    "eamsgd": lambda tau=10: EASGDStrategy(tau=tau, momentum=0.9, timeout=TIMEOUT),
    "async": lambda tau=10: EASGDStrategy(tau=tau, mode="async", timeout=TIMEOUT),
    "downpour": lambda tau=10: DownpourStrategy(tau=tau, timeout=TIMEOUT),
}


class Net(L.LightningModule):
    def __init__(self, batches=10):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.batches = batches
        self.seen, self.own = [], None

    def training_step(self, batch, index):
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def on_train_batch_end(self, *_):
        self.own = self.net[0].weight.detach().clone()

    def on_validation_epoch_start(self):
        self.seen.append(self.net[0].weight.detach().clone())

    def validation_step(self, batch, index):
        self.log("loss", (self.net(batch) - batch.sum(1, keepdim=True)).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.trainer.global_rank)
        return DataLoader(torch.randn(self.batches * 8, 4, generator=generator), batch_size=8)

    def val_dataloader(self):
        return DataLoader(torch.ones(4, 4), batch_size=2)


def fit(module, strategy, folder=None, ckpt_path=None, **options):
    saver = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1)] if folder else []
    trainer = quiet_trainer(
        strategy=strategy, devices=2, use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=saver, enable_checkpointing=bool(saver), **options,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=ckpt_path)
    return [str(each.message) for each in caught if "before the first exchange" in str(each.message)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_module_checkpoint_and_last_validation_hold_the_workers_mean(name, tmp_path):
    """One epoch of ten batches: the usual smoke test."""

    def train():
        module = Net()
        told = fit(module, STRATEGIES[name](), tmp_path)
        return module.own, module.seen[-1], module.net[0].weight.detach(), told, module.trainer.strategy.center

    def plain():
        own, seen, final, told, center = train()
        return own, seen, final, told, center["net.0.weight"]

    (own, seen, final, told, center), (own2, seen2, final2, told2, _) = run_ranks(plain, 2)
    assert not own.equal(own2)
    mean = (own + own2) / 2
    assert torch.allclose(final, mean)
    assert final.equal(final2)
    assert seen.equal(final)
    assert seen2.equal(final)
    assert center.equal(final)
    assert len(told) == 1
    assert "mean of their weights" in told[0]
    assert told2 == []  # rank 0 says it
    (file,) = tmp_path.glob("*.ckpt")
    assert torch.load(file, weights_only=True)["state_dict"]["net.0.weight"].equal(final)


@pytest.mark.parametrize("name", ["sync", "async"])
def test_after_an_exchange_the_center_is_the_model(name):
    def train():
        module = Net(batches=7)
        told = fit(module, STRATEGIES[name](5), limit_val_batches=0)
        return module.own, module.net[0].weight.detach(), told

    (own, final, told), (own2, *_) = run_ranks(train, 2)
    assert told == []
    assert not torch.allclose(final, (own + own2) / 2)


@pytest.mark.parametrize("name", ["sync", "gloo", "eamsgd"])
def test_the_center_of_a_resumed_run_is_where_it_was(name, tmp_path):
    """A checkpoint of before the first exchange shows the mean, and keeps the center."""

    def train(first, second):
        module = Net(batches=8)
        fit(module, STRATEGIES[name](), tmp_path if first else None, max_epochs=first or 2)
        if not first:
            return module.own, module.net[0].weight.detach()
        (file,) = tmp_path.glob("*.ckpt")
        resumed = Net(batches=8)
        fit(resumed, STRATEGIES[name](), ckpt_path=file, max_epochs=second)
        return resumed.own, resumed.net[0].weight.detach()

    for whole, resumed in zip(run_ranks(train, 2, 0, 0), run_ranks(train, 2, 1, 2), strict=True):
        assert all(a.equal(b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("name", ["sync", "async"])
def test_a_resumed_run_without_a_new_exchange_keeps_the_center(name, tmp_path):
    """It has exchanged before: its center holds what it learnt then."""

    def train():
        module = Net(batches=8)
        fit(module, STRATEGIES[name](3), tmp_path)
        center = module.net[0].weight.detach().clone()
        (file,) = tmp_path.glob("*.ckpt")
        resumed = Net(batches=8)
        fit(resumed, STRATEGIES[name](100), ckpt_path=file, max_epochs=2)
        return center, resumed.net[0].weight.detach()

    for center, final in run_ranks(train, 2):
        assert center.equal(final)


def test_fast_dev_run_gives_the_mean_and_no_warning():
    def train():
        module = Net()
        told = fit(module, STRATEGIES["sync"](), fast_dev_run=True)
        return module.own, module.net[0].weight.detach(), told

    (own, final, told), (own2, final2, _) = run_ranks(train, 2)
    assert torch.allclose(final, (own + own2) / 2)
    assert final.equal(final2)
    assert told == []


def test_a_short_training_under_fabric(tmp_path):
    def train():
        torch.manual_seed(0)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=10, timeout=TIMEOUT))
        fabric.launch()
        module = nn.Linear(4, 1)
        module, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.05))
        for batch in torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(fabric.global_rank)):
            optimizer.zero_grad()
            fabric.backward((module(batch) - 1).square().mean())
            optimizer.step()
        own = module.weight.detach().clone()
        fabric.save(tmp_path / "state.ckpt", {"module": module, "optimizer": optimizer})
        fabric.strategy.finalize()
        return own, module.weight.detach(), fabric.strategy.center["weight"]

    (own, final, center), (own2, final2, _) = run_ranks(train, 2)
    assert torch.allclose(final, (own + own2) / 2)
    assert final.equal(final2)
    assert center.equal(final)
    assert torch.load(tmp_path / "state.ckpt", weights_only=True)["module"]["weight"].equal(final)


@pytest.mark.parametrize("name", ["sync", "async"])
def test_of_two_optimizers_one_has_not_exchanged(name):
    """It makes fewer steps than τ: what it trains is the workers' mean, what the other trains the center."""

    class Rare(Net):
        automatic_optimization = False

        def training_step(self, batch, index):
            often, rare = self.optimizers()
            loss = super().training_step(batch, index)
            often.zero_grad(), rare.zero_grad()
            self.manual_backward(loss)
            often.step()
            if index % 5 == 0:
                rare.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[layer].parameters(), lr=0.05) for layer in (2, 0)]

    def train():
        module = Rare(batches=24)
        told = fit(module, STRATEGIES[name](10), limit_val_batches=0)
        return module.own, module.net[0].weight.detach(), told

    (own, final, told), (own2, final2, _) = run_ranks(train, 2)
    assert torch.allclose(final, (own + own2) / 2)
    assert final.equal(final2)
    assert len(told) == 1
