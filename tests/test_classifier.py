"""The classifier logs what it says, learns, and leaves training free of collectives."""

import functools

import pytest
import torch
from application import quiet_trainer, tiny_classifier
from torch.optim.lr_scheduler import StepLR

from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.models import Classifier, DigitsNet

pytestmark = pytest.mark.timeout(60)


def test_it_logs_loss_and_accuracy_of_each_stage():
    trainer = quiet_trainer(max_epochs=1)
    model, data = tiny_classifier(), DigitsDataModule()
    trainer.fit(model, datamodule=data)
    assert set(trainer.callback_metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert set(metrics) == {"test/loss", "test/accuracy"}


def test_test_metrics_are_those_of_all_samples():
    model, data = tiny_classifier(), DigitsDataModule(batch_size=300)  # batches of 300 and 59
    (metrics,) = quiet_trainer().test(model, datamodule=data, verbose=False)
    images, labels = data._splits["test"].tensors
    with torch.no_grad():
        logits = model(images)
    assert metrics["test/loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_training_metrics_stay_on_their_rank():
    assert tiny_classifier().train_accuracy.sync_on_compute is False


@pytest.mark.parametrize(("interval", "times"), [("epoch", 2), ("step", 6)])
def test_scheduler_is_stepped_at_its_interval(interval, times):
    model = tiny_classifier(scheduler=functools.partial(StepLR, step_size=1, gamma=0.5), scheduler_interval=interval)
    trainer = quiet_trainer(max_epochs=2, limit_train_batches=3, limit_val_batches=0)
    trainer.fit(model, datamodule=DigitsDataModule())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**times)


def test_digits_net_reaches_97_percent_in_seconds():
    torch.manual_seed(0)
    model = Classifier(DigitsNet(), functools.partial(torch.optim.AdamW, lr=2e-3))
    trainer = quiet_trainer(max_epochs=15, limit_val_batches=0)
    data = DigitsDataModule()
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    assert metrics["test/accuracy"] >= 0.97


def test_digits_net_has_the_asked_number_of_outputs():
    assert DigitsNet(width=2, hidden=4, num_classes=3)(torch.zeros(5, 1, 8, 8)).shape == (5, 3)
