"""Which rates follow from which, and what is refused."""

import pytest

from lightning_easgd.method.rates import MovingRates


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0.225, 0.9)),
        ({"beta": 0.4}, (0.1, 0.4)),
        ({"alpha": 0.1}, (0.1, 0.4)),
        ({"alpha": 0.1, "beta": 0.9}, (0.1, 0.9)),
        ({"rho": 2.0}, (0.2, 0.8)),
        ({"rho": 2.0, "beta": 0.5}, (0.2, 0.5)),
        ({"alpha": 0.0}, (0.0, 0.0)),
    ],
)
def test_rates_that_follow(given, expected):
    assert MovingRates(**given).resolve(workers=4, lr=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(
    "given",
    [
        {"alpha": -1.0},
        {"alpha": 1.01},
        {"alpha": float("nan")},
        {"beta": 0.0},
        {"beta": 2.0},
        {"beta": float("nan")},
        {"rho": 0.0},
        {"rho": -1.0},
        {"alpha": 0.1, "rho": 1.0},
    ],
)
def test_values_out_of_range(given):
    with pytest.raises(ValueError, match=rf"^EASGDStrategy\({next(iter(given))}=.*: .*; "):
        MovingRates(**given)


@pytest.mark.parametrize(
    ("given", "workers", "unstable"),
    [
        ({}, 1, False),
        ({}, 1000, False),
        ({"alpha": 2 / 5}, 4, False),
        ({"alpha": 0.41}, 4, True),
        ({"alpha": 0.5}, 4, True),
        ({"alpha": 0.5, "beta": 1.4}, 4, False),
        ({"alpha": 0.7, "beta": 1.4}, 4, True),
        ({"alpha": -0.1}, 2, True),
        ({"rho": 100.0}, 4, False),
    ],
)
def test_instability_at_every_learning_rate(given, workers, unstable):
    problem = MovingRates(**given).instability(workers)
    assert (problem is not None) == unstable
    if unstable and given["alpha"] > 0:
        assert "2/(p+1)" in problem
