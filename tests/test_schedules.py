"""Rates that change on the optimizer's clock: their values, what is refused, and training with them."""

import pickle
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from application import composed
from channels import LoneChannel, line_on, run_threads
from ranks import run_ranks
from test_asynchronous import Rows
from test_synchronous_averager import averager_of, quadratic_step
from toys import MINIMA, Quadratic, fitted

from lightning_easgd import EASGDStrategy
from lightning_easgd.averagers import Meeting
from lightning_easgd.lab.building import build_strategy
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.schedules import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Schedule,
)

pytestmark = pytest.mark.timeout(60)
RAMPS = [LinearSchedule, CosineSchedule, ExponentialSchedule]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (ConstantSchedule(0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
        (LinearSchedule(0.1, 0.9, 100), [0.1, 0.3, 0.5, 0.7, 0.9]),
        (CosineSchedule(0.0, 1.0, 100), [0.0, (1 - 0.5**0.5) / 2, 0.5, (1 + 0.5**0.5) / 2, 1.0]),
        (ExponentialSchedule(0.01, 100.0, 100), [0.01, 0.1, 1.0, 10.0, 100.0]),
        (ExponentialSchedule(-2.0, -0.125, 100), [-2.0, -1.0, -0.5, -0.25, -0.125]),
    ],
    ids=repr,
)
def test_values_on_the_way_and_after_it(schedule, values):
    assert [schedule(step) for step in (0, 25, 50, 75, 100)] == pytest.approx(values)
    assert [schedule(step) for step in (100, 101, 10**9)] == [values[-1]] * 3
    assert schedule.extremes == (min(values), max(values))


@pytest.mark.parametrize("ramp", RAMPS)
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.7), (0.7, 0.1)])
def test_a_ramp_never_turns_back_nor_leaves_its_extremes(ramp, start, end):
    values = [ramp(start, end, 37)(step) for step in range(45)]
    assert all((later - earlier) * (end - start) >= 0 for earlier, later in pairwise(values))
    assert min(values) == min(start, end)
    assert max(values) == max(start, end)


@pytest.mark.parametrize("schedule", [ConstantSchedule(0.3), *(ramp(0.1, 0.7, 37) for ramp in RAMPS)], ids=repr)
def test_schedules_travel_to_spawned_ranks(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (partial(ConstantSchedule, float("nan")), ValueError, r"ConstantSchedule\(value=nan\): .*finite"),
        (partial(ConstantSchedule, "0.1"), TypeError, r"ConstantSchedule\(value='0.1'\): .*give a float"),
        (partial(LinearSchedule, 0.1, float("inf"), 5), ValueError, r"LinearSchedule\(end=inf\): .*finite"),
        (partial(LinearSchedule, 0.1, 0.2, 0), ValueError, r"LinearSchedule\(steps=0\): .*; give the number"),
        (partial(CosineSchedule, 0.1, 0.2, 1.5), TypeError, r"CosineSchedule\(steps=1.5\): .*give an int"),
        (partial(CosineSchedule, True, 0.2, 1), TypeError, r"CosineSchedule\(start=True\)"),
        (partial(ExponentialSchedule, 0.0, 0.2, 9), ValueError, r"ExponentialSchedule\(start=0.0, .*LinearSchedule"),
        (partial(ExponentialSchedule, -0.1, 0.2, 9), ValueError, r"ExponentialSchedule\(start=-0.1, end=0.2\)"),
    ],
)
def test_what_is_no_schedule(make, error, says):
    with pytest.raises(error, match=f"^{says}"):
        make()


@pytest.mark.parametrize(
    "given",
    [
        {"alpha": LinearSchedule(0.1, 1.01, 9)},
        {"alpha": CosineSchedule(-1.0, 0.5, 9)},
        {"rho": LinearSchedule(0.0, 1.0, 9)},
        {"rho": LinearSchedule(1.0, -1.0, 9)},
        {"alpha": ConstantSchedule(0.1), "rho": ConstantSchedule(1.0)},
    ],
    ids=str,
)
def test_the_whole_schedule_lies_in_the_rates_range(given):
    with pytest.raises(ValueError, match=rf"^EASGDStrategy\({next(iter(given))}=.*: .*; "):
        EASGDStrategy(**given)


def test_a_bare_function_is_no_rate():
    with pytest.raises(TypeError, match=r"EASGDStrategy\(alpha=<function.*derive a class"):
        EASGDStrategy(alpha=lambda step: 0.1)
    with pytest.raises(TypeError, match=r"EASGDStrategy\(rho='cosine'\)"):
        EASGDStrategy(rho="cosine")


RISING = ExponentialSchedule(0.01, 0.4, 10)


@pytest.mark.parametrize(
    ("given", "clock", "expected"),
    [
        ({"alpha": RISING}, 0, (0.01, 0.04)),
        ({"alpha": RISING}, 5, (4e-3**0.5, 4 * 4e-3**0.5)),
        ({"alpha": RISING}, 99, (0.4, 1.6)),
        ({"alpha": RISING, "beta": 1.0}, 99, (0.4, 1.0)),
        ({"rho": RISING}, 99, (0.04, 0.16)),
        ({"rho": RISING, "beta": 1.0}, 0, (0.001, 1.0)),
    ],
)
def test_rates_that_follow_at_a_clock(given, clock, expected):
    assert MovingRates(**given).resolve(4, 0.1, clock) == pytest.approx(expected)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert MovingRates(**given).of_groups(optimizer, 4, clock) == [pytest.approx(expected)]


@pytest.mark.parametrize(
    ("alpha", "beta", "says"),
    [
        (LinearSchedule(0.1, 0.4, 9), None, None),
        (LinearSchedule(0.1, 0.41, 9), None, r"alpha=0.41, beta=1.64\) \(the largest of LinearSchedule.*unstable"),
        (CosineSchedule(0.41, 0.1, 9), None, r"alpha=0.41, beta=1.64\)"),
        (LinearSchedule(0.1, 1.0, 9), 1.0, None),
        (LinearSchedule(0.1, 0.9, 9), 1.2, r"alpha=0.9, beta=1.2\)"),
        (LinearSchedule(-0.1, 0.4, 9), None, r"alpha=-0.1\): a negative"),
    ],
)
def test_instability_of_the_largest_value(alpha, beta, says):
    problem = MovingRates(alpha=alpha, beta=beta).instability(4)
    if says is None:
        assert problem is None
    else:
        with pytest.raises(RuntimeWarning, match=says):
            raise RuntimeWarning(problem)


def test_a_schedule_that_may_be_zero_makes_a_bare_exchange():
    assert MovingRates(alpha=LinearSchedule(0.0, 0.2, 9)).is_asymmetric
    assert not MovingRates(alpha=LinearSchedule(0.1, 0.2, 9)).is_asymmetric


def scheduled_trace(workers: int, steps: int, tau: int, alpha: Schedule, beta: float | None, lr: float = 0.1):
    """Rows (x_1, …, x_p, x̃) of synchronous EASGD on f_i = ½(x - b_i)² with the rates of each clock."""
    minima = np.array(MINIMA[:workers])
    x, center, rows = np.ones(workers), 1.0, []
    for t in range(steps):
        pull = push = 0.0
        if t % tau == 0:
            pull = alpha(t) * (x - center)
            push = (workers * alpha(t) if beta is None else beta) * (x - center).mean()
        x, center = x - lr * (x - minima) - pull, center + push
        rows.append((*x, center))
    return np.array(rows)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("beta", [None, 1.0])
@pytest.mark.parametrize("name", ["alpha", "rho"])
def test_trace_of_threads(workers, beta, name):
    alpha = ExponentialSchedule(0.02, 0.35, 9)
    given = alpha if name == "alpha" else ExponentialSchedule(0.2, 3.5, 9)  # lr 0.1

    def work(rank, line):
        x = torch.ones(1, requires_grad=True)
        averager, optimizer = averager_of([x], line, tau=2, beta=beta, **{name: given})
        rows = []
        for _ in range(13):
            quadratic_step(averager, x, optimizer, MINIMA[rank])
            averager.complete()
            rows.append((x.item(), averager.center.flat.item()))
        return rows

    expected = scheduled_trace(workers, 13, 2, alpha, beta)
    for rank, rows in enumerate(run_threads(work, workers)):
        assert [x for x, _ in rows] == pytest.approx(expected[:, rank], abs=1e-6)
        assert [center for _, center in rows] == pytest.approx(expected[:, -1], abs=1e-6)


@pytest.mark.parametrize("beta", [None, 1.0])
def test_workers_whose_clocks_differ_exchange_all_the_same(beta):
    """Batches of different numbers: in the second epoch an exchange has other clocks, and other α, on each worker."""

    def work(rank, line):
        x = torch.tensor([float(rank)], requires_grad=True)
        averager, optimizer = averager_of([x], line, tau=2, alpha=LinearSchedule(0.05, 0.3, 20), beta=beta)
        steps = (3, 6, 5)[rank]
        for _ in range(2):
            for _ in range(steps):
                averager.begin()
                x.grad = torch.ones(1)
                optimizer.step()
                averager.finish()
            line.meet(Meeting.EPOCH_END, [averager])
        return x.item(), averager.center.flat.item()

    results = run_threads(work, 3)
    assert len({center for _, center in results}) == 1
    if beta is None:  # equal and opposite forces, each worker's at its own α
        total = sum(x for x, _ in results) + results[0][1]
        assert total == pytest.approx(0 + 1 + 2 + 0 - 0.1 * 2 * (3 + 6 + 5), abs=1e-5)


def test_replicated_sgd_ends_at_the_mean_of_its_workers():
    """β = 1: after an exchange the center is the mean of the workers of before it."""
    line = line_on(LoneChannel([]), LoneChannel([]))
    x = torch.ones(1, requires_grad=True)
    averager, optimizer = averager_of([x], line, tau=1, beta=1.0, rho=ExponentialSchedule(0.1, 5.0, 4))
    for _ in range(6):
        before = x.item()
        quadratic_step(averager, x, optimizer, 0.0)
        averager.complete()
        assert averager.center.flat.item() == pytest.approx(before)


def trained(**strategy: Any):
    return fitted(Quadratic(steps=9), EASGDStrategy(**strategy), 2).trace


def test_two_processes():
    alpha = CosineSchedule(0.05, 0.4, 7)
    first, second = np.array(run_ranks(partial(trained, tau=2, alpha=alpha, beta=1.0), 2))
    rows = np.column_stack([first[:, 0], second[:, 0], first[:, 1]])
    assert rows == pytest.approx(scheduled_trace(2, 9, 2, alpha, 1.0), abs=1e-6)


def scheduled_turns(workers: int, steps: int, tau: int, alpha: Schedule, beta: float | None, lr: float = 0.1):
    """Rows (x_1, …, x_p, x̃) of asynchronous EASGD whose workers exchange in turn, each with its clock's rates."""
    minima = np.array(MINIMA[:workers])
    x, center, rows = np.ones(workers), 1.0, []
    for t in range(steps):
        pulls = np.zeros(workers)
        for i in range(workers if t % tau == 0 else 0):
            difference = x[i] - center
            pulls[i] = alpha(t) * difference
            center += (alpha(t) if beta is None else beta / workers) * difference
        x = x - lr * (x - minima) - pulls
        rows.append((*x, center))
    return np.array(rows)


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        (ExponentialSchedule(0.05, 0.4, 7), None),
        (LinearSchedule(0.0, 0.4, 7), None),
        (CosineSchedule(0.4, 0.1, 7), 0.7),
    ],
    ids=["symmetric", "from zero", "asymmetric"],
)
def test_asynchronous_workers(alpha, beta):
    def train():
        strategy = EASGDStrategy(mode="async", order="round_robin", tau=2, alpha=alpha, beta=beta)
        return fitted(Rows(steps=9), strategy, 2).trace

    first, second = np.array(run_ranks(train, 2))
    rows = np.column_stack([first[:, 0], second[:, 0], first[:, 1]])
    assert rows == pytest.approx(scheduled_turns(2, 9, 2, alpha, beta), abs=1e-6)


def test_the_command_line_of_hydra(tmp_path):
    strategy = build_strategy(composed(tmp_path, "strategy=replicated_sgd", "strategy.rho.steps=70").strategy)
    assert strategy.rates == MovingRates(beta=1.0, rho=ExponentialSchedule(0.05, 5.0, 70))
