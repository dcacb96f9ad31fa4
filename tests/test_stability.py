"""The stability analysis: every formula against an exact recursion or a simulation that shares nothing with it."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
from application import ROOT

from lightning_easgd.lab.stability.stability_command import run
from lightning_easgd.method import rates
from lightning_easgd.stability import (
    admm,
    center_error,
    double_well,
    downpour,
    multiplicative,
    outer,
    round_robin,
    synchronous,
)
from lightning_easgd.stability.advice import Setting, moving_rates_by_rule, round_robin_is_stable
from lightning_easgd.stability.spectra import first_unstable, steady_covariance


def as_matrix(step, size):
    """The matrix of a linear function, from its values at the unit vectors."""
    return np.column_stack([step(unit) for unit in np.eye(size)])


def modulus(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


# Synchronous EASGD and EAMSGD


def synchronous_period(state, p, s, alpha, beta, delta, tau):
    """Algorithm 2 with the synchronous center on x²/2, written out; state (x¹…xᵖ, v¹…vᵖ, x̃)."""
    x, v, center = state[:p].copy(), state[p : 2 * p].copy(), state[-1]
    for t in range(tau):
        difference = x - center
        v = delta * v - s * (x + delta * v)
        x = x + v - (alpha * difference if t == 0 else 0)
        center = center + (beta * difference.mean() if t == 0 else 0)
    return np.array([*x, *v, center])


@pytest.mark.parametrize("p", [1, 2, 5])
@pytest.mark.parametrize(("delta", "tau"), [(0.0, 1), (0.0, 4), (0.9, 1), (0.99, 3)])
@pytest.mark.parametrize(
    ("s", "alpha", "beta"), [(0.3, 0.18, 0.9), (1.2, 0.4, 0.5), (1.9, 0.7, 1.8), (0.05, -0.1, 0.4)]
)
def test_two_modes_have_the_spectral_radius_of_all_workers(p, delta, tau, s, alpha, beta):
    full = as_matrix(lambda state: synchronous_period(state, p, s, alpha, beta, delta, tau), 2 * p + 1)
    radius = synchronous.radius(s, alpha, beta, workers=p, momentum=delta, tau=tau)
    assert radius == pytest.approx(modulus(full), abs=1e-6)  # double eigenvalues are known to half of the digits


def test_synchronous_region_is_exact():
    for p, s in itertools.product((1, 2, 4, 16, 100), np.linspace(0.05, 1.95, 20)):
        limit = synchronous.largest_moving_rate(p, s)
        assert limit == pytest.approx((4 - 2 * s) / (2 * (p + 1) - p * s), rel=1e-14)
        assert synchronous.largest_alpha(p * limit, s) == pytest.approx(limit, rel=1e-9)
        for factor, stable in ((0.999, True), (1.001, False)):
            radius = synchronous.radius(s, factor * limit, p * factor * limit, workers=p)
            assert (radius < 1) == stable, (p, s)


def test_asymmetric_region_is_exact():
    for beta, s in itertools.product((0.1, 0.9, 1.5, 1.99), np.linspace(0.05, 1.95, 20)):
        limit = synchronous.largest_alpha(beta, s)
        for factor, stable in ((0.999, True), (1.001, False)):
            assert (synchronous.radius(s, factor * limit, beta, workers=3) < 1) == stable, (beta, s)


def test_stable_learning_rates_of_the_papers_moving_rate():
    for p in (1, 2, 4, 8, 64):
        limit = synchronous.largest_scaled_lr(0.9 / p, 0.9, workers=p)
        assert limit == pytest.approx(2 - 1.8 / (1.1 * p), abs=1e-8)
        assert limit == pytest.approx(2 - 1.636 / p, abs=1e-3)
    assert synchronous.largest_scaled_lr(0.9, 0.9, workers=1) == pytest.approx(0.364, abs=5e-4)


def test_stable_learning_rates_of_eamsgd():
    assert synchronous.largest_scaled_lr(0.225, 0.9, workers=4, momentum=0.99) == pytest.approx(1.23, abs=5e-3)
    nesterov = synchronous.nesterov_scaled_lr(0.99)
    assert nesterov == pytest.approx(1.3356, abs=1e-4)
    assert synchronous.nesterov_scaled_lr(0.0) == 2
    for p, tau in itertools.product((2, 4, 16), (10, 64)):
        limit = synchronous.largest_scaled_lr(0.9 / p, 0.9, workers=p, momentum=0.99, tau=tau)
        assert nesterov - 0.012 < limit <= nesterov + 1e-9
    for delta in (0.0, 0.5, 0.99):
        alone = synchronous.largest_scaled_lr(0.0, 0.0, workers=2, momentum=delta)
        assert alone == pytest.approx(synchronous.nesterov_scaled_lr(delta), abs=1e-8)


@pytest.mark.parametrize("p", [1, 2, 4, 16])
def test_a_longer_period_only_widens_the_region_of_easgd(p):
    s, alpha = np.linspace(0.02, 2, 60)[None], np.linspace(0.005, 1, 60)[:, None]
    stable = synchronous.radius(s, alpha, p * alpha, workers=p) < 1
    assert stable.any()
    for tau in (2, 3, 10):
        longer = synchronous.radius(s, alpha, p * alpha, workers=p, tau=tau) < 1
        assert not (stable & ~longer).any()
        assert longer.sum() > stable.sum()


def test_first_unstable_finds_a_gap_and_both_ends():
    assert first_unstable(lambda s: np.where((s > 0.3) & (s < 0.5), 2.0, 0.5), end=1.0) == pytest.approx(0.3, abs=1e-9)
    assert first_unstable(np.ones_like, end=1.0) == 1.0
    assert first_unstable(lambda s: np.full_like(s, 1.1), end=1.0) == pytest.approx(0, abs=1e-9)


# Momentum at the center, the new center, delays


def outer_period(state, p, s, alpha, beta, delta, tau, mu, nesterov, pull_to, delay):
    """A period of the family on x²/2, written out; state (x¹…xᵖ, v¹…vᵖ, x̃, u)."""
    x, v, (center, u) = state[:p].copy(), state[p : 2 * p].copy(), state[2 * p :]
    difference, before = x - center, x.copy()
    u = mu * u + difference.mean()
    moved = center + beta * (difference.mean() + mu * u if nesterov else u)
    pull = alpha * (before - (center if pull_to == "old" else moved))
    for t in range(tau):
        if pull_to == "new" and t == delay:
            x = x - pull
        v = delta * v - s * (x + delta * v)
        x = x + v
        if pull_to == "old" and t == delay:
            x = x - pull
    return np.array([*x, *v, moved, u])


FAMILIES = [
    ("old", 0, 0.5, False), ("old", 2, 0.0, False), ("old", 1, 0.8, True),
    ("new", 0, 0.0, False), ("new", 0, 0.9, True), ("new", 2, 0.5, False), ("new", 1, 0.7, True),
]  # fmt: skip


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize(("pull_to", "delay", "mu", "nesterov"), FAMILIES)
@pytest.mark.parametrize(
    ("s", "alpha", "beta", "delta"), [(0.3, 0.9, 0.9, 0.0), (1.2, 0.4, 0.5, 0.9), (0.0, 1, 1.3, 0)]
)
def test_the_family_has_the_spectral_radius_of_all_workers(p, pull_to, delay, mu, nesterov, s, alpha, beta, delta):
    full = as_matrix(
        lambda state: outer_period(state, p, s, alpha, beta, delta, 3, mu, nesterov, pull_to, delay), 2 * p + 2
    )
    radius = outer.radius(
        s, alpha, beta, workers=p, momentum=delta, tau=3, outer_momentum=mu, outer_nesterov=nesterov,
        pull_to=pull_to, delay=delay,
    )  # fmt: skip
    assert radius == pytest.approx(modulus(full), abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "beta", "delta", "tau"), [(0.18, 0.9, 0.0, 1), (0.4, 0.5, 0.9, 4), (0.45, 0.9, 0, 2)]
)
def test_the_family_holds_the_papers_method(alpha, beta, delta, tau):
    of_paper = synchronous.largest_scaled_lr(alpha, beta, workers=3, momentum=delta, tau=tau)
    assert outer.largest_scaled_lr(alpha, beta, workers=3, momentum=delta, tau=tau) == pytest.approx(of_paper)


@pytest.mark.parametrize("beta", [0.3, 0.05])
def test_local_sgd_of_one_step_is_stable_where_a_worker_alone_is_not(beta):
    """Its center makes gradient steps of size β η: stable below ηh = 2 / β."""
    limit = outer.largest_scaled_lr(1.0, beta, workers=3, tau=1, pull_to="new")
    assert limit == pytest.approx(2 / beta, rel=1e-6)


@pytest.mark.parametrize(("pull_to", "delay", "mu", "nesterov"), FAMILIES)
def test_the_limit_of_the_family_is_where_a_simulation_diverges(pull_to, delay, mu, nesterov):
    alpha, beta, tau = 0.6, 0.7, 3
    limit = outer.largest_scaled_lr(
        alpha, beta, workers=2, tau=tau, outer_momentum=mu, outer_nesterov=nesterov, pull_to=pull_to, delay=delay
    )
    assert 0 < limit < 2.5

    def grows(s):
        state = np.array([1.0, -0.4, 0, 0, 0.3, 0])
        for _ in range(4000):
            state = outer_period(state, 2, s, alpha, beta, 0.0, tau, mu, nesterov, pull_to, delay)
        return not np.abs(state).max() < 1

    with np.errstate(over="ignore", invalid="ignore"):
        assert (grows(0.98 * limit), grows(1.02 * limit)) == (False, True)


# Round-robin EASGD


def round_robin_round(state, p, s, alpha, delta=0.0, tau=1):
    """A round of Algorithm 2 on x²/2 in which the workers act in turn; state (x¹, v¹, …, xᵖ, vᵖ, x̃)."""
    x, v, center = state[:-1:2].copy(), state[1::2].copy(), state[-1]
    for t in range(tau):  # all workers' first steps, then all second steps: the order that a real run has
        for i in range(p):
            pull = alpha * (x[i] - center) if t == 0 else 0.0
            v[i] = delta * v[i] - s * (x[i] + delta * v[i])
            x[i] += v[i] - pull
            center += pull
    return np.array([*np.column_stack([x, v]).ravel(), center])


@pytest.mark.parametrize("p", [1, 2, 5])
@pytest.mark.parametrize(("delta", "tau"), [(0.0, 1), (0.0, 3), (0.9, 1), (0.9, 4)])
def test_round_robin_map_is_that_of_the_recursion(p, delta, tau):
    ours = round_robin.composed_map(p, 0.3, 0.2, momentum=delta, tau=tau)
    recursion = as_matrix(lambda state: round_robin_round(state, p, 0.3, 0.2, delta, tau), 2 * p + 1)
    np.testing.assert_allclose(ours, recursion, atol=1e-14)
    assert round_robin.radius(p, 0.3, 0.2, momentum=delta, tau=tau) == pytest.approx(modulus(recursion), abs=1e-6)


@pytest.mark.parametrize(
    ("p", "even"), [(1, 0.0), (3, 0.0), (9, 0.0), (2, 0.061), (4, 0.0132), (8, 0.0033), (20, 5.4e-4)]
)
def test_round_robin_region_is_exact_for_odd_p_and_almost_for_even(p, even):
    beyond = 0.0
    for s in np.linspace(0.05, 1.95, 20):
        limit = round_robin.largest_moving_rate(s)
        assert limit == pytest.approx((4 - 2 * s) / (4 - s), rel=1e-14)
        assert round_robin.radius(p, s, 0.0) <= 1 + 1e-12
        for factor, stable in ((0.2, True), (1 - 1e-6, True), (1 + 1e-6 + 1.1 * even, False), (1.2, False)):
            assert (round_robin.radius(p, s, factor * limit) < 1) == stable, (s, factor)
        further = first_unstable(
            lambda alphas, s=s: np.array([round_robin.radius(p, s, alpha) for alpha in alphas]), end=1.1, points=20
        )
        beyond = max(beyond, further / limit - 1)
    assert beyond == pytest.approx(even, rel=0.05, abs=1e-6)
    assert round_robin.radius(p, 2.01, 0.01) > 1
    assert round_robin.radius(p, 0.1, -0.01) > 1


def test_easgd_trajectory_of_the_paper():
    centers = round_robin.center_trajectory(3, 0.001, 0.0025, start=1000, turns=50_000)
    for turn, value in {5000: 320, 10_000: 94, 20_000: 8.3, 50_000: 5.6e-3}.items():
        assert centers[turn] == pytest.approx(value, rel=0.01)
    state = np.array([1000.0, 0, 1000, 0, 1000, 0, 1000])
    after = np.linalg.matrix_power(round_robin.composed_map(3, 0.001, 0.0025), 1000) @ (state * [1, 0, 1, 0, 1, 0, 1])
    assert after[-1] == pytest.approx(centers[3000], rel=1e-10)


# ADMM


def admm_round(state, p, lr, rho):
    """Equations 8-11 on x²/2, each worker once; state (λ¹, x¹, …, λᵖ, xᵖ, x̃)."""
    lagrange, x, center = state[:-1:2].copy(), state[1::2].copy(), state[-1]
    for i in range(p):
        lagrange[i] = lagrange[i] - (x[i] - center)
        x[i] = (x[i] - lr * x[i] + lr * rho * (lagrange[i] + center)) / (1 + lr * rho)
        center = (x - lagrange).mean()
    return np.array([*np.column_stack([lagrange, x]).ravel(), center])


@pytest.mark.parametrize(("p", "figure"), [(3, 1.000974), (8, 1.002258)])
def test_admm_radius_of_the_paper(p, figure):
    assert admm.radius(p, 0.001, 2.5) == pytest.approx(figure, abs=1e-6)
    recursion = as_matrix(lambda state: admm_round(state, p, 0.001, 2.5), 2 * p + 1)
    np.testing.assert_allclose(admm.composed_map(p, 0.001, 2.5), recursion, atol=1e-14)


@pytest.mark.parametrize(
    ("p", "lr", "rho", "figure", "largest", "unstable"),
    [(3, 2.7e-4, 8.2, 1.00135, 1.00138, 0.15), (8, 4.4e-4, 10.0, 1.00285, 1.00286, 0.35)],
)
def test_admm_over_the_papers_box(p, lr, rho, figure, largest, unstable):
    assert admm.radius(p, lr, rho) == pytest.approx(figure, abs=5e-6)
    radii = admm.radius(p, np.linspace(0, 0.01, 61)[1:, None], np.linspace(0, 10, 61)[None, 1:])
    assert figure - 5e-6 < radii.max() < largest + 5e-6
    assert (radii > 1 + 1e-9).mean() == pytest.approx(unstable, abs=0.01)


def test_admm_looks_convergent_and_then_diverges():
    centers = admm.center_trajectory(3, 0.001, 2.5, start=1000, turns=100_000)
    for turn, value in {100: 967, 1000: 717, 10_000: 35}.items():
        assert centers[turn] == pytest.approx(value, rel=0.02)
    assert abs(centers[20_000]) == pytest.approx(25, rel=0.05)
    assert abs(centers[50_000]) > 1e4
    assert abs(centers[100_000]) > 1e12
    state = np.array([0.0, 1000] * 3 + [1000])
    for _ in range(20):
        state = admm_round(state, 3, 0.001, 2.5)
    assert state[-1] == pytest.approx(centers[60], rel=1e-12)


# DOWNPOUR, and the asynchronous center's variance


def simulated_center(kind, p, s, tau, rounds, runs=4000):
    """The center of many noisy runs after some rounds, the workers in turn; σ = h = 1."""
    generator = np.random.default_rng(0)
    x, v, center = np.zeros((p, runs)), np.zeros((p, runs)), np.zeros(runs)
    for _, i in itertools.product(range(rounds), range(p)):
        pull = 0.0
        if kind == "easgd":
            pull = 0.9 / p * (x[i] - center)
            center = center + pull
        else:
            center = center + v[i]
            x[i], v[i] = center, 0
        for t in range(tau):
            step = -s * (x[i] - generator.standard_normal(runs))
            x[i] += step - (pull if t == 0 else 0.0)
            v[i] += step
    return center


@pytest.mark.parametrize(
    ("kind", "p", "s", "tau"), [("downpour", 4, 0.1, 1), ("downpour", 3, 0.1, 3), ("easgd", 4, 0.2, 3)]
)
def test_variance_of_the_center_of_workers_in_turn(kind, p, s, tau):
    centers = simulated_center(kind, p, s, tau, rounds=40 if kind == "downpour" else 60)
    if kind == "downpour":
        expected = downpour.steady_variance(p, s, tau)
    else:
        expected = round_robin.steady_variance(p, s, 0.9 / p, tau=tau)
    assert np.mean(centers**2) == pytest.approx(expected, rel=0.1)  # standard error 2.2 %


@pytest.mark.parametrize("tau", [1, 4, 16, 64])
def test_downpour_fails_with_many_workers_or_a_long_period_and_easgd_does_not(tau):
    figures = {1: 0.0058, 4: 0.0088, 16: np.inf, 64: np.inf}  # of free-running workers; ours are in turn
    assert downpour.steady_variance(16, 0.01, tau) == pytest.approx(figures[tau], rel=0.01 if tau == 1 else 0.1)
    assert (downpour.radius(16, 0.01, tau) < 1) == np.isfinite(figures[tau])
    elastic = round_robin.steady_variance(16, 0.01, 0.9 / 16, tau=tau)
    assert 2e-4 < elastic < 3e-4


def test_steady_covariance_solves_its_equation():
    step, noise = np.array([[0.9, 0.3], [-0.2, 0.8]]), np.array([[2.0, 0.5], [0.5, 1.0]])
    found = steady_covariance(step, noise)
    np.testing.assert_allclose(found, step @ found @ step.T + noise, rtol=1e-12)
    assert np.isinf(steady_covariance(1.2 * step, noise)).all()


# Bias and variance


def center_recursion(steps, p, lr, h, alpha, beta, start, delta=0.0, tau=1):
    """Mean and variance of the center after each step, by the moments of all p workers' (x, v) and the center."""
    exchange = as_matrix(lambda state: synchronous_period(state, p, lr * h, alpha, beta, delta, 1), 2 * p + 1)
    local = as_matrix(lambda state: synchronous_period(state, p, lr * h, 0.0, 0.0, delta, 1), 2 * p + 1)
    entering = np.vstack([np.eye(p), np.eye(p), np.zeros((1, p))]) * lr
    mean, covariance, found = np.array(start), np.zeros((2 * p + 1, 2 * p + 1)), []
    for t in range(steps):
        step = exchange if t % tau == 0 else local
        mean, covariance = step @ mean, step @ covariance @ step.T + entering @ entering.T
        found.append((mean[-1], covariance[-1, -1]))
    return np.array(found)


@pytest.mark.parametrize(
    ("p", "lr", "h", "alpha"), [(1, 0.1, 2.0, 0.5), (4, 0.1, 1.0, 0.225), (4, 0.3, 5.0, 0.1), (16, 0.02, 3.0, 0.9 / 16)]
)
def test_bias_and_variance_are_those_of_the_recursion(p, lr, h, alpha):
    workers, center, t = np.linspace(-1, 3, p), 2.5, np.arange(1, 121)
    exact = center_recursion(120, p, lr, h, alpha, p * alpha, [*workers, *np.zeros(p), center])
    bias = center_error.bias(t, scaled_lr=lr * h, alpha=alpha, workers=workers, center=center)
    np.testing.assert_allclose(bias, exact[:, 0], rtol=0, atol=1e-12)
    variance = center_error.variance(t, lr=lr, curvature=h, alpha=alpha, workers=p, noise=2.0)
    np.testing.assert_allclose(variance, 4 * exact[:, 1], rtol=1e-10, atol=1e-16)
    limit = center_error.steady_variance(lr=lr, curvature=h, alpha=alpha, workers=p)
    long = center_recursion(4000, p, lr, h, alpha, p * alpha, np.zeros(2 * p + 1))[-1, 1]
    assert limit == pytest.approx(long, rel=1e-10)


def test_variance_of_simulated_training():
    generator, p, lr, h, alpha = np.random.default_rng(0), 4, 0.2, 1.5, 0.2
    x, center = np.full((200_000, p), 1.0), np.full(200_000, 1.0)
    for _ in range(10):
        difference = x - center[:, None]
        x = x - lr * (h * x - generator.standard_normal(x.shape)) - alpha * difference
        center = center + alpha * difference.sum(1)
    expected = center_error.variance(10, lr=lr, curvature=h, alpha=alpha, workers=p)
    assert center.var() == pytest.approx(expected, rel=0.02)  # standard error 0.3 %
    bias = center_error.bias(10, scaled_lr=lr * h, alpha=alpha, workers=np.ones(p), center=1.0)
    assert center.mean() == pytest.approx(bias, abs=5 * np.sqrt(expected / 200_000))


@pytest.mark.parametrize(("delta", "tau", "beta"), [(0.0, 1, 0.9), (0.9, 1, 0.9), (0.9, 5, 0.4), (0.0, 7, 1.2)])
def test_moments_with_momentum_and_period(delta, tau, beta):
    p, lr, h, alpha = 3, 0.1, 2.0, 0.25
    exact = center_recursion(40, p, lr, h, alpha, beta, [*np.ones(p), *np.zeros(p), 1], delta, tau)[-1]
    found = center_error.moments(
        40, scaled_lr=lr * h, alpha=np.array([alpha]), beta=np.array([beta]), workers=p, momentum=delta, tau=tau
    )
    assert found.bias == pytest.approx(exact[0], abs=1e-13)
    assert found.variance == pytest.approx(exact[1] * h**2, rel=1e-10)


def test_variance_falls_with_the_number_of_workers():
    for beta, s in itertools.product((0.2, 0.9, 1.5), (0.05, 0.5, 1.5)):
        p = 1_000_000
        found = p * center_error.steady_variance(lr=s, curvature=1.0, alpha=beta / p, workers=p)
        assert found == pytest.approx(center_error.many_workers_limit(s, beta), rel=1e-4)
    unstable = center_error.steady_variance(lr=0.4, curvature=1.0, alpha=0.9, workers=1)
    assert np.isinf(unstable)


@pytest.mark.parametrize(("lr", "alpha"), [(0.1, 0.1), (0.4, 0.2)])
def test_average_over_time_attains_the_optimal_variance(lr, alpha):
    p, h, steps = 4, 2.0, 20_000
    limit = center_error.double_average_limit(h, p)
    assert limit == 1 / (p * h**2)
    found = center_error.double_average_variance(steps, lr=lr, curvature=h, alpha=alpha, workers=p)
    assert steps * found == pytest.approx(limit, rel=2e-3)
    # Against every pair of times: V z_t = t⁻² Σ_jk Cov(x̃_j, x̃_k).
    step = as_matrix(lambda state: synchronous_period(state, p, lr * h, alpha, p * alpha, 0.0, 1), 2 * p + 1)
    noise = np.vstack([np.eye(p), np.eye(p), np.zeros((1, p))]) * lr
    influence = [np.linalg.matrix_power(step, k)[-1] @ noise for k in range(30)]  # of ξ_s on x̃_{s+1+k}
    of_noise = [np.sum(influence[: 29 - s], axis=0) for s in range(29)]
    exact = np.sum(np.square(of_noise)) / 30**2
    found = center_error.double_average_variance(30, lr=lr, curvature=h, alpha=alpha, workers=p)
    assert found == pytest.approx(exact, rel=1e-10)


# Multiplicative noise


@pytest.mark.parametrize("p", [1, 2, 3])
def test_second_moments_are_those_of_all_outcomes(p):
    lr, alpha, beta, steps, values = 0.4, 0.3, 0.8, 3, (0.2, 2.4)  # u takes two values: mean 1.3, variance 1.21
    moments = np.zeros(4)
    for outcome in itertools.product(values, repeat=p * steps):
        x, center = np.ones(p), 1.0
        for u in np.reshape(outcome, (steps, p)):
            difference = x - center
            x, center = x - lr * u * x - alpha * difference, center + beta * difference.mean()
        moments += [x[0] ** 2, x[0] * x[-1], x[0] * center, center**2]
    step = multiplicative.moment_map(lr, alpha, beta, workers=p, mean=1.3, spread=1.21)
    found = np.linalg.matrix_power(step, steps) @ np.ones(4)
    compared = [0, 2, 3] if p == 1 else [0, 1, 2, 3]
    np.testing.assert_allclose(found[compared], moments[compared] / 2 ** (p * steps), rtol=1e-12)


def test_elastic_averaging_does_not_widen_the_learning_rates_as_large_batches_do():
    for spread in (0.5, 2.0, 5.0):
        one_worker = multiplicative.large_batch_largest_lr(workers=1, spread=spread)
        assert multiplicative.large_batch_radius(one_worker, workers=1, spread=spread) == pytest.approx(1)
        large_batch = multiplicative.large_batch_largest_lr(workers=256, spread=spread)
        assert large_batch > 1.95  # of the 2 without noise
        elastic = multiplicative.largest_lr(0.9 / 256, 0.9, workers=256, spread=spread)
        assert elastic == pytest.approx(one_worker, rel=0.02)


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize("spread", [0.5, 2.0, 10.0])
def test_under_multiplicative_noise_a_finite_number_of_workers_is_best(beta, spread):
    counts, lrs = (1, 2, 4, 8, 16, 32, 64, 256), np.linspace(0.01, 1.9, 100)
    best = [min(multiplicative.radius(lr, beta / p, beta, workers=p, spread=spread) for lr in lrs) for p in counts]
    assert counts[int(np.argmin(best))] in (8, 16, 32)


# Double well


@pytest.mark.parametrize("rho", [0.2, 0.6, 0.7, 0.9])
def test_hessian_at_the_barrier(rho):
    def gradient(z):
        return np.array(
            [
                z[0] ** 3 - z[0] + rho * (z[0] - z[2]),
                z[1] ** 3 - z[1] + rho * (z[1] - z[2]),
                rho * (2 * z[2] - z[0] - z[1]),
            ]
        )

    point = np.array([np.sqrt(1 - rho), -np.sqrt(1 - rho), 0.0])
    np.testing.assert_allclose(gradient(point), 0, atol=1e-14)
    differences = [(gradient(point + 1e-5 * e) - gradient(point - 1e-5 * e)) / 2e-5 for e in np.eye(3)]
    hessian = double_well.hessian_at_barrier(rho)
    np.testing.assert_allclose(hessian, differences, atol=1e-8)
    assert (np.linalg.eigvalsh(hessian).min() > 0) == (rho < double_well.RELEASING_PENALTY)


@pytest.mark.parametrize(("rho", "stuck"), [(0.3, True), (0.64, True), (0.69, False), (0.9, False)])
def test_center_stays_on_the_barrier_below_two_thirds(rho, stuck):
    end = double_well.descend(rho, start=(1.0, -0.9, 0.05))
    expected = [np.sqrt(1 - rho), -np.sqrt(1 - rho), 0] if stuck else [1, 1, 1]
    np.testing.assert_allclose(end, expected, atol=1e-4)
    together = double_well.descend(rho, start=(0.1, 0.1, 0.1))  # a common start is the remedy
    np.testing.assert_allclose(together, 1, atol=1e-4)


# Advice and the command


def test_default_moving_rate_is_the_strategys():
    for given in ({}, {"alpha": 0.1}, {"beta": 0.5}, {"alpha": 0.1, "beta": 0.7}):
        expected = rates.MovingRates(**given).resolve(8, lr=0.1)
        assert Setting(0.1, 1.0, 8, **given).rates == pytest.approx(expected)


@pytest.mark.parametrize("delta", [0.0, 0.9])
@pytest.mark.parametrize("tau", [1, 10])
def test_margins_are_where_simulated_training_diverges(delta, tau):
    setting = Setting(lr=0.1, curvature=10.0, workers=4, tau=tau, momentum=delta)

    def error_after(scaled_lr, alpha):
        period = as_matrix(lambda state: synchronous_period(state, 4, scaled_lr, alpha, 4 * alpha, delta, tau), 9)
        return np.abs(np.linalg.matrix_power(period, 4000) @ [1.0, -1, 2, 3, 0, 0, 0, 0, 1]).max()

    alpha, _ = setting.rates
    with np.errstate(over="ignore", invalid="ignore"):
        assert error_after(0.99 * setting.largest_lr * 10, alpha) < 1e-3
        assert not error_after(1.01 * setting.largest_lr * 10, alpha) < 1e3
        curvatures = np.linspace(0.02, 1, 12)
        assert max(error_after(s, 0.98 * setting.largest_alpha) for s in curvatures) < 1
        assert not max(error_after(s, 1.02 * setting.largest_alpha) for s in curvatures) < 1e3


def test_rules_for_the_moving_rate():
    setting = Setting(lr=0.1, curvature=1.0, workers=8, tau=1, steps=200)
    rules = moving_rates_by_rule(setting)
    assert rules["0.9/p"] == rates.DEFAULT_BETA / 8
    alphas = np.linspace(0.001, 0.3, 600)
    contraction = np.maximum(np.abs(1 - alphas), np.abs(1 - 9 * alphas))
    assert rules["2/(p+2)"] == pytest.approx(alphas[contraction.argmin()], abs=6e-4)
    errors = []
    for alpha in alphas[alphas < setting.largest_alpha]:
        found = center_recursion(200, 1, 0.1, 1.0, alpha, 8 * alpha, [1, 0, 1])[-1]
        errors.append(found[0] ** 2 + found[1] / 8)  # the workers' mean is one worker with an eighth of the noise
    assert rules["variance-optimal"] == pytest.approx(alphas[int(np.argmin(errors))], rel=0.05)
    later = moving_rates_by_rule(Setting(lr=0.1, curvature=1.0, workers=8, tau=1, steps=2000))
    assert later["variance-optimal"] < rules["variance-optimal"]


def test_round_robin_order_is_judged_where_it_is_computed():
    stable_in_turn_only = Setting(0.1, 1.0, 8, tau=1, alpha=0.5)
    assert round_robin_is_stable(stable_in_turn_only)
    assert not stable_in_turn_only.is_stable
    assert round_robin_is_stable(Setting(0.1, 1.0, 1024, tau=1))
    assert round_robin_is_stable(Setting(0.1, 1.0, 1024, tau=1, alpha=0.99)) is False
    assert round_robin_is_stable(Setting(0.1, 1.0, 4, alpha=-0.1)) is False
    assert round_robin_is_stable(Setting(1.0, 1.0, 2, tau=1, alpha=0.7))
    assert round_robin_is_stable(Setting(1.0, 1.0, 3, tau=1, alpha=0.7)) is False
    assert round_robin_is_stable(Setting(0.1, 1.0, 1024)) is None
    assert round_robin_is_stable(Setting(0.1, 1.0, 4, alpha=0.1, beta=0.9)) is None
    assert round_robin_is_stable(Setting(0.1, 10.0, 4, momentum=0.9))
    assert round_robin_is_stable(Setting(0.1, 14.0, 4, momentum=0.9)) is False


def test_check_answers_for_the_issues_setting(capsys):
    words = ["check", "lr=0.1", "curvature=10", "workers=8", "tau=10", "alpha=0.1", "momentum=0.9"]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert "synchronous           stable" in text
    assert "1.35 times this lr" in text  # Nesterov's own limit is 3.8 / 2.8 = 1.357
    for rule in ("this setting", "0.9/p", "2/(p+2)", "variance-optimal"):
        assert rule in text
    assert run([*words, "lr=0.2"]) == 1
    assert "synchronous           UNSTABLE" in capsys.readouterr().out
    assert run([*words, "lr=100", "tau=300"]) == 1  # overflows
    assert "UNSTABLE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage"),
        (["check", "lr=0.1"], "curvature=..., workers=..."),
        (["check", "lr=0.1", "curvature=1", "worker=4"], "did you mean workers?"),
        (["check", "lr=0.1", "curvature=1", "workers=4.5"], "no whole number"),
        (["check", "lr=fast", "curvature=1", "workers=4"], "lr=fast: this is no number"),
        (["check", "lr", "curvature=1", "workers=4"], "write key=value"),
        (["check", "lr=0.1", "curvature=1", "workers=0"], "workers=0"),
        (["check", "lr=0.1", "curvature=1", "workers=4", "momentum=1"], "momentum=1.0"),
        (["check", "lr=0.1", "curvature=1", "workers=4", "steps=1000000"], "at most 100000"),
        (["check", "lr=0.1", "curvature=1", "workers=4", "alpha=2"], "alpha=2.0"),
        (["check", "lr=0.1", "curvature=1", "workers=4", "noise=-1"], "noise=-1.0"),
    ],
)
def test_command_names_what_is_wrong(words, message):
    answer = run(words)
    assert isinstance(answer, str)
    assert message in answer


def test_help_explains_every_key(capsys):
    assert run(["check", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in Setting.__dataclass_fields__:
        assert f"  {name} " in shown
    assert "p ≥ 1. (int, required)" in shown
    assert "Communication period τ ≥ 1. (int, 10)" in shown
    assert "points" not in shown
    assert run(["help"]) == 0
    assert "Points along each side of a map. (int, 120)" in capsys.readouterr().out


def test_results_show_the_commands_and_their_output(capsys):
    folder = ROOT / "examples" / "results" / "stability"
    text = (folder / "README.md").read_text(encoding="utf-8")
    draw, check = re.findall(r"```console\neasgd-stability (.*)\n```", text)
    assert draw == f"draw directory={folder.relative_to(ROOT)}"
    assert {path.name for path in folder.glob("*.png")} == set(re.findall(r"\((\w+\.png)\)", text))
    assert run(check.split()) == 0
    assert f"```output\n{capsys.readouterr().out}```" in text


def test_command_draws_all_figures(tmp_path, capsys):
    assert run(["draw", f"directory={tmp_path / 'new'}", "points=12"]) == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"admm.png", "regions.png", "center_variance.png"}
    assert capsys.readouterr().out.count(".png") == 3


def test_the_analysis_needs_neither_torch_nor_matplotlib():
    code = (
        "import sys; from lightning_easgd.lab.stability.stability_command import run;"
        " run('check lr=0.1 curvature=1 workers=4'.split());"
        " sys.exit(', '.join({'torch', 'scipy', 'matplotlib', 'lightning'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_tables_of_the_documentation():
    page = (ROOT / "docs" / "outer_momentum.md").read_text()
    new = {"alpha": 0.9, "beta": 0.9, "workers": 4, "tau": 16, "outer_momentum": 0.5, "pull_to": "new"}
    for k in (0, 4, 8, 15):
        radii = [float(outer.radius(s, **new, delay=k)) for s in (0.001, 0.01, 0.1, 1)]
        limit = outer.largest_scaled_lr(**new, delay=k)
        assert f"| {k} | {' | '.join(f'{each:.3f}' for each in radii)} | {limit:.2f} |" in page
    rows = {
        "EASGD": [(0.225, 0.9, {})],
        "local SGD": [
            (1, 1, {"pull_to": "new"}),
            (1, 0.7, {"pull_to": "new", "outer_momentum": 0.9, "outer_nesterov": True}),
            (0.9, 0.9, {"pull_to": "new", "outer_momentum": 0.5}),
        ],
        "α = β = 0.9 with μ = 0.5 and the old": [(0.9, 0.9, {"outer_momentum": 0.5})],
    }
    for start, settings in rows.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {start}") and line.count("|") == 4]
        for alpha, beta, family in settings:
            limits = [
                outer.largest_scaled_lr(alpha, beta, workers=4, tau=16, momentum=momentum, **family)
                for momentum in (0.0, 0.9)
            ]
            assert row.endswith(f"| {limits[0]:.2f} | {limits[1]:.2f} |")
