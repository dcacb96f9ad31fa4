"""Each mistake gives one sentence that names the argument and the remedy, before any process starts."""

from datetime import timedelta

import lightning as L
import pytest
import torch
from ranks import end_ranks
from toys import Quadratic, fitted, quiet_trainer

from lightning_easgd import EASGDStrategy, LocalStrategy

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tau": 0}, ValueError, r"EASGDStrategy\(tau=0\): .* at least 1"),
        ({"tau": -3}, ValueError, r"EASGDStrategy\(tau=-3\)"),
        ({"tau": 2.0}, TypeError, r"EASGDStrategy\(tau=2.0\): .* give an int"),
        ({"tau": True}, TypeError, r"EASGDStrategy\(tau=True\)"),
        ({"tau": "10"}, TypeError, r"EASGDStrategy\(tau='10'\)"),
        ({"alpha": 0.1, "rho": 1.0}, ValueError, r"EASGDStrategy\(alpha=0.1, rho=1.0\): .*; give alpha"),
        ({"alpha": -1.0}, ValueError, r"EASGDStrategy\(alpha=-1.0\): .* \(-1, 1\]"),
        ({"alpha": 1.5}, ValueError, r"EASGDStrategy\(alpha=1.5\)"),
        ({"beta": 0.0}, ValueError, r"EASGDStrategy\(beta=0.0\): .* \(0, 2\)"),
        ({"beta": 2.0}, ValueError, r"EASGDStrategy\(beta=2.0\)"),
        ({"mode": "asink"}, ValueError, r"EASGDStrategy\(mode='asink'\): unknown mode; use "),
        ({"evaluate": "both"}, ValueError, r"EASGDStrategy\(evaluate='both'\): .* 'center' or 'worker'"),
        ({"momentum": 0.0}, ValueError, r"EASGDStrategy\(momentum=0.0\): .* \(0, 1\)"),
        ({"momentum": 1.0}, ValueError, r"EASGDStrategy\(momentum=1.0\)"),
        ({"timeout": 30}, TypeError, r"EASGDStrategy\(timeout=30\): .*timedelta\(seconds=30\)"),
        ({"timeout": timedelta(0)}, ValueError, r"EASGDStrategy\(timeout=0:00:00\): .* positive"),
        ({"ddp_comm_hook": print}, TypeError, r"EASGDStrategy\(ddp_comm_hook=.*\): .*; remove it"),
        ({"ddp_comm_state": 1}, TypeError, r"EASGDStrategy\(ddp_comm_state=1\)"),
        ({"ddp_comm_wrapper": print}, TypeError, r"EASGDStrategy\(ddp_comm_wrapper="),
        ({"model_averaging_period": 4}, TypeError, r"EASGDStrategy\(model_averaging_period=4\)"),
        ({"taw": 4}, TypeError, r"EASGDStrategy\(taw=4\): unknown argument; did you mean tau\?"),
    ],
)
def test_strategy_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EASGDStrategy(**arguments)


@pytest.mark.parametrize(
    "name", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers"]
)
def test_arguments_of_the_ddp_wrapper_warn(name):
    with pytest.warns(UserWarning, match=rf"EASGDStrategy\({name}=True\) has no effect"):
        EASGDStrategy(**{name: True})


def test_first_arguments_are_ddps_and_the_rest_have_names():
    strategy = EASGDStrategy(None, [torch.device("cpu")] * 2)
    assert strategy.parallel_devices == [torch.device("cpu")] * 2
    with pytest.raises(TypeError):
        EASGDStrategy(None, None, None, None, None, 10)


@pytest.mark.parametrize("strategy", [EASGDStrategy, LocalStrategy])
def test_mps(strategy):
    with pytest.raises(ValueError, match=rf"{strategy.__name__}\(parallel_devices=\[mps"):
        quiet_trainer(strategy=strategy(parallel_devices=[torch.device("mps", 0)]), accelerator="auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.6}, r"EASGDStrategy\(alpha=0.6, beta=1.8\) with 3 workers is unstable: .* 2/\(p\+1\) = 0.5"),
        ({"alpha": -0.2}, r"EASGDStrategy\(alpha=-0.2\)"),
        ({"alpha": 0.9, "beta": 1.5}, "unstable"),
    ],
)
def test_unstable_rates_warn_when_the_trainer_is_made(arguments, message):
    with pytest.warns(UserWarning, match=message):
        quiet_trainer(strategy=EASGDStrategy(**arguments), devices=3)


@pytest.mark.parametrize("name", ["easgd", "eamsgd"])
@pytest.mark.parametrize(
    ("suffix", "start_method"), [("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")]
)
def test_names(name, suffix, start_method):
    strategy = quiet_trainer(strategy=name + suffix, devices=2).strategy
    assert type(strategy) is EASGDStrategy
    assert strategy._start_method == start_method
    assert strategy.momentum == (0.9 if name == "eamsgd" else None)


@pytest.mark.parametrize("name", ["easgd_async", "downpour"])
def test_names_of_what_does_not_exist_are_not_registered(name):
    with pytest.raises(ValueError, match="invalid strategy name"):
        L.Trainer(strategy=name, accelerator="cpu", devices=2)


def test_momentum_needs_sgd():
    def train():
        module = Quadratic()
        module.configure_optimizers = lambda: torch.optim.Adam(module.parameters())
        fitted(module, EASGDStrategy(momentum=0.9), 2)

    for outcome in end_ranks(train, 2):
        assert outcome.exitcode == 1
        assert "TypeError: EASGDStrategy(momentum=0.9): EAMSGD is defined for SGD, but the optimizer is Adam. Use" in (
            outcome.error
        )


def test_momentum_needs_no_dampening():
    def train():
        fitted(Quadratic(momentum=0.5, dampening=0.1), EASGDStrategy(momentum=0.9), 2)

    for outcome in end_ranks(train, 2):
        assert "ValueError: EASGDStrategy(momentum=0.9): SGD(dampening=0.1)" in outcome.error


@pytest.mark.filterwarnings("ignore:`torch.jit..* is deprecated:DeprecationWarning")
def test_optimizers_that_shard_their_state():
    def train():
        from torch.distributed.optim import ZeroRedundancyOptimizer

        module = Quadratic()
        module.configure_optimizers = lambda: ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, lr=0.1)
        fitted(module, EASGDStrategy(), 2)

    for outcome in end_ranks(train, 2):
        assert "EASGDStrategy: ZeroRedundancyOptimizer shards its state" in outcome.error


def test_sync_batchnorm_warns():
    def train():
        with pytest.warns(UserWarning, match=r"sync_batchnorm=True.*lock-step"):
            fitted(Quadratic(), EASGDStrategy(), 1, sync_batchnorm=True)

    (outcome,) = end_ranks(train, 1)
    assert outcome.exitcode == 0, outcome.error
