"""Synchronous workers of which each is a node of its own: they exchange over direct connections."""

import os
import signal
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from ranks import end_ranks, run_ranks
from reference import synchronous_trace
from test_collectives import Count
from test_faults import At, Terminate, fail
from test_outer_family import FAMILY, check, reference_of
from toys import Quadratic, Regression, quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.transport.mesh import Mesh

pytestmark = pytest.mark.timeout(120)


def fit_on_nodes(module, strategy, per_node=1, checkpoint=None, **trainer):
    """Fit in a process that :func:`ranks.run_ranks` made, as one that torchrun has started on one of several nodes."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= {"GROUP_RANK": str(rank // per_node), "LOCAL_RANK": str(rank % per_node)}
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    trainer = quiet_trainer(strategy=strategy, devices=per_node, num_nodes=size // per_node, **trainer)
    trainer.fit(module, ckpt_path=checkpoint)
    return module


def trace(strategy, steps):
    module = fit_on_nodes(Quadratic(steps=steps), strategy)
    return module.trace, module.x.item()


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(
    ("tau", "arguments"),
    [(1, {"beta": 0.9}), (2, {"beta": 0.9}), (3, {"beta": 0.9, "momentum": 0.9}), (4, FAMILY[0]), (3, FAMILY[4])],
)
def test_traces(workers, tau, arguments):
    traces = run_ranks(trace, workers, EASGDStrategy(tau=tau, **arguments), 13)
    check(traces, reference_of(workers, 13, tau, arguments), arguments)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "int8"])
def test_compressed_traces(wire_dtype):
    expected = synchronous_trace(3, 13, tau=2, alpha=0.3, beta=0.9)
    for rank, (rows, center) in enumerate(run_ranks(trace, 3, EASGDStrategy(tau=2, wire_dtype=wire_dtype), 13)):
        assert np.array(rows)[:, 0] == pytest.approx(expected[:, rank], abs=3e-2)
        assert center == pytest.approx(expected[-1, -1], abs=3e-2)


def test_nothing_goes_through_a_process_group():
    def train():
        count = Count()
        fit_on_nodes(Regression(batches=23), EASGDStrategy(tau=5), callbacks=[count], limit_val_batches=0)
        return count.calls

    assert run_ranks(train, 2) == [[], []]


class Big(Regression):
    """A model of several buckets, and other numbers of batches on each rank."""

    def __init__(self):
        super().__init__(batches=9)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 1500), *(torch.nn.Linear(1500, 1500) for _ in range(2)))
        self.net.append(torch.nn.Linear(1500, 1))

    def train_dataloader(self):
        rows = 4 * (9 + 5 * self.trainer.global_rank)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(rows, 4), torch.ones(rows, 1)), 4)

    def training_step(self, batch, index):
        return 1e-3 * (self.net(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("wire_dtype", [None, "int8"])
def test_uneven_data_several_buckets_and_a_validation(wire_dtype):
    def train():
        torch.manual_seed(0)
        strategy = EASGDStrategy(tau=4, wire_dtype=wire_dtype)
        module = fit_on_nodes(Big(), strategy, max_epochs=2, use_distributed_sampler=False)
        return [parameter.double().sum().item() for parameter in module.parameters()]

    first, *others = run_ranks(train, 3)
    assert all(other == first for other in others)


def stopped(callback):
    strategy = EASGDStrategy(tau=4, timeout=timedelta(seconds=6))
    module = Quadratic(steps=400, record=False)
    fit_on_nodes(module, strategy, callbacks=[callback])
    return module.trainer.global_step


@pytest.mark.parametrize("action", [fail, lambda: os.kill(os.getpid(), signal.SIGKILL)], ids=["failing", "killed"])
def test_a_lost_node_ends_the_others_at_once(action):
    started = time.monotonic()
    outcomes = end_ranks(stopped, 3, At(1, 9, action), timeout=40)
    assert all(outcome.exitcode != 0 for outcome in outcomes)
    for other in (0, 2):
        assert "ExchangeError: EASGDStrategy(timeout=0:00:06): an exchange failed" in outcomes[other].error
    assert time.monotonic() - started < 20


def test_a_request_to_stop_on_one_node_stops_all_at_one_step():
    def run():
        terminate = Terminate(1, 9)
        with pytest.raises(SystemExit):
            stopped(terminate)
        return terminate.end

    assert run_ranks(run, 2, timeout=40) == [("SIGTERMException", 17)] * 2


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    def run():
        def fit(epochs, checkpoint=None):
            torch.manual_seed(0)
            module = Regression(batches=7)
            module.configure_optimizers = lambda: torch.optim.SGD(
                module.parameters(), lr=0.1, momentum=0.9, nesterov=True
            )
            strategy = EASGDStrategy(tau=2, momentum=0.9, wire_dtype="int8")
            return fit_on_nodes(module, strategy, checkpoint=checkpoint, max_epochs=epochs, limit_val_batches=0)

        whole = fit(2)
        fit(1).trainer.save_checkpoint(tmp_path / "half.ckpt")
        resumed = fit(2, tmp_path / "half.ckpt")
        pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
        return all((a == b).all() for a, b in pairs)

    assert run_ranks(run, 2, timeout=100) == [True] * 2


def test_nodes_of_two_ranks_exchange_between_equal_coordinates():
    def train():
        posted = []
        post = Mesh.post

        def counting(self, lane, sends, receives, then=None):
            posted.append(len(sends))
            return post(self, lane, sends, receives, then)

        Mesh.post = counting
        torch.manual_seed(0)
        strategy = EASGDStrategy(tau=2, devices_per_worker="node")
        module = fit_on_nodes(Regression(batches=9), strategy, per_node=2, limit_val_batches=0)
        return [parameter.double().sum().item() for parameter in module.parameters()], set(posted)

    first, *others = run_ranks(train, 4)
    assert all(other == first for other in others)
    assert first[1] == {1, 3}  # differences to the one of the other node, announcements to all
