"""The simulator against real runs of several processes: the same numbers where data and order are the same."""

import lightning as L
import pytest
import torch
from ranks import run_ranks
from torch import nn
from toys import fitted

from lightning_easgd import EASGDStrategy
from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.simulation import (
    Cluster,
    LocalSGD,
    RoundRobinSchedule,
    SynchronousSchedule,
    simulate,
)
from lightning_easgd.lab.simulation.digits import digits_network, digits_problem
from lightning_easgd.method.rates import MovingRates

pytestmark = pytest.mark.timeout(120)
BATCH, EPOCHS, STEPS = 100, 2, 26


class Digits(L.LightningModule):
    """The simulator's network, trained as users train."""

    def __init__(self, momentum):
        super().__init__()
        self.network = digits_network(seed=5)
        self.momentum = momentum

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum, nesterov=self.momentum > 0)

    def train_dataloader(self):
        data = DigitsDataModule(BATCH, seed=3)
        data.trainer = self.trainer
        data.setup("fit")
        return data.train_dataloader()


class LastPosition(L.Callback):
    """The worker's x at the end."""

    def on_train_end(self, trainer, module):
        with trainer.strategy.worker_weights():
            self.x = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        if module.momentum:
            state = trainer.optimizers[0].state
            buffers = [state[parameter]["momentum_buffer"].flatten() for parameter in module.parameters()]
            self.x += 0.1 * module.momentum * torch.cat(buffers)


@pytest.mark.parametrize(
    ("workers", "momentum", "schedule", "strategy"),
    [
        (3, 0.0, SynchronousSchedule(3), {"mode": "sync"}),
        (2, 0.9, SynchronousSchedule(3), {"mode": "sync"}),
        (2, 0.9, RoundRobinSchedule(3), {"mode": "async", "order": "round_robin"}),
    ],
    ids=["sync", "sync_momentum", "round_robin_momentum"],
)
def test_the_same_numbers_as_the_trainer(workers, momentum, schedule, strategy):
    """26 steps of digits in two epochs, the last batch of each smaller than the others."""

    def train():
        last = LastPosition()
        easgd = EASGDStrategy(tau=3, beta=0.6, momentum=momentum or None, **strategy)
        module = fitted(Digits(momentum), easgd, workers, max_epochs=EPOCHS, callbacks=[last])
        assert module.trainer.global_step == STEPS
        return last.x.numpy(), nn.utils.parameters_to_vector(module.parameters()).detach().numpy()

    results = run_ranks(train, workers)
    problem = digits_problem(digits_network(seed=5), batch_size=BATCH, seed=3)
    run = simulate(problem, schedule, Cluster(workers), LocalSGD(0.1, momentum), MovingRates(beta=0.6), steps=STEPS)
    assert run.learner.center.numpy() == pytest.approx(results[0][1], abs=2e-5)
    for simulated, (real, _) in zip(run.learner.positions().numpy(), results, strict=True):
        assert simulated == pytest.approx(real, abs=2e-5)
    moved = (run.learner.center - problem.start()).abs().max()
    assert moved > 0.02
