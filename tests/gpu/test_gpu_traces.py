"""Every method on one rank, and on two that share a GPU: step by step against the recursion of its paper."""

from functools import partial

import numpy as np
import pytest
import torch
from bowls import SGD, Bowls, flat, rows
from devices import device, fit, in_precision, shared
from ranks import run_ranks
from recursions import Adam, Sgd, downpour, minima, post_local, round_robin, synchronous

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.lab.baselines.post_local_sgd import PostLocalSGDStrategy

STEPS = 11
SINGLE = {"rtol": 1e-6, "atol": 1e-6}
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
NESTEROV = partial(torch.optim.SGD, lr=0.1, momentum=0.5, nesterov=True)
dry = pytest.mark.dry

# Arguments of the strategy and of the module, and the reference for b of the ranks.
SYNC = {
    "tau 1": ({"tau": 1, "alpha": 0.2}, {}, lambda b: synchronous(b, STEPS, 1, 0.2, len(b) * 0.2, lambda _: Sgd())),
    "alpha and beta": (
        {"tau": 2, "alpha": 0.3, "beta": 0.7},
        {},
        lambda b: synchronous(b, STEPS, 2, 0.3, 0.7, lambda _: Sgd()),
    ),
    "tau 5": ({"tau": 5, "beta": 0.9}, {}, lambda b: synchronous(b, STEPS, 5, 0.9 / len(b), 0.9, lambda _: Sgd())),
    "eamsgd": (
        {"tau": 2, "alpha": 0.15, "momentum": 0.9},
        {},
        lambda b: synchronous(b, STEPS, 2, 0.15, len(b) * 0.15, lambda _: Sgd(delta=0.9)),
    ),
    "eamsgd with SGD's own momentum": (
        {"tau": 1, "alpha": 0.15, "momentum": 0.9},
        {"optimizer": NESTEROV},
        lambda b: synchronous(b, STEPS, 1, 0.15, len(b) * 0.15, lambda _: Sgd(delta=0.5)),
    ),
    "adam": (
        {"tau": 2, "alpha": 0.2},
        {"optimizer": partial(torch.optim.Adam, lr=0.1)},
        lambda b: synchronous(b, STEPS, 2, 0.2, len(b) * 0.2, lambda _: Adam()),
    ),
}


def expect(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, **tolerance)
    assert abs(expected - expected[0]).max() > 0.1, "the trace of something that moves"


@pytest.mark.parametrize("center_device", [None, "cpu"])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", SYNC)
def test_sync(case, ranks, center_device):
    strategy, module, reference = SYNC[case]
    make = partial(shared, ranks=ranks, center_device=center_device, **strategy)
    found, end = rows(partial(Bowls, STEPS, **module), make, ranks)
    expected = reference(minima(ranks))
    expect(found, expected, SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


@pytest.mark.parametrize("center_device", [None, pytest.param("cpu", marks=dry)])
@pytest.mark.parametrize("case", ["tau 1", "tau 5", "eamsgd"])
def test_sync_with_exchanges_left_under_way(case, center_device):
    """Nobody reads the center before the end: sums travel beside the steps."""
    strategy, module, reference = SYNC[case]
    make = partial(shared, center_device=center_device, **strategy)
    found, end = rows(partial(Bowls, STEPS, reads="worker", **module), make)
    expected = reference(minima(2))
    expect(found, expected[:, :2], SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


@pytest.mark.parametrize("center_device", [None, "cpu"])
@pytest.mark.parametrize("case", ["alpha and beta", "eamsgd"])
def test_sync_in_double_precision(case, center_device):
    strategy, module, reference = SYNC[case]
    make = partial(shared, center_device=center_device, **strategy)
    found, _ = rows(partial(Bowls, STEPS, **module), make, precision="64-true")
    expect(found, reference(minima(2)), DOUBLE)


@pytest.mark.parametrize("center_device", [None, pytest.param("cpu", marks=dry)])
def test_parameter_groups_with_rates_that_follow_their_learning_rates(center_device):
    make = partial(shared, tau=2, rho=2.0, center_device=center_device)
    found, _ = rows(partial(Bowls, STEPS, lrs=(0.1, 0.05)), make)
    for part, lr in ((slice(0, 2), 0.1), (slice(2, 5), 0.05)):
        expected = synchronous(minima(2)[:, part], STEPS, 2, 2 * lr, 4 * lr, lambda _, lr=lr: Sgd(lr))
        expect(found[:, :, part], expected, SINGLE)


@pytest.mark.parametrize("center_device", [None, "cpu"])
def test_two_optimizers_of_different_rhythm(center_device):
    make = partial(shared, tau=2, alpha=0.2, center_device=center_device)
    found, end = rows(partial(Bowls, STEPS, by_hand=True, reads="worker"), make)
    for part, steps in ((slice(0, 2), STEPS), (slice(2, 5), STEPS // 2)):
        expected = synchronous(minima(2)[:, part], steps, 2, 0.2, 0.4, lambda _: Sgd())[-1]
        np.testing.assert_allclose(found[-1, :, part], expected[:2], **SINGLE)
        np.testing.assert_allclose(end[part], expected[-1], **SINGLE)


# The served center

ASYNC = {
    **{
        f"easgd tau {tau}": (
            partial(shared, mode="async", order="round_robin", tau=tau, alpha=0.2),
            lambda b, tau=tau: round_robin(b, STEPS, tau, 0.2, lambda _: Sgd()),
        )
        for tau in (1, 2, 5)
    },
    "eamsgd": (
        partial(shared, mode="async", order="round_robin", tau=2, alpha=0.2, momentum=0.9),
        lambda b: round_robin(b, STEPS, 2, 0.2, lambda _: Sgd(delta=0.9)),
    ),
    "alpha and beta": (
        partial(shared, mode="async", order="round_robin", tau=2, alpha=0.3, beta=0.8),
        lambda b: round_robin(b, STEPS, 2, 0.3, lambda _: Sgd(), beta=0.8),
    ),
    "downpour tau 1": (
        partial(shared, DownpourStrategy, order="round_robin", tau=1),
        lambda b: downpour(b, STEPS, 1, lambda _: Sgd()),
    ),
    "downpour tau 2": (
        partial(shared, DownpourStrategy, order="round_robin", tau=2),
        lambda b: downpour(b, STEPS, 2, lambda _: Sgd()),
    ),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", ASYNC)
def test_async_in_turn(case, ranks):
    make, reference = ASYNC[case]
    found, end = rows(partial(Bowls, STEPS, reads="in turn"), partial(make, ranks=ranks), ranks)
    expected = reference(minima(ranks))
    expect(found, expected, SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


@pytest.mark.parametrize("case", ["eamsgd", pytest.param("downpour tau 2", marks=dry)])
def test_async_in_double_precision(case):
    make, reference = ASYNC[case]
    found, _ = rows(partial(Bowls, STEPS, reads="in turn"), make, precision="64-true")
    expect(found, reference(minima(2)), DOUBLE)


def test_async_two_optimizers_of_different_rhythm():
    make = partial(shared, mode="async", order="round_robin", tau=2, alpha=0.2)
    found, end = rows(partial(Bowls, STEPS, by_hand=True, reads="worker"), make)
    for part, steps in ((slice(0, 2), STEPS), (slice(2, 5), STEPS // 2)):
        expected = round_robin(minima(2)[:, part], steps, 2, 0.2, lambda _: Sgd())[-1]
        np.testing.assert_allclose(found[-1, :, part], expected[:2], **SINGLE)
        np.testing.assert_allclose(end[part], expected[-1], **SINGLE)


def test_async_parameter_groups():
    make = partial(shared, mode="async", order="round_robin", tau=2, rho=2.0)
    found, _ = rows(partial(Bowls, STEPS, lrs=(0.1, 0.05), reads="in turn"), make)
    for part, lr in ((slice(0, 2), 0.1), (slice(2, 5), 0.05)):
        expected = round_robin(minima(2)[:, part], STEPS, 2, 2 * lr, lambda _, lr=lr: Sgd(lr))
        expect(found[:, :, part], expected, SINGLE)


# What changes an optimizer step


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_accumulation_counts_optimizer_steps(mode):
    order = {"order": "round_robin"} if mode == "async" else {}
    make = partial(shared, mode=mode, tau=2, alpha=0.2, **order)
    reads = "in turn" if mode == "async" else "center"
    found, _ = rows(partial(Bowls, 3 * 6, reads=reads), make, accumulate_grad_batches=3)
    reference = round_robin(minima(2), 6, 2, 0.2, lambda _: Sgd())
    if mode == "sync":
        reference = synchronous(minima(2), 6, 2, 0.2, 0.4, lambda _: Sgd())
    expect(found, reference, SINGLE)


@pytest.mark.parametrize("center_device", [None, "cpu"])
def test_clipping_concerns_the_gradient_alone(center_device):
    make = partial(shared, tau=2, alpha=0.2, center_device=center_device)
    found, _ = rows(partial(Bowls, STEPS), make, gradient_clip_val=1.0)
    expected = synchronous(minima(2), STEPS, 2, 0.2, 0.4, lambda _: Sgd(clip=1.0))
    expect(found, expected, {"rtol": 2e-6, "atol": 2e-6})
    assert abs(expected - synchronous(minima(2), STEPS, 2, 0.2, 0.4, lambda _: Sgd())).max() > 0.1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("delta", [0.0, 0.9])
def test_a_step_that_the_scaler_skips_on_one_rank_still_exchanges(delta, fused):
    momentum = {"momentum": delta} if delta else {}
    module = partial(Bowls, STEPS, optimizer=partial(SGD, fused=fused), overflow=(1, 4))
    make = partial(shared, tau=2, alpha=0.15, **momentum)

    def train():
        fitted = fit(module(), make(), **in_precision("16-mixed", init_scale=2.0**10))
        return np.array(fitted.trace), fitted.trainer.precision_plugin.scaler.get_scale()

    (first, scale), (second, halved) = run_ranks(train, 2, timeout=120)
    assert (scale, halved) == (2.0**10, 2.0**9)
    found = np.stack([first[:, 0], second[:, 0], first[:, 1]], axis=1)
    expected = synchronous(minima(2), STEPS, 2, 0.15, 0.3, lambda rank: Sgd(delta=delta, skip=4 if rank == 1 else None))
    expect(found, expected, {"rtol": 2e-6, "atol": 2e-6})


@pytest.mark.dry
def test_a_step_that_the_scaler_skips_in_turn():
    module = partial(Bowls, STEPS, overflow=(0, 4), reads="in turn")
    make = partial(shared, mode="async", order="round_robin", tau=2, alpha=0.2)

    def train():
        return np.array(fit(module(), make(), **in_precision("16-mixed", init_scale=2.0**10)).trace)

    first, second = run_ranks(train, 2, timeout=120)
    expected = round_robin(minima(2), STEPS, 2, 0.2, lambda rank: Sgd(skip=4 if rank == 0 else None))
    expect(np.stack([first[:, 0], second[:, 0], first[:, 1]], axis=1), expected, {"rtol": 2e-6, "atol": 2e-6})


# Compressed differences


@pytest.mark.parametrize("center_device", [None, "cpu"])
@pytest.mark.parametrize(
    ("wire_dtype", "quantum"), [("bfloat16", 2.0**-8), ("int8", 1 / 127)], ids=["bfloat16", "int8"]
)
def test_compressed_differences(wire_dtype, quantum, center_device):
    """As on the CPU, where no rounding falls otherwise; and next to the exact recursion."""
    arguments = {"tau": 2, "alpha": 0.3, "wire_dtype": wire_dtype, "center_device": center_device}

    def train():
        traces = []
        for where in (device(), torch.device("cpu")):
            strategy = shared(where=where, **arguments)
            traces.append(np.array(fit(Bowls(STEPS), strategy).trace))
        return traces

    (first, first_cpu), (second, second_cpu) = run_ranks(train, 2, timeout=120)
    assert (first[:, 1] == second[:, 1]).all()
    exact = synchronous(minima(2), STEPS, 2, 0.3, 0.6, lambda _: Sgd())
    found = np.stack([first[:, 0], second[:, 0], first[:, 1]], axis=1)
    on_cpu = np.stack([first_cpu[:, 0], second_cpu[:, 0], first_cpu[:, 1]], axis=1)
    # A difference that lies within float32's rounding of the middle between two messages may go either way, by one
    # quantum of the largest difference; the pulls and the center's moves that follow only shrink it.
    one = 0.3 * abs(exact[:, :2] - exact[:, 2:]).max() * quantum
    np.testing.assert_allclose(found, on_cpu, rtol=0, atol=2 * one)
    np.testing.assert_allclose(found, exact, rtol=0, atol=6 * one)
    assert abs(found[:, 2] - exact[:, 2]).max() > 1e-6, "something was rounded"


# Post-local SGD


@pytest.mark.parametrize(("tau", "warmup"), [(3, 0), pytest.param(3, 2, marks=dry), (4, 1)])
def test_post_local_sgd(tau, warmup):
    make = partial(shared, PostLocalSGDStrategy, tau=tau, warmup_steps=warmup)
    found, end = rows(partial(Bowls, STEPS, reads="worker"), make)
    expected = post_local(minima(2), STEPS, tau, warmup)
    expect(found, expected[:, :2], SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


def test_no_pull_is_sgd_on_each_rank():
    found, end = rows(partial(Bowls, STEPS), partial(shared, EASGDStrategy, tau=2, alpha=0.0))
    expected = synchronous(minima(2), STEPS, 2, 0.0, 0.0, lambda _: Sgd())
    expect(found[:, :2], expected[:, :2], SINGLE)
    np.testing.assert_array_equal(end, flat(Bowls().x))
