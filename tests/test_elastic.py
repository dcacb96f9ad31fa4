"""The equations against the golden traces and their invariants."""

import pytest
import torch

from lightning_easgd.method.elastic import (
    elastic_difference,
    elastic_difference_,
    elastic_pull_,
    elastic_push_,
    moving_rate_from_center_rate,
    moving_rate_from_penalty,
    nesterov_position_,
    penalty_from_moving_rate,
)
from lightning_easgd.method.rules import PlainRule

MINIMA = (1.0, -3.0)
ASYNCHRONOUS = [
    (1, 0.6, 1),
    (1, 0.24, 1),
    (1, 0.068, 0.848),
    (1, -0.2388, 0.848),
    (0.9696, -0.29148, 0.65496),
    (0.97264, -0.562332, 0.65496),
]
ASYNCHRONOUS_MOMENTUM = [
    (1, 0.6, 1),
    (1, -0.084, 1),
    (1, -0.71284, 0.7832),
    (1, -1.6265244, 0.7832),
    (0.95664, -2.013339444, 0.33594312),
    (0.960976, -2.822725358, 0.33594312),
]
SYNCHRONOUS = [
    (1, 0.6, 1),
    (1, 0.32, 0.92),
    (0.984, 0.108, 0.816),
    (0.952, -0.0612, 0.708),
    (0.908, -0.20124, 0.60296),
    (0.856192, -0.320276, 0.503128),
]


def one(value: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64)]


@pytest.mark.parametrize(("delta", "rows"), [(0.0, ASYNCHRONOUS), (0.9, ASYNCHRONOUS_MOMENTUM)])
def test_algorithms_1_and_2_in_round_robin_order(delta, rows):
    parameters = [one(1.0)[0].requires_grad_() for _ in MINIMA]
    optimizers = [torch.optim.SGD([x], lr=0.1, momentum=delta, nesterov=delta > 0) for x in parameters]
    center = one(1.0)
    for t, row in enumerate(rows):
        for y, b, optimizer in zip(parameters, MINIMA, optimizers, strict=True):
            x = [y.detach().clone()]
            if "momentum_buffer" in optimizer.state[y] and delta:
                nesterov_position_(x, [optimizer.state[y]["momentum_buffer"]], 0.1 * delta)
            difference = elastic_difference(x, center)
            optimizer.zero_grad()
            (0.5 * (y - b) ** 2).sum().backward()
            optimizer.step()
            if t % 2 == 0:
                with torch.no_grad():
                    elastic_pull_([y], difference, 0.2)
                    elastic_push_(center, difference, 0.2)
        positions = []
        for y, optimizer in zip(parameters, optimizers, strict=True):
            x = [y.detach().clone()]
            if delta:
                nesterov_position_(x, [optimizer.state[y]["momentum_buffer"]], 0.1 * delta)
            positions.append(x[0].item())
        assert (*positions, center[0].item()) == pytest.approx(row, abs=1e-9)


def test_synchronous_jacobi_form():
    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    center = one(1.0)
    for row in SYNCHRONOUS:
        difference = x - center[0]
        x = x - 0.1 * (x - torch.tensor(MINIMA)) - 0.2 * difference
        PlainRule().move_(center, difference.sum().expand(1), 0.4 / len(x), version=0)
        assert (*x.tolist(), center[0].item()) == pytest.approx(row, abs=1e-6)


def exchange(workers, centers, alpha, center_alpha=None):
    differences = elastic_difference(workers, centers)
    in_place = [worker.clone() for worker in workers]
    elastic_difference_(in_place, centers)
    assert all(map(torch.equal, in_place, differences))
    elastic_pull_(workers, differences, alpha)
    elastic_push_(centers, differences, alpha if center_alpha is None else center_alpha)


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0])
def test_symmetric_exchange_conserves_the_sum(alpha):
    workers = [torch.randn(3, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    centers = [torch.randn(3, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    before = [w + c for w, c in zip(workers, centers, strict=True)]
    exchange(workers, centers, alpha)
    for total, w, c in zip(before, workers, centers, strict=True):
        torch.testing.assert_close(w + c, total, rtol=0, atol=1e-15)


def test_exchange_uses_old_values_on_both_sides():
    worker, center = one(1.0), one(0.0)
    exchange(worker, center, 0.25, center_alpha=0.5)
    assert (worker[0].item(), center[0].item()) == (0.75, 0.5)


@pytest.mark.parametrize(("alpha", "worker", "center"), [(0.0, 4.0, 2.0), (1.0, 2.0, 4.0)])
def test_exchange_at_the_ends_of_the_range(alpha, worker, center):
    workers, centers = one(4.0), one(2.0)
    exchange(workers, centers, alpha)
    assert (workers[0].item(), centers[0].item()) == (worker, center)


def test_narrow_worker_is_rounded_once():
    worker = [torch.ones(1, dtype=torch.bfloat16)]
    difference = elastic_difference(worker, [torch.full((1,), 0.9)])
    assert difference[0].dtype is torch.float32
    elastic_pull_(worker, difference, 0.05)
    assert worker[0].dtype is torch.bfloat16
    assert worker[0].item() == torch.tensor(1 - 0.05 * (1 - 0.9)).bfloat16().item()


def test_rate_conversions_invert_each_other():
    assert moving_rate_from_center_rate(0.9, 4) == 0.225
    assert penalty_from_moving_rate(moving_rate_from_penalty(2.5, lr=0.1), lr=0.1) == 2.5
