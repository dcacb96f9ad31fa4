"""Rates that follow the learning rate: unstable ones warn where they are first known, once, with the right limit."""

import copy
import pickle
import warnings

import lightning.fabric
import pytest
import torch
from ranks import run_ranks
from torch import nn
from toys import Quadratic, fitted, quiet_trainer

import lightning_easgd.fabric
from lightning_easgd import EASGDStrategy
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.schedules import LinearSchedule

pytestmark = pytest.mark.timeout(120)


def sgd(*lrs: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=0.1)


def warned(function) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in caught if "unstable" in str(each.message)]


@pytest.mark.parametrize(
    ("given", "lrs", "says"),
    [
        ({"rho": 50}, [0.1], r"EASGDStrategy(rho=50) with lr=0.1 and 4 workers is unstable: alpha = lr * rho = 5 and"),
        ({"rho": 50}, [0.1], "At this learning rate take rho <= 4,"),
        ({"rho": 50, "in_turn": True}, [0.1], "At this learning rate take rho <= 10,"),
        ({"rho": 50}, [0.001, 0.1, 0.002], "with lr=0.1"),
        ({"rho": 12, "beta": 0.9}, [0.1], "take rho <= 11,"),
        ({"rho": LinearSchedule(1, 50, 9)}, [0.1], "the largest of LinearSchedule(start=1, end=50, steps=9),"),
        ({"rho": 4}, [0.1], None),
        ({"rho": 4.1}, [0.1], "unstable"),
        ({"rho": 10, "in_turn": True}, [0.1], None),
        ({"rho": 11, "beta": 0.9}, [0.1], None),
        ({"alpha": 0.9}, [0.1], None),  # judged when the Trainer is made
        ({"rho": 50}, [0.0], None),
    ],
)
def test_optimizers_are_judged(given, lrs, says):
    rates = MovingRates(**given)
    found = warned(lambda: [rates.warn_of(sgd(*lrs), 4) for _ in range(2)])
    assert len(found) == (says is not None)
    assert says is None or says in found[0]


def test_a_learning_rate_that_rises_warns_once_at_the_first_unstable_exchange():
    rates, optimizer = MovingRates(rho=4), sgd(0.0)
    found = []

    def warm_up():
        rates.warn_of(optimizer, 4)
        for clock in range(10):
            optimizer.param_groups[0]["lr"] = 0.02 * clock
            rates.of_groups(optimizer, 4, clock)

    found = warned(warm_up)
    assert len(found) == 1
    assert "at t=6 with lr=0.12" in found[0]


def test_a_penalty_that_rises_with_a_schedule_of_its_own():
    rates, optimizer = MovingRates(rho=LinearSchedule(0.1, 100, 10)), sgd(0.001)
    rising = [0.001, 0.001, 0.1]

    def train():
        for clock, lr in enumerate(rising):
            optimizer.param_groups[0]["lr"] = lr
            rates.of_groups(optimizer, 4, clock)

    assert ["at t=2" in each for each in warned(train)] == [True]


def test_rates_stay_values():
    rates = MovingRates(rho=50)
    assert len(warned(lambda: rates.warn_of(sgd(0.1), 4))) == 1
    assert rates == MovingRates(rho=50) == pickle.loads(pickle.dumps(rates)) == copy.deepcopy(rates)
    assert hash(rates) == hash(MovingRates(rho=50))


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_trainer_warns_before_the_first_step(mode):
    def train():
        strategy = EASGDStrategy(tau=100, rho=50, mode=mode)
        return warned(lambda: fitted(Quadratic(record=False), strategy, 2))

    first, second = run_ranks(train, 2)
    assert len(first) == 1
    assert "EASGDStrategy(rho=50) with lr=0.1 and 2 workers is unstable" in first[0]
    assert not second


def test_a_trainer_warns_when_warm_up_gets_there():
    class WarmUp(Quadratic):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 4)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train():
        module = WarmUp(record=False, steps=8)
        return warned(lambda: fitted(module, EASGDStrategy(tau=2, rho=9), 2))

    first, _ = run_ranks(train, 2)
    assert len(first) == 1
    assert "at t=4" in first[0]  # lr 0.1; at t=2 it is 0.05, so that alpha = 0.45 < 2/3


def test_fabric_warns_at_setup():
    def train():
        fabric = lightning.fabric.Fabric(
            accelerator="cpu", devices=2, strategy=lightning_easgd.fabric.EASGDStrategy(rho=50)
        )
        fabric.launch()
        module = nn.Linear(1, 1)
        return warned(lambda: fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1)))

    first, _ = run_ranks(train, 2)
    assert len(first) == 1


def test_served_workers_are_judged_by_their_own_limit():
    quiet_trainer(strategy=EASGDStrategy(alpha=0.6, mode="async"), devices=3)  # no warning, which would be an error
    with pytest.warns(UserWarning, match="unstable"):
        quiet_trainer(strategy=EASGDStrategy(alpha=0.6), devices=3)
