"""Center rules on an in-process center: golden traces, conservation, averages."""

import pickle
import threading

import pytest
import torch

from lightning_easgd.method.rules import (
    AsymmetricExchange,
    AveragedRule,
    ConstantRate,
    NesterovRule,
    PlainRule,
    PolyakRate,
    PushExchange,
    SymmetricExchange,
)
from lightning_easgd.served_center import CenterTimeoutError, InProcessCenter, Layout
from lightning_easgd.served_center.layout import place_chunks

ETA, ALPHA, OPTIMA = 0.1, 0.2, (1.0, -3.0)
# (x1, x2, center) after both workers' turns, two workers in turn, τ = 2.
EASGD = [
    (1, 0.6, 1),
    (1, 0.24, 1),
    (1, 0.068, 0.848),
    (1, -0.2388, 0.848),
    (0.9696, -0.29148, 0.65496),
    (0.97264, -0.562332, 0.65496),
]
EAMSGD = [
    (1, 0.6, 1),
    (1, -0.084, 1),
    (1, -0.71284, 0.7832),
    (1, -1.6265244, 0.7832),
    (0.95664, -2.013339444, 0.33594312),
    (0.960976, -2.822725358, 0.33594312),
]
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


def center_of(exchange, initial, *, elements=4):
    layout = Layout.cut([(0, len(initial))], elements)
    center = InProcessCenter(layout, initial.dtype, exchange, timeout=1.0)
    for store, values in enumerate(exchange.rule.initial_stores(initial)):
        center.write_all(values, store)
    return center


def value(center, store=0):
    into = torch.empty(center.chunks[-1].stop, dtype=center.dtype)
    center.read_all(into, store)
    return into


@pytest.mark.parametrize(("momentum", "trace"), [(0.0, EASGD), (0.9, EAMSGD)])
def test_elastic_rule_follows_the_golden_trace(momentum, trace):
    center = center_of(SymmetricExchange(), scalar(1))
    workers, velocities = [scalar(1), scalar(1)], [scalar(0), scalar(0)]
    for clock, expected in enumerate(trace):
        for x, v, optimum in zip(workers, velocities, OPTIMA, strict=True):
            v.mul_(momentum)
            v.sub_(ETA * (x + v - optimum))  # v is δv by now: the gradient at the look-ahead point
            if clock % 2 == 0 and clock:
                message = x.clone()
                center.exchange(0, message, ALPHA)
                x.sub_(message)
            x.add_(v)
        assert [float(x) for x in (*workers, value(center))] == pytest.approx(expected, abs=1e-6)


def test_asymmetric_rule_answers_the_unscaled_difference():
    center = center_of(AsymmetricExchange(), scalar(1))
    message = scalar(3)
    center.exchange(0, message, 0.25)
    assert float(message) == 2.0
    assert float(value(center)) == 1.5


def test_downpour_rule_follows_the_golden_trace():
    center = center_of(PushExchange(), scalar(1))
    workers, updates = [scalar(1), scalar(1)], [scalar(0), scalar(0)]
    for clock, expected in enumerate(DOWNPOUR):
        for x, v, optimum in zip(workers, updates, OPTIMA, strict=True):
            if clock % 2 == 0:
                message = v.clone()
                center.exchange(0, message, 1.0)
                x.copy_(message)
                v.zero_()
            step = -ETA * (x - optimum)
            x.add_(step)
            v.add_(step)
        assert [float(x) for x in (*workers, value(center))] == pytest.approx(expected, abs=1e-6)


def test_one_mdownpour_worker_is_torchs_nesterov_sgd():
    center = center_of(PushExchange(NesterovRule(0.9)), scalar(1))
    parameter = torch.nn.Parameter(scalar(1))
    optimizer = torch.optim.SGD([parameter], lr=ETA, momentum=0.9, nesterov=True)
    for step in range(10):
        parameter.grad = parameter.detach() - step
        message = parameter.grad.clone()
        center.exchange(0, message, -ETA)
        optimizer.step()
        assert float(message) == pytest.approx(float(parameter.detach()), abs=1e-12)


@pytest.mark.parametrize("rate", [PolyakRate(), ConstantRate(0.25)])
def test_averaged_rule_keeps_the_average_beside_the_center(rate):
    center = center_of(PushExchange(AveragedRule(PlainRule(), rate)), scalar(1))
    centers, expected = [1.0], 1.0
    for update in (1.0, -4.0, 2.5):
        center.exchange(0, scalar(update), 1.0)
        centers.append(centers[-1] + update)
        expected = sum(centers) / len(centers) if isinstance(rate, PolyakRate) else 0.75 * expected + 0.25 * centers[-1]
        assert float(value(center)) == pytest.approx(centers[-1])
        assert float(value(center, 1)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "rule",
    [
        SymmetricExchange(),
        AsymmetricExchange(),
        PushExchange(),
        PushExchange(NesterovRule(0.5)),
        PushExchange(AveragedRule(NesterovRule(0.5), ConstantRate(0.1))),
    ],
)
def test_rules_survive_pickling(rule):
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_chunks_respect_segments_and_size():
    layout = Layout.cut([(0, 10), (10, 10), (10, 17)], 4)
    assert [(part.start, part.stop) for part in layout.chunks] == [(0, 3), (3, 6), (6, 10), (10, 13), (13, 17)]
    assert layout.segments == (0, 0, 0, 2, 2)


@pytest.mark.parametrize("nodes", [1, 2, 3, 8])
def test_chunks_are_spread_evenly_in_order(nodes):
    layout = Layout.cut([(0, 1000)], 10)
    placed = place_chunks(layout, nodes)
    assert placed == sorted(placed)
    assert all(abs(placed.count(node) - 100 / nodes) <= 1 for node in range(nodes))


def test_each_segment_has_its_own_rate_and_versions_count_exchanges():
    layout = Layout.cut([(0, 3), (3, 9)], 4)
    center = InProcessCenter(layout, torch.float32, SymmetricExchange())
    messages = torch.full((9,), 8.0)
    assert center.exchange_all(messages, [0.5, 0.25]) == [0, 0, 0]
    assert messages.tolist() == [4.0] * 3 + [2.0] * 6
    assert center.exchange_all(messages, [0.0, 0.0]) == [1, 1, 1]


def test_concurrent_threads_lose_no_update():
    center = center_of(SymmetricExchange(), torch.zeros(10, dtype=torch.float64))
    workers = [torch.full((10,), 1024.0, dtype=torch.float64) for _ in range(4)]

    def work(x):
        for _ in range(100):
            message = x.clone()
            center.exchange_all(message, [0.25])
            x.sub_(message)

    threads = [threading.Thread(target=work, args=(x,)) for x in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(sum(workers) + value(center), torch.full((10,), 4096.0, dtype=torch.float64))


def test_a_stuck_thread_gives_an_error_and_leaves_other_chunks_alone():
    center = center_of(SymmetricExchange(), torch.zeros(8))
    with center._holding(0):
        with pytest.raises(CenterTimeoutError, match="chunk 0"):
            center.exchange(0, torch.ones(4), 0.5)
        center.exchange(1, torch.ones(4), 0.5)


def test_a_narrow_center_is_refused():
    with pytest.raises(ValueError, match=r"InProcessCenter\(dtype=torch.bfloat16\)"):
        InProcessCenter(Layout.cut([(0, 4)]), torch.bfloat16, SymmetricExchange())
