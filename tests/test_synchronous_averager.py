"""The averager without processes: order of events, layouts, and workers that meet."""

import time

import pytest
import torch
from channels import LoneChannel, line_on, run_threads
from reference import synchronous_trace
from toys import MINIMA

from lightning_easgd.averagers import ExchangeError, Meeting, SynchronousAverager, all_reduced_sums
from lightning_easgd.averagers.sync.pull import PullToNew
from lightning_easgd.method.position import LookAheadPosition, make_nesterov
from lightning_easgd.method.rates import MovingRates


def quadratic_step(averager, x, optimizer, minimum):
    averager.begin()
    optimizer.zero_grad()
    (0.5 * (x - minimum) ** 2).sum().backward()
    optimizer.step()
    averager.finish()


def averager_of(parameters, line, *, lr=0.1, tau=2, number=0, **rates):
    optimizer = torch.optim.SGD(parameters, lr=lr)
    return on_line(optimizer, line, number=number, tau=tau, rates=MovingRates(**rates)), optimizer


def on_line(optimizer, line, *, tau, **keywords):
    return SynchronousAverager(optimizer, line, all_reduced_sums(lambda: line.data, tau), tau=tau, **keywords)


def test_a_reduction_is_waited_for_only_when_the_next_exchange_is_due():
    events = []
    line = line_on(LoneChannel([]), LoneChannel(events))
    x = torch.ones(3, requires_grad=True)
    averager, optimizer = averager_of([x], line, tau=3)
    events.clear()
    for step in range(8):
        events.append(f"step {step}")
        quadratic_step(averager, x, optimizer, 0.0)
    assert events == [
        *("step 0", "step 1", "step 2"),
        *("step 3", "start", "step 4", "step 5"),
        *("step 6", "wait", "start", "step 7"),
    ]
    averager.complete()
    assert events[-1] == "wait"


def test_the_pull_waits_for_nothing():
    events = []
    line = line_on(LoneChannel([]), LoneChannel(events))
    x = torch.ones(1, requires_grad=True)
    averager, optimizer = averager_of([x], line, tau=1, alpha=0.5, beta=1.0)
    quadratic_step(averager, x, optimizer, 0.0)
    events.clear()
    quadratic_step(averager, x, optimizer, 0.0)
    assert x.item() == pytest.approx(0.9 - 0.09 - 0.5 * (0.9 - 1.0))
    assert events == ["start"]


@pytest.mark.parametrize(("delay", "waits_after"), [(0, 2), (1, 3), (2, 4)])
def test_a_pull_to_the_new_center_is_waited_for_when_it_is_due_and_not_before(delay, waits_after):
    events = []
    line = line_on(LoneChannel([]), LoneChannel(events))
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    averager = on_line(optimizer, line, tau=3, number=0, pull=PullToNew(delay), rates=MovingRates(0.5, 1.0))
    events.clear()
    for step in range(5):
        quadratic_step(averager, x, optimizer, 0.0)
        events.append(f"step {step}")
    expected = [f"step {step}" for step in range(5)]
    expected.insert(waits_after, "wait")
    expected.insert(2, "start")
    assert events == expected


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("tau", [1, 2, 5])
def test_trace_of_threads(workers, tau):
    def work(rank, line):
        x = torch.ones(1, requires_grad=True)
        averager, optimizer = averager_of([x], line, tau=tau, alpha=0.2)
        rows = []
        for _ in range(12):
            quadratic_step(averager, x, optimizer, MINIMA[rank])
            averager.complete()
            rows.append((x.item(), averager.center.flat.item()))
        return rows

    traces = run_threads(work, workers)
    expected = synchronous_trace(workers, 12, tau, 0.2, 0.2 * workers)
    for rank, rows in enumerate(traces):
        assert [x for x, _ in rows] == pytest.approx(expected[:, rank], abs=1e-6)
        assert [center for _, center in rows] == pytest.approx(expected[:, -1], abs=1e-6)


def test_center_starts_at_rank_zero_whatever_the_others_hold():
    def work(rank, line):
        x = torch.full((2,), float(rank + 5), requires_grad=True)
        averager, _ = averager_of([x], line)
        return averager.center.flat.tolist(), x.tolist()

    assert run_threads(work, 3) == [([5.0, 5.0], [float(rank + 5)] * 2) for rank in range(3)]


def test_every_group_has_the_rate_of_its_learning_rate():
    line = line_on(LoneChannel([]), LoneChannel([]))
    a, b = torch.ones(1, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}])
    averager = on_line(optimizer, line, number=0, tau=1, rates=MovingRates(rho=1.0))
    averager.begin()
    averager.finish()
    with torch.no_grad():
        a.fill_(2.0), b.fill_(2.0)
    averager.begin()
    averager.finish()
    averager.complete()
    assert (a.item(), b.tolist()) == (pytest.approx(1.9), pytest.approx([1.8, 1.8]))
    assert averager.center.flat.tolist() == pytest.approx([1.1, 1.2, 1.2])


def test_look_ahead_uses_the_learning_rate_of_the_step_that_wrote_the_buffer():
    line = line_on(LoneChannel([]), LoneChannel([]))
    y = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([y], lr=0.1)
    make_nesterov(optimizer, 0.9)
    averager = on_line(
        optimizer, line, number=0, tau=1, rates=MovingRates(alpha=0.5, beta=1.0), position=LookAheadPosition
    )
    quadratic_step(averager, y, optimizer, 0.0)
    # b = g = 1, y = 1 - 0.1 (1 + 0.9) = 0.81, x = y + 0.1 · 0.9 · b = 0.9, the plain gradient step
    optimizer.param_groups[0]["lr"] = 0.01
    averager.begin()
    averager.complete()
    assert averager.center.flat.item() == pytest.approx(0.9)


def test_parameters_added_later_join_with_their_value_of_then():
    line = line_on(LoneChannel([]), LoneChannel([]))
    a, b = torch.ones(1, requires_grad=True), torch.full((2,), 7.0, requires_grad=True)
    averager, optimizer = averager_of([a], line, tau=2, alpha=0.5, beta=1.0)
    for _ in range(3):
        quadratic_step(averager, a, optimizer, 0.0)
    averager.complete()
    center = averager.center.flat.item()
    assert center != 1.0
    optimizer.add_param_group({"params": [b]})
    averager.begin()
    b.grad = torch.ones(2)
    optimizer.step()
    averager.finish()
    assert averager.center.flat.tolist() == [center], "the workers lay the center out anew at their next exchange"
    averager.begin()
    assert averager.center.flat.tolist() == [center, 7.0, 7.0]
    averager.complete()
    assert averager.center.flat.tolist()[1:] == pytest.approx([6.9, 6.9])


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_center_is_at_least_float32_and_the_worker_comes_back_bit_for_bit(dtype, wider):
    line = line_on(LoneChannel([]), LoneChannel([]))
    x = torch.randn(50, dtype=dtype, requires_grad=True)
    averager, optimizer = averager_of([x], line, tau=1, alpha=0.3)
    for _ in range(3):
        quadratic_step(averager, x, optimizer, 0.0)
    averager.complete()
    before = x.detach().clone()
    averager.show_center()
    assert averager.center.flat.dtype is wider
    assert torch.equal(x.detach(), averager.center.flat.to(dtype))
    averager.show_worker()
    assert torch.equal(x.detach(), before)


def test_workers_with_different_numbers_of_steps_meet():
    """A worker without data answers the others' exchanges; the sum Σ x_i + x̃ is conserved through all of it."""

    def work(rank, line):
        x = torch.tensor([float(rank)], requires_grad=True)
        averager, optimizer = averager_of([x], line, lr=0.1, tau=2)
        for _ in range((4, 11, 7)[rank]):
            averager.begin()
            x.grad = torch.ones(1)
            optimizer.step()
            averager.finish()
        line.meet(Meeting.TRAINING_END, [averager])
        return x.item(), averager.center.flat.item(), line.statistics.exchanges

    results = run_threads(work, 3)
    assert len({center for _, center, _ in results}) == 1
    assert sum(x for x, _, _ in results) + results[0][1] == pytest.approx(0 + 1 + 2 + 0 - 0.1 * (4 + 11 + 7), abs=1e-5)
    assert [exchanges for _, _, exchanges in results] == [5, 5, 5]


def test_a_stop_request_reaches_all_workers_at_the_same_exchange():
    def work(rank, line):
        x = torch.ones(1, requires_grad=True)
        averager, optimizer = averager_of([x], line, tau=2)
        for step in range(20):
            if rank == 1 and step == 5:
                line.stop_requested = True
            quadratic_step(averager, x, optimizer, 0.0)
            if line.stop_agreed:
                return step
        return None

    assert run_threads(work, 3) == [8, 8, 8]


def test_workers_at_different_meetings_are_told():
    def work(rank, line):
        averager, _ = averager_of([torch.ones(1, requires_grad=True)], line)
        line.meet(Meeting.VALIDATION if rank else Meeting.TRAINING_END, [averager])

    with pytest.raises(ExchangeError, match="limit_train_batches"):
        run_threads(work, 2)


def test_workers_that_step_different_optimizers_are_told():
    def work(rank, line):
        averagers = [averager_of([torch.ones(1, requires_grad=True)], line, tau=1, number=n) for n in range(2)]
        for averager, _ in averagers:
            averager.begin(), averager.finish()
        averagers[rank][0].begin()
        averagers[rank][0].complete()

    with pytest.raises(ExchangeError, match="different exchanges"):
        run_threads(work, 2)


def test_statistics_count_a_ring_all_reduce():
    def work(rank, line):
        x = torch.ones(1000, requires_grad=True)
        averager, optimizer = averager_of([x], line, tau=5)
        for step in range(11):
            if (rank, step) == (3, 5):
                time.sleep(0.3)  # it comes late to the first exchange, for which the others wait at the second
            quadratic_step(averager, x, optimizer, 0.0)
        return line.statistics

    *others, late = run_threads(work, 4)
    for statistics in (*others, late):
        assert statistics.exchanges == 2
        assert statistics.bytes_sent == 2 * round(1.5 * (4 * 1000 + 8 * 9))
    assert 0 <= late.seconds_waited < 0.2 < min(statistics.seconds_waited for statistics in others)


def test_elastic_distance_is_that_of_the_last_exchange():
    line = line_on(LoneChannel([]), LoneChannel([]))
    x = torch.zeros(2, requires_grad=True)
    averager, _ = averager_of([x], line, tau=1)
    averager.begin(), averager.finish()
    assert averager.elastic_distance() is None
    with torch.no_grad():
        x.copy_(torch.tensor([3.0, 4.0]))
    averager.begin(), averager.finish()
    assert averager.elastic_distance() == pytest.approx(5.0)
