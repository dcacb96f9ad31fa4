"""The simulator: its numbers against golden traces and recursions, its times against formulas."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import round_robin_trace, synchronous_trace
from test_elastic import ASYNCHRONOUS, ASYNCHRONOUS_MOMENTUM, SYNCHRONOUS
from torch import nn
from toys import MINIMA

from lightning_easgd.lab.simulation import (
    AsynchronousSchedule,
    Cluster,
    Link,
    LocalSGD,
    Quadratic,
    RoundRobinSchedule,
    Stall,
    SynchronousSchedule,
    TreeSchedule,
    simulate,
    spectrum,
    time_run,
)
from lightning_easgd.lab.simulation.events import Failure, Finish
from lightning_easgd.lab.simulation.networks import ClassificationProblem
from lightning_easgd.lab.simulation.problems import Problem
from lightning_easgd.method.rates import MovingRates

NO_EXCHANGE = MovingRates(alpha=0.0)


def toy(workers):
    """f_i(x) = ½(x - b_i)² from x = 1."""
    minima = torch.tensor(MINIMA[:workers], dtype=torch.float64)[:, None]
    return Quadratic(torch.ones(1), torch.ones(1, dtype=torch.float64), minima=minima)


def rows(schedule, workers, steps, alpha, beta=None, delta=0.0):
    """Rows (x_1, …, x_p, x̃) after each step: a run of its own for each."""
    table = []
    for made in range(1, steps + 1):
        run = simulate(
            toy(workers), schedule, Cluster(workers), LocalSGD(0.1, delta), MovingRates(alpha, beta), steps=made
        )
        table.append([*run.learner.positions().flatten().tolist(), run.learner.center.item()])
    return np.array(table)


@pytest.mark.parametrize(
    ("schedule", "delta", "golden"),
    [
        (SynchronousSchedule(1), 0.0, SYNCHRONOUS),
        (RoundRobinSchedule(2), 0.0, ASYNCHRONOUS),
        (AsynchronousSchedule(2), 0.0, ASYNCHRONOUS),
        (RoundRobinSchedule(2), 0.9, ASYNCHRONOUS_MOMENTUM),
    ],
)
def test_golden_traces(schedule, delta, golden):
    assert rows(schedule, 2, 6, 0.2, delta=delta) == pytest.approx(np.array(golden), abs=1e-9)


@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize(("alpha", "beta", "delta"), [(0.2, None, 0.0), (0.1, 0.7, 0.9)])
def test_synchronous_recursion(tau, workers, alpha, beta, delta):
    expected = synchronous_trace(workers, 9, tau, alpha, workers * alpha if beta is None else beta, delta=delta)
    assert rows(SynchronousSchedule(tau), workers, 9, alpha, beta, delta) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [1, 3])
def test_round_robin_recursion(tau):
    expected = round_robin_trace(MINIMA[:3], 9, tau, 0.3)
    assert rows(RoundRobinSchedule(tau), 3, 9, 0.3) == pytest.approx(expected, abs=1e-12)


def test_one_worker_without_exchange_is_torch_sgd():
    parameter = nn.Parameter(torch.linspace(1, 2, 20))
    optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01)
    curvatures = spectrum(20).float()
    for _ in range(25):
        parameter.grad = parameter.detach() * curvatures
        optimizer.step()
    buffer = optimizer.state[parameter]["momentum_buffer"]
    problem = Quadratic(curvatures, torch.linspace(1, 2, 20))
    optimizer = LocalSGD(0.3, 0.9, weight_decay=0.01)
    run = simulate(problem, AsynchronousSchedule(4), Cluster(1), optimizer, NO_EXCHANGE, steps=25)
    assert torch.equal(run.learner.positions()[0], parameter.detach().add(buffer, alpha=0.3 * 0.9))
    assert run.times[-1] == pytest.approx(25 * 0.01)


def test_center_that_follows_one_worker():
    """α = 0, β = 1: the center is the worker of its last exchange, which is how plain SGD is simulated."""
    run = simulate(toy(1), AsynchronousSchedule(5), Cluster(1), LocalSGD(0.1), MovingRates(0.0, 1.0), steps=11)
    assert run.learner.center.item() == pytest.approx(1.0)
    far = Quadratic(torch.ones(3), torch.ones(3))
    run = simulate(far, AsynchronousSchedule(5), Cluster(1), LocalSGD(0.1), MovingRates(0.0, 1.0), steps=11)
    assert run.learner.center.tolist() == pytest.approx([0.9**10] * 3)


class Linear(Problem):
    """f_i = (i + 1) Σ x."""

    message_bytes = 0

    def start(self):
        return torch.zeros(50, dtype=torch.float64)

    def gradients(self, points, workers, clocks):
        return torch.tensor(workers, dtype=points.dtype)[:, None].add(1).expand_as(points).contiguous()

    def error(self, point):
        return 0.0


UNEVEN = {"jitter": 0.5, "speeds": [1, 1, 0.2, 1, 3, 1], "link": Link(0.02, 1e5), "message_bytes": 400}


@pytest.mark.parametrize(
    "schedule", [AsynchronousSchedule(3), RoundRobinSchedule(3), TreeSchedule(3, 6, groups=2), SynchronousSchedule(3)]
)
def test_conservation(schedule):
    """Σ x_i + Σ x̃ moves by the gradients alone, whatever the order of the exchanges."""
    run = simulate(Linear(), schedule, Cluster(6, **UNEVEN), LocalSGD(0.5), steps=40)
    total = run.learner.positions().sum(0) + sum(run.learner.centers)
    assert run.learner.center.abs().min() > 1
    assert total.tolist() == pytest.approx([-0.5 * 40 * sum(range(1, 7))] * 50)


def test_order_of_exchanges_is_that_of_time_not_of_numbers():
    """The slow worker's exchange comes after all others' of its clock: the center has seen them."""
    cluster = Cluster(2, stalls=[Stall(0, clock=1, seconds=1.0)])
    run = simulate(toy(2), AsynchronousSchedule(2), cluster, LocalSGD(0.1), MovingRates(0.2), steps=3)
    x1, x2, center = 1.0, 0.24, 1.0  # at clock 2, by hand
    second = 0.2 * (x2 - center)
    first = 0.2 * (x1 - (center + second))
    assert run.learner.center.item() == pytest.approx(center + second + first)


def test_noise_does_not_depend_on_who_steps_together():
    curvatures, start = spectrum(10), torch.ones(10, dtype=torch.float64)
    run = [
        simulate(Quadratic(curvatures, start, noise=0.5), schedule, cluster, LocalSGD(0.1), NO_EXCHANGE, steps=50)
        for schedule, cluster in [
            (SynchronousSchedule(50), Cluster(6)),
            (AsynchronousSchedule(7), Cluster(6, **UNEVEN)),
        ]
    ]
    first, second = (each.learner.positions() for each in run)
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_noisy_center_has_the_variance_of_the_analysis():
    from lightning_easgd.stability import center_error

    problem = Quadratic(torch.ones(4000), torch.zeros(4000), noise=1.0)
    run = simulate(problem, SynchronousSchedule(1), Cluster(8), LocalSGD(0.1), steps=151)
    expected = center_error.variance(150, lr=0.1, curvature=1.0, alpha=0.9 / 8, workers=8)
    assert run.learner.center.var().item() == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("upper_tau", [2, 4])
def test_tree_against_a_recursion(upper_tau):
    """Two groups of two; centers forward when both of their workers have exchanged for the 1st or the 2nd time."""
    steps, tau, alpha, upper = 12, 2, 0.3, 0.3
    minima = np.array(MINIMA)
    x, groups, root = np.ones(4), np.ones(2), 1.0
    for t in range(steps):
        pulls = np.zeros(4)
        if t and t % tau == 0:
            for i in range(4):
                pulls[i] = alpha * (x[i] - groups[i // 2])
                groups[i // 2] += pulls[i]
            if t % upper_tau == 0:
                for group in range(2):
                    d = upper * (groups[group] - root)
                    groups[group] -= d
                    root += d
        x = x - 0.1 * (x - minima) - pulls
    schedule = TreeSchedule(tau, upper_tau, groups=2)
    run = simulate(toy(4), schedule, Cluster(4), LocalSGD(0.1), MovingRates(alpha), steps=steps)
    assert run.learner.positions().flatten().tolist() == pytest.approx(x.tolist())
    assert [each.item() for each in run.learner.centers] == pytest.approx([root, *groups])


def test_tree_of_one_level_is_the_star():
    def center(schedule):
        return simulate(toy(4), schedule, Cluster(4, jitter=0.3), LocalSGD(0.1), steps=31).learner.center

    star = center(AsynchronousSchedule(3))
    assert torch.equal(center(TreeSchedule(3, 30, groups=0)), star)
    assert not torch.equal(center(TreeSchedule(3, 30, groups=2)), star)


def test_dead_worker_drops_out():
    """From its death on the others' exchanges are those of two workers, with α = β / 2."""
    cluster = Cluster(3, failures={1: 0.045})
    events = list(RoundRobinSchedule(2).timeline(cluster, 9))
    assert [event.worker for event in events if isinstance(event, Finish)] == [0, 2]
    sharing = [(event.worker, event.clock, event.sharing) for event in events if hasattr(event, "sharing")]
    assert sharing == [
        *((0, 2, 3), (1, 2, 3), (2, 2, 3), (0, 4, 3), (1, 4, 3), (2, 4, 3)),
        *((0, 6, 2), (2, 6, 2), (0, 8, 2), (2, 8, 2)),
    ]
    run = simulate(toy(3), RoundRobinSchedule(2), cluster, LocalSGD(0.1), MovingRates(beta=0.6), steps=3)
    assert len(run.learner.positions()) == 3  # it had made its steps by then
    run = simulate(toy(3), RoundRobinSchedule(2), cluster, LocalSGD(0.1), MovingRates(beta=0.6), steps=400)
    assert run.learner.positions().shape == (2, 1)
    # Two minima pull for ever: the center ends between them, where the dead worker's has no part.
    assert run.learner.center.item() == pytest.approx((MINIMA[0] + MINIMA[2]) / 2, abs=0.05)


@pytest.mark.parametrize(("died", "waiting"), [(0.045, [0, 2]), (0.0, [0, 2])])
def test_turns_pass_over_a_dead_worker(died, waiting):
    cluster = Cluster(3, failures={1: died}, link=Link(latency=0.01))
    finished = [event.worker for event in RoundRobinSchedule(1).timeline(cluster, 30) if isinstance(event, Finish)]
    assert sorted(finished) == waiting


def test_synchronous_run_ends_with_a_dead_worker():
    cluster = Cluster(3, failures={1: 0.5})
    events = list(SynchronousSchedule(10).timeline(cluster, 1000))
    assert events[-1] == Failure(0.5, 1, ends_run=True)
    timing = time_run(SynchronousSchedule(10), cluster, 1000)
    assert (timing.seconds, timing.completed) == (0.5, False)
    assert time_run(AsynchronousSchedule(10), cluster, 1000).completed


@pytest.mark.parametrize(
    "schedule",
    [SynchronousSchedule(4), AsynchronousSchedule(4), RoundRobinSchedule(4), TreeSchedule(4, 12, groups=2)],
)
def test_times_do_not_go_back(schedule):
    cluster = Cluster(6, failures={3: 1.0}, **UNEVEN)
    times = [event.time for event in schedule.timeline(cluster, 60)]
    assert times == sorted(times)
    assert len(times) > 3


def test_hidden_communication_costs_nothing():
    for schedule in (SynchronousSchedule(10), AsynchronousSchedule(10)):
        timing = time_run(schedule, Cluster(4, link=Link(0.001, 1e9), message_bytes=1e5), 100)
        assert timing.seconds == pytest.approx(100 * 0.01)
        assert timing.waiting == pytest.approx(0)


def test_synchronous_time_on_a_slow_link():
    """An all-reduce longer than τ steps sets the pace: 2·3·(L + S / 4B) for each exchange."""
    link = Link(0.01, 1e6)
    reduction = 6 * (0.01 + 1e6 / 4 / 1e6)
    cluster = Cluster(4, link=link, message_bytes=1e6)
    assert link.ring_all_reduce(1e6, 4) == pytest.approx(reduction)
    # 9 exchanges: the first after 10 steps; the last is waited for at the end.
    assert time_run(SynchronousSchedule(10), cluster, 100).seconds == pytest.approx(0.1 + 9 * reduction)


def test_straggler():
    """Synchronous workers have the pace of the slowest, asynchronous ones their own."""
    cluster = Cluster(3, speeds=[1, 1, 1 / 3])
    ends = {event.worker: event.time for event in AsynchronousSchedule(10).timeline(cluster, 100)
            if isinstance(event, Finish)}  # fmt: skip
    assert ends == {0: pytest.approx(1.0), 1: pytest.approx(1.0), 2: pytest.approx(3.0)}
    ends = {event.worker: event.time for event in SynchronousSchedule(10).timeline(cluster, 100)
            if isinstance(event, Finish)}  # fmt: skip
    # The fast ones have made their last steps, and wait for the last reduction, which begins at the slow one's step 90.
    assert ends == {0: pytest.approx(2.7), 1: pytest.approx(2.7), 2: pytest.approx(3.0)}


def test_served_center_is_a_serial_queue():
    """Four vectors come at once over a link that each occupies for a second: the n-th is answered after n seconds."""
    cluster = Cluster(4, step_seconds=0.01, link=Link(0.0, 1e6), message_bytes=1e6, chunk_bytes=1)
    ends = [event.time for event in AsynchronousSchedule(1).timeline(cluster, 2) if isinstance(event, Finish)]
    assert ends == pytest.approx([1.01, 2.01, 3.01, 4.01], abs=1e-4)
    sharded = Cluster(4, step_seconds=0.01, link=Link(0.0, 1e6), message_bytes=1e6, chunk_bytes=1, shards=4)
    ends = [event.time for event in AsynchronousSchedule(1).timeline(sharded, 2) if isinstance(event, Finish)]
    assert ends == pytest.approx([1.01] * 4, abs=1e-4)  # a worker's own link remains


def test_round_robin_takes_turns():
    """Each exchange is a round trip that the next one waits for."""
    cluster = Cluster(3, step_seconds=0.01, link=Link(latency=0.05))
    ends = [event.time for event in RoundRobinSchedule(1).timeline(cluster, 2) if isinstance(event, Finish)]
    assert ends == pytest.approx([0.11, 0.21, 0.31])


def test_upper_link_delays_the_root_alone():
    slow = Cluster(4, upper_link=Link(latency=5.0))
    timing = time_run(TreeSchedule(2, 4, groups=2), slow, 100)
    assert timing.seconds == pytest.approx(1.0)
    times = [event.time for event in TreeSchedule(2, 4, groups=2).timeline(slow, 100)]
    assert times[-1] > 5


def test_jitter_has_the_mean_and_the_deviation_asked_for():
    times = Cluster(1, step_seconds=0.01, jitter=0.3).step_times(0)
    single = np.array([times.take(1) for _ in range(4000)])
    many = np.array([times.take(25) for _ in range(4000)])
    assert single.mean() == pytest.approx(0.01, rel=0.03)
    assert single.std() == pytest.approx(0.003, rel=0.06)
    assert many.mean() == pytest.approx(0.25, rel=0.01)
    assert many.std() == pytest.approx(0.003 * 5, rel=0.06)


def test_time_to_error():
    problem = Quadratic(torch.ones(4), torch.ones(4))
    run = simulate(problem, SynchronousSchedule(1), Cluster(2), LocalSGD(0.1), steps=500, target=0.02)
    assert run.errors[0] == pytest.approx(2.0)
    assert run.errors[-1] <= 0.02 < run.errors[-2]
    assert run.time_to_error(0.02) == run.times[-1]
    assert run.time_to_error(1e-9) == math.inf


@pytest.mark.filterwarnings("ignore:.*is unstable")
def test_divergence_ends_the_run():
    problem = Quadratic(torch.ones(4), torch.ones(4))
    run = simulate(problem, SynchronousSchedule(1), Cluster(2), LocalSGD(9.0), steps=5000)
    assert not math.isfinite(run.errors[-1])
    assert len(run.errors) < 150


class Fixed(nn.Module):
    """A network with parameters of several shapes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, inputs):
        return self.layers(inputs)


def test_gradients_of_a_network_with_a_short_last_batch():
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(10, 4, generator=generator), torch.randint(3, (10,), generator=generator)
    orders = {(worker, epoch): torch.randperm(10, generator=generator) for worker in range(2) for epoch in range(2)}
    network = Fixed()
    problem = ClassificationProblem(
        network, inputs, labels, (inputs, labels), batch_size=4, order=lambda worker, epoch: orders[worker, epoch]
    )
    # Worker 0 is at the last batch of its epoch, of two samples, worker 1 at the second batch of its next.
    gradients = problem.gradients(problem.start().repeat(2, 1), [0, 1], [2, 4])
    for gradient, batch in zip(gradients, (orders[0, 0][8:], orders[1, 1][4:8]), strict=True):
        loss = nn.functional.cross_entropy(network(inputs[batch]), labels[batch])
        expected = torch.autograd.grad(loss, list(network.parameters()))
        assert gradient.tolist() == pytest.approx(torch.cat([each.flatten() for each in expected]).tolist(), abs=1e-6)
    wrong = (network(inputs).argmax(1) != labels).double().mean()
    assert problem.error(problem.start()) == pytest.approx(wrong.item())


@pytest.mark.parametrize(
    ("layer", "owner"), [(nn.BatchNorm1d(4), "FlatNetwork"), (nn.Dropout(0.5), "ClassificationProblem")]
)
def test_networks_whose_state_is_not_parameters_are_refused(layer, owner):
    network = nn.Sequential(layer, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=owner + r"\(network=Sequential\): it has"):
        ClassificationProblem(network, torch.zeros(1), torch.zeros(1), (torch.zeros(1),) * 2, batch_size=1, order=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cluster(0), r"Cluster\(workers=0\)"),
        (lambda: Cluster(2, speeds=[1.0]), r"one positive speed for each of 2 workers"),
        (lambda: Cluster(2, failures={5: 1.0}), r"the workers are 0 to 1"),
        (lambda: Cluster(2, jitter=-1), r"Cluster\(jitter=-1\)"),
        (lambda: Link(-1), r"Link\(latency=-1\)"),
        (lambda: Link(0, 0), r"Link\(bandwidth=0\)"),
        (lambda: SynchronousSchedule(0), r"SynchronousSchedule\(tau=0\)"),
        (lambda: TreeSchedule(10, 5), r"upper_tau=5"),
        (lambda: TreeSchedule(groups=-1), r"groups=-1"),
        (lambda: LocalSGD(0), r"LocalSGD\(lr=0\)"),
        (lambda: LocalSGD(0.1, 1.0), r"LocalSGD\(momentum=1.0\)"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lightning_is_not_imported():
    code = (
        "import sys, lightning_easgd.lab.simulation, lightning_easgd.lab.simulation.simulate_command\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=True)
    assert shown.stdout.strip() == "[]"
