"""What the process that only spawns or forks the ranks reads of them is theirs, or an error: never a zero."""

import multiprocessing
import sys

import lightning.fabric
import pytest
import torch
from preloaded import python
from ranks import run_ranks
from test_trees import Quadratic as OtherQuadratic
from test_trees import other_trainer
from toys import Quadratic, quiet_trainer

import lightning_easgd
import lightning_easgd.fabric
import lightning_easgd.pl
from lightning_easgd.lab.baselines.post_local_sgd import PostLocalSGDStrategy

pytestmark = [pytest.mark.timeout(120), pytest.mark.processes]


class Failing(Quadratic):
    def on_train_epoch_end(self) -> None:
        raise ValueError("in the ranks")


def quadratic(cls=Quadratic, **arguments):
    return cls(record=False, **arguments)


STRATEGIES = {
    "sync": lambda **given: lightning_easgd.EASGDStrategy(tau=2, **given),
    "async": lambda **given: lightning_easgd.EASGDStrategy(tau=2, mode="async", **given),
    "downpour": lambda **given: lightning_easgd.DownpourStrategy(tau=2, **given),
}


@pytest.fixture(autouse=True)
def _spawned_ranks_import_the_tests_alone():
    multiprocessing.set_executable(python())
    yield
    multiprocessing.set_executable(sys.executable)


# Every strategy, and every start method with a center among the ranks and with a served one.
@pytest.mark.parametrize(
    ("strategy", "method"),
    [("sync", "fork"), ("async", "fork"), ("downpour", "fork"), ("sync", "spawn"), ("async", "spawn")],
)
def test_the_figures_of_rank_zero(strategy, method):
    trainer = quiet_trainer(strategy=STRATEGIES[strategy](start_method=method), devices=2)
    with pytest.raises(RuntimeError, match=r"Strategy\.communication: .* only spawns or forks"):
        _ = trainer.strategy.communication
    trainer.fit(quadratic())
    communication = trainer.strategy.communication
    assert communication.exchanges >= 2
    assert communication.bytes_sent > 0
    with pytest.raises(RuntimeError, match=r"Strategy\.elastic_distance\(\): there is no worker"):
        trainer.strategy.elastic_distance()


def test_the_other_tree():
    trainer = other_trainer(strategy=lightning_easgd.pl.EASGDStrategy(tau=2, start_method="fork"), devices=2)
    module = OtherQuadratic()
    module.on_train_batch_end = lambda *_: None
    trainer.fit(module)
    assert trainer.strategy.communication.exchanges == 2


@pytest.mark.filterwarnings("ignore")
def test_a_fit_that_failed_has_none():
    trainer = quiet_trainer(strategy="easgd_fork", devices=2)
    with pytest.raises(Exception, match="in the ranks"):
        trainer.fit(quadratic(Failing))
    with pytest.raises(RuntimeError, match="only spawns or forks"):
        _ = trainer.strategy.communication


def test_ranks_read_their_own():
    def train():
        trainer = quiet_trainer(strategy="easgd", devices=2)
        before = trainer.strategy.communication.exchanges
        trainer.fit(quadratic(steps=12))
        return before, trainer.strategy.communication.exchanges

    assert run_ranks(train, 2) == [(0, 1)] * 2


def fabric_training(fabric):
    module = torch.nn.Linear(1, 1)
    module, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    for _ in range(3):
        fabric.backward(module(torch.ones(1)).sum())
        optimizer.step()
    fabric.strategy.finalize()
    return fabric.strategy.communication.exchanges


def test_fabric():
    strategy = lightning_easgd.fabric.EASGDStrategy(tau=1, start_method="fork")
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    assert fabric.launch(fabric_training) == 2
    with pytest.raises(RuntimeError, match="with Fabric return it from the launched function"):
        _ = strategy.communication


def test_post_local_sgd():
    trainer = quiet_trainer(strategy=PostLocalSGDStrategy(tau=1, start_method="fork"), devices=2)
    with pytest.raises(RuntimeError, match=r"PostLocalSGDStrategy\.communication"):
        _ = trainer.strategy.communication
