"""The family beyond the paper: momentum at the center, a pull to the new center, and delayed answers."""

import re
import threading
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from reference import MINIMA, synchronous_trace
from test_fabric import trace as fabric_trace
from toys import Quadratic, Regression, fitted, quiet_trainer

from lightning_easgd import EASGDStrategy
from lightning_easgd.averagers.served.averager import CenterPart
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.method.schedules import LinearSchedule

LR = 0.1


def family_trace(
    workers, steps, *, tau, alpha, beta, mu=0.0, nesterov=False, pull_to="old", delay=0, asynchronous=False, delta=0.0
):
    """Rows (x_1, …, x_p, x̃) after each step, written after the equations; asynchronous workers take turns."""
    minima = np.array(MINIMA[:workers])
    x, v, center, velocity = np.ones(workers), np.zeros(workers), 1.0, 0.0
    due, rows = [], []

    def move(mean):
        nonlocal center, velocity
        velocity = mu * velocity + mean
        center += beta * (mean + mu * velocity if nesterov else velocity)

    def exchange(t):
        before = x.copy()
        if not asynchronous:
            old = center
            move((before - center).mean())
            pulls = alpha * (before - (old if pull_to == "old" else center))
        else:
            pulls = np.zeros(workers)
            for i in range(workers):
                old = center
                move((before[i] - center) / workers)
                pulls[i] = alpha * (before[i] - (old if pull_to == "old" else center))
        due.append((t + delay, pulls))

    def pull(t):
        nonlocal x
        while due and due[0][0] <= t:
            x = x - due.pop(0)[1]

    for t in range(steps):
        if pull_to == "old" and t and t % tau == 0:
            exchange(t)
        v = delta * v - LR * (x + delta * v - minima)
        x = x + v
        if pull_to == "old":
            pull(t)
        else:
            pull(t + 1)
            if (t + 1) % tau == 0:
                exchange(t + 1)
                pull(t + 1)
        rows.append((*x, center))
    return np.array(rows)


def train(strategy, steps, workers):
    module = Quadratic(lr=LR, steps=steps)
    fitted(module, strategy, workers)
    return module.trace, module.x.item()


FAMILY = [
    {"beta": 0.9, "outer_momentum": 0.5},
    {"beta": 0.5, "outer_momentum": 0.9, "outer_nesterov": True},
    {"alpha": 1, "beta": 1, "pull_to": "new"},
    {"alpha": 1, "beta": 0.7, "pull_to": "new", "outer_momentum": 0.9, "outer_nesterov": True},
    {"alpha": 0.9, "beta": 0.9, "pull_to": "new", "outer_momentum": 0.5, "delay": 1},
    {"alpha": 0.3, "beta": 0.6, "pull_to": "new", "delay": 2},
    {"alpha": 0.8, "beta": 0.9, "pull_to": "new", "delay": 1, "outer_momentum": 0.4, "momentum": 0.9},
]


def reference_of(workers, steps, tau, arguments, **how):
    values = dict(arguments)
    mu, nesterov = values.pop("outer_momentum", 0.0), values.pop("outer_nesterov", False)
    values.setdefault("alpha", values["beta"] / workers)
    values["delta"] = values.pop("momentum", 0.0)
    return family_trace(workers, steps, tau=tau, mu=mu, nesterov=nesterov, **values, **how)


def check(traces, expected, case, both=True):
    for rank, (trace, center) in enumerate(traces):
        assert np.array(trace)[:, 0] == pytest.approx(expected[:, rank], abs=2e-6), case
        assert center == pytest.approx(expected[-1, -1], abs=2e-6), case
        if both:
            assert np.array(trace)[:, 1] == pytest.approx(expected[:, -1], abs=2e-6), case


def test_the_reference_holds_the_papers_method():
    assert family_trace(3, 9, tau=2, alpha=0.2, beta=0.6) == pytest.approx(
        synchronous_trace(3, 9, tau=2, alpha=0.2, beta=0.6)
    )


@pytest.mark.parametrize(("workers", "periods"), [(2, (1, 4)), (3, (3,))])
@pytest.mark.parametrize("backend", [None, "gloo"])
def test_synchronous_traces(workers, periods, backend):
    cases = [(tau, arguments) for tau in periods for arguments in FAMILY if arguments.get("delay", 0) < tau]

    def run():
        return [
            train(EASGDStrategy(tau=tau, process_group_backend=backend, **arguments), 3 * tau, workers)
            for tau, arguments in cases
        ]

    for (tau, arguments), *traces in zip(cases, *run_ranks(run, workers), strict=True):
        check(traces, reference_of(workers, 3 * tau, tau, arguments), (tau, arguments))


@pytest.mark.parametrize("mode", [{}, {"mode": "async", "order": "round_robin"}])
def test_rates_of_each_workers_own_pull_to_the_new_center(mode):
    """They are in what workers give to the sum already; the pull to the new center takes them by itself."""
    cases = [(rates, delay) for rates in ({"rho": 3.0}, {"alpha": LinearSchedule(0.3, 0.3, 5)}) for delay in (0, 1)]

    def run():
        return [
            train(EASGDStrategy(tau=2, pull_to="new", delay=delay, **rates, **mode), 6, 2) for rates, delay in cases
        ]

    for case, *traces in zip(cases, *run_ranks(run, 2), strict=True):
        expected = family_trace(
            2, 6, tau=2, alpha=0.3, beta=0.6, pull_to="new", delay=case[1], asynchronous=bool(mode)
        )  # fmt: skip
        check(traces, expected, case, both=not mode)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("arguments", [FAMILY[3], FAMILY[4]])
def test_fabric_with_and_without_closures(arguments, closure):
    """The next gradient is taken at the pulled point, also where it is taken before the optimizer is called."""
    rows = fabric_trace(2, 9, closure, FabricEASGDStrategy(tau=3, **arguments))
    expected = reference_of(2, 9, 3, arguments)
    assert np.column_stack([*rows[:, :, 0], rows[0, :, 1]]) == pytest.approx(expected, abs=2e-6)


TURNS = {"mode": "async", "order": "round_robin"}


@pytest.mark.parametrize(("workers", "tau"), [(2, 3), (3, 4)])
def test_asynchronous_traces_in_turn(workers, tau):
    cases = [*FAMILY, {"beta": 0.8, "delay": 1}, {"alpha": 0.3, "beta": 0.5, "delay": 2}]
    steps = 3 * tau + 1

    def run():
        return [train(EASGDStrategy(tau=tau, **TURNS, **arguments), steps, workers) for arguments in cases]

    for arguments, *traces in zip(cases, *run_ranks(run, workers), strict=True):
        check(traces, reference_of(workers, steps, tau, arguments, asynchronous=True), arguments, both=False)


@pytest.mark.parametrize("arguments", [{"delay": 2}, {"delay": 2, "pull_to": "new", "alpha": 0.4, "beta": 0.8}])
def test_an_answer_is_waited_for_when_it_is_due_and_not_before(arguments):
    """It comes as the batch of the step begins after which it is due."""
    due = 5 if "pull_to" in arguments else 6

    def run():
        asked, may_answer, in_time = threading.Event(), threading.Event(), []
        exchange = CenterPart.exchange

        def late(part, messages, rates):
            asked.set()
            in_time.append(may_answer.wait(20))
            return exchange(part, messages, rates)

        class Watch(Callback):
            def on_train_batch_start(self, trainer, module, batch, index):
                if index == due:
                    assert asked.wait(20)
                    assert not in_time
                    may_answer.set()

        CenterPart.exchange = late
        strategy = EASGDStrategy(mode="async", tau=4, **arguments)
        fitted(Quadratic(steps=8, record=False), strategy, 1, callbacks=[Watch()])
        return in_time

    (in_time,) = run_ranks(run, 1)
    assert in_time
    assert all(in_time)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "int8"])
def test_compressed_sums_move_the_center_with_momentum(wire_dtype):
    arguments = FAMILY[4]
    traces = run_ranks(train, 2, EASGDStrategy(tau=2, wire_dtype=wire_dtype, **arguments), 9, 2)
    expected = reference_of(2, 9, 2, arguments)
    for rank, (trace, center) in enumerate(traces):
        assert np.array(trace)[:, 0] == pytest.approx(expected[:, rank], abs=3e-2)
        assert center == pytest.approx(expected[-1, -1], abs=3e-2)


def outer_sgd_trace(steps, tau, workers, outer_lr, momentum, nesterov):
    """Local steps from the center, whose outer gradient torch.optim.SGD gets: the loop of DiLoCo and SlowMo."""
    center = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    outer = torch.optim.SGD([center], lr=outer_lr, momentum=momentum, nesterov=nesterov)
    minima = np.array(MINIMA[:workers])
    x = np.ones(workers)
    for t in range(steps):
        x = x - LR * (x - minima)
        if (t + 1) % tau == 0:
            center.grad = torch.tensor([center.item() - x.mean()], dtype=torch.float64)
            outer.step()
            x = np.full(workers, center.item())
    return x, center.item()


def test_local_steps_and_an_outer_optimizer():
    """local SGD, DiLoCo and SlowMo; the run ends with an exchange, so that its model is that of after it."""
    cases = [(1, 0.0, False), (0.7, 0.9, True), (0.8, 0.6, False)]

    def run():
        common = {"tau": 3, "alpha": 1, "pull_to": "new"}
        return [
            train(EASGDStrategy(beta=lr, outer_momentum=mu, outer_nesterov=nesterov, **common), 12, 3)
            for lr, mu, nesterov in cases
        ]

    for case, *results in zip(cases, *run_ranks(run, 3), strict=True):
        _, center = outer_sgd_trace(12, 3, 3, *case)
        for trace, after in results:
            assert after == pytest.approx(center, abs=2e-6), case
            assert trace[-1] == pytest.approx((center, center), abs=2e-6), case


@pytest.mark.parametrize("mode", [{}, {"process_group_backend": "gloo"}, TURNS])
def test_a_resumed_run_and_one_that_validates_go_on_bit_for_bit(mode, tmp_path):
    """The checkpoint and the validations lie between an exchange and its pull."""
    cases = [FAMILY[1], FAMILY[4], {"alpha": 0.4, "beta": 0.8, "pull_to": "new", "delay": 2}]

    def run(arguments):
        def fit(epochs, checkpoint=None, **more):
            torch.manual_seed(0)
            module = Regression(batches=7)
            strategy = EASGDStrategy(tau=3, **mode, **arguments)
            trainer = quiet_trainer(
                strategy=strategy, devices=2, max_epochs=epochs, **({"limit_val_batches": 0} | more)
            )  # fmt: skip
            trainer.fit(module, ckpt_path=checkpoint)
            return module, trainer

        whole, _ = fit(2)
        validated, _ = fit(2, limit_val_batches=1, val_check_interval=1)
        fit(1)[1].save_checkpoint(tmp_path / "half.ckpt")
        resumed, _ = fit(2, tmp_path / "half.ckpt")
        of_whole, *others = [module.state_dict().values() for module in (whole, validated, resumed)]
        return [all(map(torch.equal, of_whole, each)) for each in others]

    for told in run_ranks(lambda: [(each, run(each)) for each in cases], 2):
        assert told == [(each, [True, True]) for each in cases]


@pytest.mark.parametrize("mode", [{}, {"mode": "async", "order": "round_robin"}])
def test_a_pull_that_is_pending_where_other_settings_go_on_is_made_before_the_next_exchange(mode, tmp_path):
    """With another period, and with another layout of the parameters: that a new one comes first changes nothing."""
    rates = {"alpha": 0.4, "beta": 0.8, "pull_to": "new"} | mode

    class Still(Quadratic):
        def __init__(self):
            super().__init__()
            x = self.x
            del self.x
            self.new = torch.nn.Parameter(torch.ones(2))
            self.x = x
            self.strict_loading = False

        def on_train_start(self):
            for group in self.trainer.optimizers[0].param_groups:
                group["lr"] = 0.0

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            optimizer.load_state_dict = lambda state: None
            return optimizer

    def run(is_edited):
        warnings.simplefilter("ignore")  # it warns of the new parameter
        path = tmp_path / "half.ckpt"
        trainer = quiet_trainer(strategy=EASGDStrategy(tau=5, delay=4, **rates), devices=2)
        trainer.fit(Quadratic(steps=7, record=False))
        trainer.save_checkpoint(path)
        module = Still() if is_edited else Quadratic(lr=0.0)
        if not is_edited:
            module.on_train_start = lambda: module.trainer.optimizers[0].param_groups[0].update(lr=0.0)
        trainer = quiet_trainer(strategy=EASGDStrategy(tau=2, **rates), devices=2, max_epochs=2, max_steps=8)
        trainer.fit(module, ckpt_path=path)
        return module.trace[-1]

    rows = family_trace(
        2,
        7,
        tau=5,
        delay=4,
        asynchronous=bool(mode),
        **{k: v for k, v in rates.items() if k in ("alpha", "beta", "pull_to")},
    )
    center = rows[4, -1]
    seen = [center, center]
    if mode:
        first = 1 + 0.8 / 2 * (rows[4, 0] - 1)
        seen = [first, first + 0.8 / 2 * (rows[4, 1] - first)]
    x = rows[6, :2] - 0.4 * (rows[4, :2] - seen)
    for rank, workers in enumerate(run_ranks(lambda: [run(False), run(True)], 2)):
        if mode:
            center += 0.4 * (x[rank] - center)
        elif rank == 0:
            center += 0.8 * (x - center).mean()
        expected = pytest.approx(x[rank] - 0.4 * (x[rank] - center), abs=2e-6)
        assert [worker for worker, _ in workers] == [expected, expected], "as it was, and edited"


@pytest.mark.parametrize("delay", [0, 2])
def test_the_distance_of_an_exchange_is_known_until_the_next_one_is_over(delay):
    class Asks(Quadratic):
        def on_train_batch_end(self, batch, output, index):
            if index in (7, 9):
                self.trace.append(self.trainer.strategy.elastic_distance())

    def run():
        module = Asks(steps=10)
        fitted(module, EASGDStrategy(tau=3, delay=delay, alpha=0.3, beta=0.6, **TURNS), 2)
        return module.trace

    expected = family_trace(2, 10, tau=3, delay=delay, alpha=0.3, beta=0.6, asynchronous=True)
    of_clocks = [abs(expected[clock - 1, 0] - expected[clock - 1, -1]) for clock in (3, 6, 9)]
    assert run_ranks(run, 2)[0] == pytest.approx(of_clocks[:2] if delay else of_clocks[1:], abs=2e-6)


class Two(L.LightningModule):
    """Two optimizers that stand still; what they have is written by hand."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.ones(1)) for _ in "ab")

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.0) for parameter in (self.a, self.b)]

    @torch.no_grad()
    def training_step(self, batch, index):
        if self.trainer.global_rank == 0:
            {1: self.b, 2: self.a, 3: self.b}.get(index, torch.empty(1)).fill_(101.0 if index == 1 else torch.nan)
        for optimizer in self.optimizers():
            optimizer.step()
        if index == 4:
            self.after = self.b.item()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(10), batch_size=1)


def test_a_worker_that_starts_again_takes_no_answer_for_where_it_was():
    """The first optimizer's exchange lets it start again, the second's is under way."""

    def run():
        warnings.simplefilter("ignore")
        module = Two()
        strategy = EASGDStrategy(
            tau=3, delay=2, alpha=0.25, beta=0.5, pull_to="new", on_nonfinite="reset", mode="async", order="round_robin"
        )
        return fitted(module, strategy, 2).after

    center = 1 + (101 - 1) / 4
    assert run_ranks(run, 2)[0] in (center, center + (1 - center) / 4)  # the other worker may not have exchanged yet


class Thawing(Quadratic):
    """A parameter that is trained from the fifth step on."""

    def __init__(self):
        super().__init__(steps=12, record=False)
        self.frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def on_train_batch_start(self, batch, index):
        self.frozen.requires_grad_(index >= 4)

    def training_step(self, batch, index):
        return super().training_step(batch, index) + (self.frozen + self.global_rank).square().sum()


def test_a_parameter_that_is_unfrozen_while_an_answer_is_under_way():
    cases = [{"pull_to": "new"}, {"pull_to": "new", "delay": 2}, {"delay": 2}]

    def run():
        return [fitted(Thawing(), EASGDStrategy(tau=3, **TURNS, **each), 2).frozen.item() for each in cases]

    for case, first, second in zip(cases, *run_ranks(run, 2), strict=True):
        assert first == second != 1, case


def test_workers_with_different_numbers_of_steps_meet_with_pulls_pending():
    class Uneven(Quadratic):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.zeros(5 + 4 * self.trainer.global_rank), batch_size=1)

    def run():
        module = Uneven(record=False)
        strategy = EASGDStrategy(tau=3, alpha=0.3, beta=0.6, pull_to="new", delay=2)
        fitted(module, strategy, 2, use_distributed_sampler=False)
        return module.x.item()

    first, second = run_ranks(run, 2)
    assert first == second


@pytest.mark.parametrize(("arguments", "is_unstable"), [
    ({"alpha": 1, "beta": 1.9, "pull_to": "new"}, False),  # the paper's condition is alpha + beta <= 2
    ({"alpha": 0.9, "beta": 0.9, "outer_momentum": 0.5, "pull_to": "new"}, False),
    ({"alpha": 0.9, "beta": 0.9, "outer_momentum": 0.5, "outer_nesterov": True}, True),
    ({"alpha": 0.1, "beta": 1.9, "outer_momentum": 0.9, "outer_nesterov": True}, True),
])  # fmt: skip
def test_unstable_rates_are_warned_of_by_the_right_region(arguments, is_unstable):
    strategy = EASGDStrategy(**arguments, parallel_devices=[torch.device("cpu")] * 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy._warn_of_arguments()
    assert [("unstable at every" in str(each.message)) for each in caught] == [True] * is_unstable


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({"outer_momentum": 1}, ValueError, "EASGDStrategy(outer_momentum=1): the center's momentum lies in [0, 1)"),
    ({"outer_momentum": "0.9"}, TypeError, "EASGDStrategy(outer_momentum='0.9')"),
    ({"outer_nesterov": True}, ValueError, "give outer_momentum"),
    ({"outer_nesterov": 1, "outer_momentum": 0.5}, TypeError, "EASGDStrategy(outer_nesterov=1)"),
    ({"pull_to": "center"}, ValueError, "EASGDStrategy(pull_to='center'): unknown center"),
    ({"delay": 1}, ValueError, "use pull_to='new', or leave delay out"),
    ({"delay": 2, "tau": 2, "pull_to": "new"}, ValueError, "EASGDStrategy(delay=2, tau=2)"),
    ({"delay": -1, "mode": "async"}, ValueError, "EASGDStrategy(delay=-1, tau=10)"),
    ({"delay": True, "mode": "async"}, TypeError, "EASGDStrategy(delay=True)"),
    ({"delay": 1.5, "mode": "async"}, TypeError, "EASGDStrategy(delay=1.5)"),
])  # fmt: skip
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        EASGDStrategy(**arguments)
