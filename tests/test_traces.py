"""The real Trainer, step by step, against the paper's recursions."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from reference import BlockingAverager, synchronous_trace
from test_elastic import SYNCHRONOUS
from toys import Quadratic, Regression, fitted

from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.averagers.sync import averaging as synchronous

pytestmark = pytest.mark.timeout(120)


def trace(ranks: int, steps: int, sgd: dict, **strategy) -> np.ndarray:
    """Rows (x_1, …, x_p, x̃), after checking that the center is bitwise the same on all ranks."""

    def train():
        return fitted(Quadratic(steps=steps, **sgd), EASGDStrategy(**strategy), ranks).trace

    traces = np.array(run_ranks(train, ranks))
    assert (traces[:, :, 1] == traces[0, :, 1]).all()
    return np.column_stack([*traces[:, :, 0], traces[0, :, 1]])


def test_golden_trace():
    assert trace(2, 6, {}, tau=1, alpha=0.2) == pytest.approx(np.array(SYNCHRONOUS), abs=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tau", [1, 2, 3])
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, None), (0.3, 0.7)])
def test_easgd(ranks, tau, alpha, beta):
    rows = trace(ranks, 9, {}, tau=tau, alpha=alpha, beta=beta)
    center_rate = ranks * alpha if beta is None else beta
    assert rows == pytest.approx(synchronous_trace(ranks, 9, tau, alpha, center_rate), abs=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tau", [1, 2, 3])
def test_eamsgd(ranks, tau):
    rows = trace(ranks, 9, {}, tau=tau, alpha=0.15, momentum=0.9)
    assert rows == pytest.approx(synchronous_trace(ranks, 9, tau, 0.15, ranks * 0.15, delta=0.9), abs=2e-6)


def test_sgd_that_has_momentum_keeps_it():
    rows = trace(2, 9, {"momentum": 0.5}, tau=2, momentum=0.9)
    assert rows == pytest.approx(synchronous_trace(2, 9, 2, 0.45, 0.9, delta=0.5), abs=2e-6)


def test_rho_follows_the_learning_rate():
    rows = trace(2, 9, {}, tau=2, rho=3.0)
    assert rows == pytest.approx(synchronous_trace(2, 9, 2, 0.3, 0.6), abs=1e-6)


def test_alpha_zero_is_independent_sgd():
    rows = trace(3, 9, {}, tau=2, alpha=0.0)
    assert rows[:, :3] == pytest.approx(synchronous_trace(3, 9, 1, 0.0, 0.0)[:, :3], abs=1e-6)
    assert (rows[:, 3] == 1).all()


def test_tau_beyond_the_run_is_no_communication():
    assert (trace(2, 5, {}, tau=100)[:, :2] == trace(2, 5, {}, tau=1, alpha=0.0)[:, :2]).all()


class Linear(Quadratic):
    """f_i = b_i x."""

    def training_step(self, batch, index):
        return (self.x * [1.0, -3.0, 2.0][self.trainer.global_rank]).sum()


@pytest.mark.parametrize("tau", [1, 3])
def test_conservation(tau):
    """With linear losses and β = pα the sum Σ x_i + x̃ moves by the gradients alone."""

    def train():
        module = fitted(Linear(steps=12), EASGDStrategy(tau=tau), 3)
        return module.trace[-1]

    rows = run_ranks(train, 3)
    # The center of the last row has all exchanges, as reading it waits for the one under way.
    assert sum(x for x, _ in rows) + rows[0][1] == pytest.approx(4 * 1.0 - 0.1 * 12 * 0.0, abs=1e-5)


class Decayed(Quadratic):
    """No gradient of its own: only weight decay and the elastic force move x."""

    def training_step(self, batch, index):
        return 0 * self.x.sum() * self.trainer.global_rank


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_weight_decay_is_taken_at_the_old_x(optimizer):
    """x_{t+1} = x_t (1 - ηλ) - α(x_t - x̃_t), not (x_t - α(x_t - x̃_t))(1 - ηλ)."""

    def train():
        module = Decayed(steps=4)
        module.configure_optimizers = lambda: optimizer(module.parameters(), lr=0.5, weight_decay=0.2)
        return fitted(module, EASGDStrategy(tau=1, alpha=0.25), 2).trace

    x = center = 1.0
    expected = []
    for _ in range(4):
        x, center = x * (1 - 0.5 * 0.2) - 0.25 * (x - center), center + 0.5 * (x - center)
        expected.append((x, center))
    for rows in run_ranks(train, 2):
        assert np.array(rows) == pytest.approx(np.array(expected), abs=1e-6)


def weights_by_step(strategy, ranks):
    class Recorded(Regression):
        def on_train_batch_end(self, *_):
            steps.append([p.detach().clone().numpy() for p in self.parameters()])

    steps = []
    torch.manual_seed(7)
    fitted(Recorded(batches=12), strategy, ranks, limit_val_batches=0, use_distributed_sampler=ranks > 1)
    return steps


@pytest.mark.parametrize("strategy", [EASGDStrategy(tau=2, alpha=0.0), LocalStrategy()])
def test_one_worker_without_force_is_the_single_device_run_bitwise(strategy):
    ((mine,), (theirs,)) = (
        run_ranks(weights_by_step, 1, strategy, 1),
        run_ranks(weights_by_step, 1, "auto", 1),
    )
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("tau", [1, 3])
def test_numbers_are_those_of_the_blocking_form(ranks, tau, monkeypatch):
    fast = run_ranks(weights_by_step, ranks, EASGDStrategy(tau=tau), ranks)
    monkeypatch.setattr(synchronous, "SynchronousAverager", BlockingAverager)
    plain = run_ranks(weights_by_step, ranks, EASGDStrategy(tau=tau, worker_state="none"), ranks)
    assert len(fast[0]) == 12
    for a, b in zip(fast, plain, strict=True):
        for step_a, step_b in zip(a, b, strict=True):
            for x, y in zip(step_a, step_b, strict=True):
                np.testing.assert_array_equal(x, y)
