"""Each mistake gives one sentence that names the argument and the remedy, before any process starts."""

import os
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.plugins.environments import KubeflowEnvironment
from ranks import end_ranks, run_ranks
from toys import Quadratic, Regression, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDModelParallelStrategy, EASGDStrategy, LocalStrategy

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
        ({"order": "random", "mode": "async"}, ValueError, r"EASGDStrategy\(order='random'\): unknown order; use "),
        ({"order": ["free"]}, ValueError, r"EASGDStrategy\(order=\['free'\]\): unknown order; use "),
        ({"on_worker_loss": {}}, ValueError, r"EASGDStrategy\(on_worker_loss={}\): unknown; use "),
        (
            {"order": "round_robin"},
            ValueError,
            r"EASGDStrategy\(order='round_robin', mode='sync'\): .*use mode='async'",
        ),
        ({"on_worker_loss": "cry", "mode": "async"}, ValueError, r"EASGDStrategy\(on_worker_loss='cry'\)"),
        ({"on_worker_loss": "continue"}, ValueError, r"EASGDStrategy\(on_worker_loss='continue', mode='sync'\)"),
        ({"wire_dtype": "float16"}, ValueError, r"EASGDStrategy\(wire_dtype='float16'\): .* use 'bfloat16' or 'int8'"),
        ({"center_device": "cuda"}, ValueError, r"EASGDStrategy\(center_device='cuda'\): .* use 'cpu'"),
        ({"center_device": "cpu", "mode": "async"}, ValueError, r"mode='async'\): a served center is in host memory"),
        ({"evaluate": "both"}, ValueError, r"EASGDStrategy\(evaluate='both'\): .* 'center' or 'worker'"),
        ({"recalibrate_batchnorm": -1}, ValueError, r"EASGDStrategy\(recalibrate_batchnorm=-1\): .* or 0"),
        ({"recalibrate_batchnorm": True}, TypeError, r"EASGDStrategy\(recalibrate_batchnorm=True\): .* an int"),
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
    ("arguments", "error", "message"),
    [
        ({"tau": 0}, ValueError, r"DownpourStrategy\(tau=0\): .* at least 1"),
        ({"tau": 1.5}, TypeError, r"DownpourStrategy\(tau=1.5\)"),
        ({"momentum": 1.0}, ValueError, r"DownpourStrategy\(momentum=1.0\)"),
        ({"momentum": 0.9, "tau": 4}, ValueError, r"DownpourStrategy\(momentum=0.9, tau=4\): .* set tau=1"),
        ({"average": "mean"}, ValueError, r"DownpourStrategy\(average='mean'\): unknown average; use "),
        ({"average": 0.0}, ValueError, r"DownpourStrategy\(average=0.0\)"),
        ({"average": True}, ValueError, r"DownpourStrategy\(average=True\)"),
        ({"evaluate": "both"}, ValueError, r"DownpourStrategy\(evaluate='both'\)"),
        ({"order": "any"}, ValueError, r"DownpourStrategy\(order='any'\)"),
        ({"alpha": 0.1}, TypeError, r"DownpourStrategy\(alpha=0.1\): unknown argument"),
    ],
)
def test_downpour_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DownpourStrategy(**arguments)


@pytest.mark.parametrize("strategy", [EASGDStrategy(mode="async"), DownpourStrategy()])
def test_sync_batchnorm_with_a_served_center(strategy):
    with pytest.raises(ValueError, match=rf"{type(strategy).__name__} with Trainer\(sync_batchnorm=True\)"):
        quiet_trainer(strategy=strategy, devices=2, sync_batchnorm=True)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5)])
def test_momentum_at_the_center_needs_plain_sgd(optimizer):
    def train():
        module = Quadratic()
        module.configure_optimizers = lambda: optimizer(module.parameters())
        fitted(module, DownpourStrategy(momentum=0.9), 2)

    for outcome in end_ranks(train, 2):
        assert "TypeError: DownpourStrategy(momentum=0.9): the center has the momentum" in outcome.error


@pytest.mark.parametrize("name", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
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


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("easgd", {"mode": "sync", "momentum": None}),
        ("easgd_async", {"mode": "async", "momentum": None}),
        ("eamsgd", {"mode": "sync", "momentum": 0.9}),
        ("eamsgd_async", {"mode": "async", "momentum": 0.9}),
        ("downpour", {"tau": 1, "momentum": None}),
        ("mdownpour", {"tau": 1, "momentum": 0.9}),
    ],
)
@pytest.mark.parametrize(
    ("suffix", "start_method"), [("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork")]
)
def test_names(name, attributes, suffix, start_method):
    strategy = quiet_trainer(strategy=name + suffix, devices=2).strategy
    assert type(strategy) is (DownpourStrategy if "downpour" in name else EASGDStrategy)
    assert strategy._start_method == start_method
    assert {attribute: getattr(strategy, attribute) for attribute in attributes} == attributes


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


@pytest.mark.parametrize(
    ("strategy", "ranks", "nodes"),
    [(EASGDStrategy(mode="async"), 1, 2), (EASGDStrategy(mode="async"), 2, 1), (EASGDModelParallelStrategy(), 3, 2)],
)
def test_another_number_of_ranks_than_the_cluster_has_started(strategy, ranks, nodes):
    """Kind: α is β over the workers that the Trainer counts on; only torchrun and SLURM compare them with the ranks."""

    def train():
        given = {"plugins": [KubeflowEnvironment()], "num_nodes": nodes, "use_distributed_sampler": False}
        quiet_trainer(strategy=strategy, devices=1, **given).fit(Quadratic(record=False))

    for outcome in end_ranks(train, ranks):
        assert outcome.exitcode == 1
        name = type(strategy).__name__
        assert f"{name}: the cluster environment has started {ranks} rank" in outcome.error
        assert f"devices=1 and num_nodes={nodes} make {nodes}; give numbers" in outcome.error


def test_pruning_warns():
    def train():
        pruning = ModelPruning("l1_unstructured", amount=0.5)
        if os.environ["RANK"] == "0":
            warned = pytest.warns(UserWarning, match="EASGDStrategy with ModelPruning.*not sparse.*after fit")
        else:
            warned = nullcontext()
        with warned:
            fitted(Regression(), EASGDStrategy(tau=3), 2, callbacks=[pruning], max_epochs=2)

    run_ranks(train, 2)


def test_sync_batchnorm_warns():
    def train():
        with pytest.warns(UserWarning, match=r"sync_batchnorm=True.*lock-step"):
            fitted(Quadratic(), EASGDStrategy(), 1, sync_batchnorm=True)

    (outcome,) = end_ranks(train, 1)
    assert outcome.exitcode == 0, outcome.error
