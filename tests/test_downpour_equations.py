"""The DOWNPOUR family's equations against hand-made numbers and the usual form of Nesterov's method."""

import pytest
import torch

from lightning_easgd.method.downpour import nesterov_push_, polyak_rate, running_average_
from lightning_easgd.method.rules import PlainRule

# Two workers with f_i = (x - b_i)^2 / 2, b = (1, -3), all at 1, η = 0.1, τ = 2, in turn: (x1, x2, center) after both.
DOWNPOUR = [
    (1, 0.6, 1),
    (1, 0.24, 1),
    (1, -0.084, 0.24),
    (1, -0.3756, 0.24),
    (0.316, -0.63804, -0.3756),
    (0.3844, -0.874236, -0.3756),
]


def scalar(value):
    return torch.tensor([float(value)], dtype=torch.float64)


def test_downpour_follows_the_golden_trace():
    eta, optima = 0.1, (1.0, -3.0)
    center, workers, updates = scalar(1), [scalar(1), scalar(1)], [scalar(0), scalar(0)]
    for clock, expected in enumerate(DOWNPOUR):
        for x, v, optimum in zip(workers, updates, optima, strict=True):
            if clock % 2 == 0:
                PlainRule().move_([center], v, 1.0, version=0)
                x.copy_(center)
                v.zero_()
            step = -eta * (x - optimum)
            x.add_(step)
            v.add_(step)
        assert [float(x) for x in (*workers, center)] == pytest.approx(expected, abs=1e-6)


def test_a_gradient_with_rate_minus_eta_is_an_update():
    by_update, by_gradient = scalar(2), scalar(2)
    PlainRule().move_([by_update], scalar(-0.1 * 3), 1.0, version=0)
    PlainRule().move_([by_gradient], scalar(3), -0.1, version=0)
    assert torch.equal(by_update, by_gradient)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_nesterov_push_is_nesterovs_method_in_look_ahead_coordinates(momentum):
    eta, curvature = 0.05, 1.5
    position, velocity = 1.0, 0.0  # v' = δv - η g(x + δv), x' = x + v'
    center, kept = scalar(1), scalar(0)  # y = x + δv
    for _ in range(20):
        velocity = momentum * velocity - eta * curvature * (position + momentum * velocity)
        position += velocity
        nesterov_push_([center], [kept], [curvature * center], momentum, rate=-eta)
        assert float(kept) == pytest.approx(velocity, abs=1e-12)
        assert float(center) == pytest.approx(position + momentum * velocity, abs=1e-12)


def test_nesterov_push_agrees_with_torch():
    parameter = torch.nn.Parameter(scalar(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, nesterov=True)
    center, velocity = scalar(1), scalar(0)
    for step in range(10):
        parameter.grad = parameter.detach() - step
        optimizer.step()
        nesterov_push_([center], [velocity], [-0.1 * (center - step)], 0.9)
        assert float(center) == pytest.approx(float(parameter.detach()), abs=1e-12)


def test_polyak_average_is_the_mean_of_all_centers():
    centers = [1.0, -2.0, 4.0, 8.0]
    average = scalar(centers[0])
    for update, center in enumerate(centers[1:], start=1):
        running_average_([average], [scalar(center)], polyak_rate(update))
        assert float(average) == pytest.approx(sum(centers[: update + 1]) / (update + 1))


def test_constant_rate_average():
    average = scalar(1)
    running_average_([average], [scalar(3)], 0.001)
    assert float(average) == pytest.approx(1.002)
