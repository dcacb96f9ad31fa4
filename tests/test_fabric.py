"""Fabric, whose training loop is the user's own: two processes against the paper's recursions."""

import gc
import os
import re
import signal
import threading
import time
import warnings
import weakref
from datetime import timedelta

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from ranks import end_ranks, run_ranks
from reference import synchronous_trace
from test_asynchronous import ASYNCHRONOUS, ASYNCHRONOUS_MOMENTUM, DOWNPOUR
from test_elastic import SYNCHRONOUS
from torch import nn
from toys import MINIMA

from lightning_easgd.fabric import DownpourStrategy, EASGDStrategy, LocalStrategy

pytestmark = pytest.mark.timeout(120)
TIMEOUT = timedelta(seconds=8)


def launched(strategy, ranks=2, **arguments) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy, **arguments)
    fabric.launch()
    return fabric


class Point(nn.Module):
    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(1) + 7 * rank)
        self.minimum = MINIMA[rank]

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.x - self.minimum).square().sum()


def positions(strategy, ranks, steps, closure, **sgd):
    """(x_i, x̃) after each step on f_i = ½(x - b_i)²."""
    fabric = launched(strategy, ranks)
    point = Point(fabric.global_rank)  # ranks begin at different places; rank 0's counts
    model, optimizer = fabric.setup(point, torch.optim.SGD(point.parameters(), lr=0.1, **sgd))
    rows = []

    def gradient():
        optimizer.zero_grad()
        loss = model()
        fabric.backward(loss)
        return loss

    for _ in range(steps):
        if closure:
            loss = optimizer.step(gradient)
            assert loss is not None
        else:
            gradient()
            optimizer.step()
        group, state = optimizer.param_groups[0], optimizer.state[point.x]
        shift = group["lr"] * group["momentum"] * state["momentum_buffer"].item() if group["momentum"] else 0
        fabric.barrier()  # the center after all ranks' steps
        rows.append((point.x.item() + shift, fabric.strategy.center["x"].item()))
        fabric.barrier()
    fabric.strategy.finalize()
    assert point.x.item() == fabric.strategy.center["x"].item()
    return rows, point.x.item()


def trace(ranks, steps, closure, strategy, **sgd):
    results = run_ranks(positions, ranks, strategy, ranks, steps, closure)
    assert len({center for _, center in results}) == 1  # what all are left with
    return np.array([rows for rows, _ in results])


@pytest.mark.parametrize("closure", [False, True])
def test_golden_trace(closure):
    rows = trace(2, 6, closure, EASGDStrategy(tau=1, alpha=0.2))
    assert np.column_stack([*rows[:, :, 0], rows[0, :, 1]]) == pytest.approx(np.array(SYNCHRONOUS), abs=1e-6)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("ranks", "tau", "momentum"), [(3, 2, None), (2, 3, 0.9)])
def test_recursion(ranks, tau, momentum, closure):
    rows = trace(ranks, 8, closure, EASGDStrategy(tau=tau, alpha=0.15, momentum=momentum))
    expected = synchronous_trace(ranks, 8, tau, 0.15, ranks * 0.15, delta=momentum or 0.0)
    assert np.column_stack([*rows[:, :, 0], rows[0, :, 1]]) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("strategy", "expected", "closures"),
    [
        (EASGDStrategy(mode="async", order="round_robin", tau=2, alpha=0.2), ASYNCHRONOUS, (False, True)),
        (
            EASGDStrategy(mode="async", order="round_robin", tau=2, alpha=0.2, momentum=0.9),
            ASYNCHRONOUS_MOMENTUM,
            (False, True),
        ),
        (DownpourStrategy(order="round_robin", tau=2), DOWNPOUR, (True,)),
    ],
)
def test_golden_traces_in_round_robin_order(strategy, expected, closures):
    for closure in closures:
        rows = trace(2, 6, closure, strategy)
        assert np.column_stack([*rows[:, :, 0], rows[0, :, 1]]) == pytest.approx(np.array(expected), abs=2e-6)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def train(fabric, model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        fabric.backward(model(torch.randn(8, 3)).square().mean())
        optimizer.step()


def copies(module):
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("strategy", [EASGDStrategy(tau=2), EASGDStrategy(tau=2, mode="async")])
def test_center_weights_checkpoint_and_end(strategy, tmp_path):
    file = tmp_path / "file.ckpt"

    def run():
        fabric = launched(strategy)
        module = network(fabric.global_rank)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
        assert model._forward_module is module
        train(fabric, model, optimizer, 5 + fabric.global_rank)
        worker = copies(module)
        with strategy.center_weights(model):
            center = copies(module)
            with strategy.center_weights():
                assert same(copies(module), center)
            with pytest.raises(RuntimeError, match=r"inside center_weights\(\)"):
                optimizer.step()
        assert same(copies(module), worker)
        with pytest.raises(KeyError), strategy.center_weights(module):
            raise KeyError
        assert same(copies(module), worker)
        fabric.save(file, {"model": model, "optimizer": optimizer, "step": 5})
        assert same(copies(module), worker)
        saved = torch.load(file, weights_only=True)
        assert same(saved["model"].values(), center)
        assert saved["step"] == 5

        train(fabric, model, optimizer, 3)
        state = {"model": model, "optimizer": optimizer, "step": 0}
        fabric.load(file, state)
        assert state["step"] == 5
        assert same(copies(module), worker)
        assert same(strategy.center.values(), [saved["model"][name] for name in strategy.center])
        fabric.barrier()  # with a served center another rank's exchange would move it
        train(fabric, model, optimizer, 4)
        strategy.finalize()
        strategy.finalize()
        with strategy.center_weights(model):
            end = copies(module)
        assert same([p.detach() for p in module.parameters()], strategy.center.values())
        assert strategy.communication.exchanges > 0
        return [tensor.numpy() for tensor in worker], [tensor.numpy() for tensor in center], [t.numpy() for t in end]

    (worker, center, end), (other, *rest) = run_ranks(run, 2)
    assert not np.array_equal(worker[0], other[0])
    for mine, theirs in zip([center, end], rest, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert center[4] == pytest.approx((worker[4] + other[4]) / 2, abs=1e-6)  # BatchNorm's mean


def test_a_compiled_module_has_a_center_as_it_was_given_and_as_it_came_back():
    def run():
        strategy = EASGDStrategy(tau=2)
        fabric = launched(strategy)
        module = network(0)
        given = torch.compile(module, backend="eager")
        model, optimizer = fabric.setup(given, torch.optim.SGD(module.parameters(), lr=0.1))
        torch.manual_seed(fabric.global_rank)
        train(fabric, model, optimizer, 5)
        worker, shown = copies(module), []
        for each in (module, given, model):
            with strategy.center_weights(each):
                shown.append(copies(module))
        strategy.finalize()
        return [same(each, shown[0]) and not same(each, worker) for each in shown]

    assert run_ranks(run, 2) == [[True] * 3] * 2


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_buffers_of_different_shapes_stay_each_ranks_own_and_are_named_once(mode):
    def run():
        strategy = EASGDStrategy(tau=2, mode=mode)
        fabric = launched(strategy)
        module = network(0)
        module.register_buffer("cache", torch.zeros(2))
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        module.register_buffer("cache", torch.full((2 + fabric.global_rank,), 1.0 + fabric.global_rank))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(fabric, model, optimizer, 5)
            for _ in range(2):
                with strategy.center_weights(model):
                    shown = module.cache.tolist()
            strategy.finalize()
        return shown, [str(each.message) for each in caught if "differ between the ranks" in str(each.message)]

    (first, told), (second, _) = run_ranks(run, 2)
    assert (first, second) == ([1.0] * 2, [2.0] * 3)
    assert len(told) == 1
    assert "EASGDStrategy: cache differ" in told[0]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_modules_that_are_set_up_while_others_train(mode):
    def run():
        strategy = EASGDStrategy(tau=2, mode=mode, timeout=TIMEOUT)
        fabric = launched(strategy)
        module = network(0)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        torch.manual_seed(fabric.global_rank)
        train(fabric, model, optimizer, 5)
        worker = copies(module)
        encoder = fabric.setup_module(module[:2])
        for each in (fabric.setup_module(module), encoder, fabric.setup_module(module[1])):
            with strategy.center_weights(each):
                shown = copies(module)
                fabric.setup_module(nn.BatchNorm1d(2))
        left = same(copies(module), worker)
        probe = nn.Sequential(module[1], nn.BatchNorm1d(4))
        probe[1].running_mean.fill_(fabric.global_rank)
        late = fabric.setup_module(probe)
        left &= same(copies(module), worker)
        started = probe[1].running_mean.tolist()
        probe[1].running_mean.fill_(1.0 + 2 * fabric.global_rank)
        with strategy.center_weights(late):
            again, mean = copies(module), probe[1].running_mean.tolist()
        left &= same(copies(module), worker)
        train(fabric, model, optimizer, 3)
        strategy.finalize()
        return left, started, mean, [[tensor.numpy() for tensor in each] for each in (shown, again, copies(module))]

    (*first, center), (*second, other) = run_ranks(run, 2)
    assert first == second == [True, [0.0] * 4, [2.0] * 4]
    for mine, theirs in zip(center, other, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(center[0][4], center[1][4])  # BatchNorm's mean


@pytest.mark.filterwarnings(r"ignore:EASGDStrategy\(on_nonfinite='reset'\)")
def test_a_buffer_that_goes_astray_is_mended_with_what_was_common_at_the_last_meeting():
    def run():
        strategy = EASGDStrategy(tau=1, mode="async", on_nonfinite="reset", timeout=TIMEOUT)
        fabric = launched(strategy)
        module = network(0)
        module.register_buffer("level", torch.zeros(1))
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        train(fabric, model, optimizer, 2)
        module.level.fill_(1.0 + 2 * fabric.global_rank)
        with strategy.center_weights(model):
            shown = module.level.item()
        fabric.barrier()
        if fabric.global_rank == 1:
            with torch.no_grad():
                module.level.fill_(float("nan"))
                module[0].weight.fill_(float("nan"))
        optimizer.zero_grad()
        optimizer.step()
        level = module.level.item()
        strategy.finalize()
        return shown, level

    assert run_ranks(run, 2) == [(2.0, 1.0), (2.0, 2.0)]


def test_two_modules_and_optimizers_have_their_own_clocks():
    def run():
        strategy = EASGDStrategy(tau=2)
        fabric = launched(strategy)
        first, second = network(0), nn.Linear(3, 1)
        one, optimizer_one = fabric.setup(first, torch.optim.SGD(first.parameters(), lr=0.1))
        two, optimizer_two = fabric.setup(second, torch.optim.Adam(second.parameters()))
        train(fabric, one, optimizer_one, 7)
        train(fabric, two, optimizer_two, 3)
        clocks = [averager.clock for averager in strategy._averagers]
        with pytest.raises(RuntimeError, match="was not there when training started"):
            fabric.setup_optimizers(torch.optim.SGD(second.parameters(), lr=0.1))
        worker = copies(first) + copies(second)
        with strategy.center_weights(two):
            assert not same(copies(second), worker[-2:])
        assert same(copies(first) + copies(second), worker)
        names = list(strategy.center)
        strategy.finalize()
        with pytest.raises(RuntimeError, match="not being trained"):
            optimizer_one.step()
        return clocks, names, strategy.communication.exchanges

    for clocks, names, exchanges in run_ranks(run, 2):
        assert clocks == [7, 3]
        assert names[0] == "0.0.weight"
        assert names[-1] == "1.bias"
        assert exchanges == 3 + 1


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        (EASGDStrategy(tau=9, timeout=TIMEOUT), 2),
        (EASGDStrategy(tau=2, mode="async", timeout=TIMEOUT), 2),
        (EASGDStrategy(tau=9, devices_per_worker=2, timeout=TIMEOUT), 4),
    ],
)
def test_modules_of_a_training_that_has_ended_are_trained_on_with_other_optimizers(strategy, ranks):
    """As the error about an optimizer that comes too late advises; nothing averaged what was no module's."""

    def run():
        fabric = launched(strategy, ranks)
        first, second = network(0), network(1)
        one, optimizer = fabric.setup(first, torch.optim.SGD(first.parameters(), lr=0.1))
        two, _ = fabric.setup(second, torch.optim.SGD(second.parameters(), lr=0.1))
        strategy.finalize()
        both = [*first.parameters(), *second.parameters()]
        two = fabric.setup_module(second)  # one of them may be set up anew
        optimizer = fabric.setup_optimizers(torch.optim.SGD(both, lr=0.1))
        generator = torch.Generator().manual_seed(fabric.global_rank)
        for _ in range(5):
            optimizer.zero_grad()
            fabric.backward(sum(each(torch.randn(8, 3, generator=generator)).square().mean() for each in (one, two)))
            optimizer.step()
        own = copies(first) + copies(second)
        with strategy.center_weights(one):
            center = copies(first) + copies(second)
        names = list(strategy.center)
        strategy.finalize()
        assert same(copies(first) + copies(second), center)
        return [tensor.numpy() for tensor in own], [tensor.numpy() for tensor in center], names

    (own, center, names), *others = run_ranks(run, ranks)
    assert not any(name.startswith("optimizers.") for name in names)
    assert all(np.array_equal(a, b) for _, other, _ in others for a, b in zip(center, other, strict=True))
    everyones = zip(own, *(each for each, _, _ in others), strict=True)
    means = [np.mean(each, axis=0) for each in everyones]
    averaged = [4, 5, 13, 14]  # BatchNorm's statistics; without an exchange all else, too
    for place in averaged if strategy.mode == "async" else {*range(18)} - {6, 15}:
        assert center[place] == pytest.approx(means[place], abs=1e-6)


@pytest.mark.parametrize("per_worker", [1, 2])
def test_modules_take_turns_in_trainings_of_their_own(per_worker):
    """Kind: what one training leaves out is trained by a later one."""

    def run():
        strategy = EASGDStrategy(tau=9, devices_per_worker=per_worker, timeout=TIMEOUT)
        fabric = launched(strategy, 2 * per_worker)
        modules = [network(0), network(1)]
        modules[1][0].bias.requires_grad_(False)  # trained nonetheless it is an error, but in its own training alone
        models = [fabric.setup_module(module) for module in modules]
        torch.manual_seed(fabric.global_rank)
        outcomes = []
        for turn in (0, 1, 0):
            if outcomes:
                bias = modules[1][0].bias.requires_grad_(turn == 0)
                bias.grad = torch.ones_like(bias) if turn == 0 else None
            optimizer = fabric.setup_optimizers(torch.optim.SGD(modules[turn].parameters(), lr=0.1))
            train(fabric, models[turn], optimizer, 3)
            own = copies(modules[turn])
            with strategy.center_weights(models[turn]):
                center = copies(modules[turn])
            names = [name for name in strategy.center if name.startswith("optimizers.")]
            strategy.finalize()
            assert same(copies(modules[turn]), center)
            outcomes.append((own[4].numpy(), center[4].numpy(), names))
        return outcomes

    for turns in zip(*run_ranks(run, 2 * per_worker), strict=True):
        owns, centers, names = zip(*turns, strict=True)
        assert not any(names)
        for center in centers:  # BatchNorm's mean
            assert center == pytest.approx(np.mean(owns, axis=0), abs=1e-6)


@pytest.mark.parametrize("per_worker", [1, 2])
def test_a_module_whose_training_has_ended_is_kept_by_nobody(per_worker):
    """Kind: what may be trained on with other optimizers keeps the memory of what is not."""

    def run():
        strategy = EASGDStrategy(tau=2, devices_per_worker=per_worker, timeout=TIMEOUT)
        fabric = launched(strategy, 2 * per_worker)
        module = network(0)
        module[0].weight.requires_grad_(False)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        train(fabric, model, optimizer, 3)
        strategy.finalize()
        kept = [weakref.ref(each) for each in (module, *module.parameters())]
        del module, model, optimizer
        gc.collect()
        return [each() for each in kept]

    assert run_ranks(run, 2 * per_worker) == [[None] * 7] * (2 * per_worker)


@pytest.mark.parametrize("strategy", [EASGDStrategy(tau=1, timeout=TIMEOUT), LocalStrategy(timeout=TIMEOUT)])
def test_gradients_accumulate_without_a_wrapper(strategy):
    def run():
        fabric = launched(strategy)
        point = Point(fabric.global_rank)
        model, optimizer = fabric.setup(point, torch.optim.SGD(point.parameters(), lr=0.1))
        for batch in range(4):
            with fabric.no_backward_sync(model, enabled=batch % 2 == 0):
                fabric.backward(model() / 2)
            if batch % 2:
                optimizer.step()
                optimizer.zero_grad()
        return point.x.item()

    alpha = 0.45 if isinstance(strategy, EASGDStrategy) else 0.0
    expected = synchronous_trace(2, 2, 1, alpha, 2 * alpha)[-1, :2]
    assert run_ranks(run, 2) == pytest.approx(list(expected), abs=1e-6)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_ranks_with_different_numbers_of_steps_end_together(mode):
    def run():
        strategy = EASGDStrategy(tau=2, mode=mode, timeout=timedelta(seconds=30))
        fabric = launched(strategy)
        module = network(0)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
        train(fabric, model, optimizer, 40 * fabric.global_rank)  # rank 0 has no data at all
        strategy.finalize()
        return [tensor.numpy() for tensor in copies(module)]

    first, second = run_ranks(run, 2)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", ["raise", "kill"])
def test_an_error_on_one_rank_ends_all(mode, rank, end):
    def run():
        strategy = EASGDStrategy(tau=2, mode=mode, timeout=TIMEOUT)
        fabric = launched(strategy)
        module = network(0)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
        train(fabric, model, optimizer, 5)
        if fabric.global_rank == rank:
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("the user's own error")
        train(fabric, model, optimizer, 5)
        strategy.finalize()

    started = time.monotonic()
    outcomes = end_ranks(run, 2, timeout=60)
    assert all(outcome.exitcode != 0 for outcome in outcomes)
    told = rf"(ranks|workers) \[{rank}\].* died or raised an error"
    store = "rank 0, which serves the store, is gone .* it has died" if rank == 0 else told  # where that is seen first
    assert re.search(f"{told}|{store}", outcomes[1 - rank].error)
    assert outcomes[rank].exitcode == (-signal.SIGKILL if end == "kill" else 1)
    assert end == "kill" or "the user's own error" in outcomes[rank].error
    assert time.monotonic() - started < TIMEOUT.total_seconds() + 30


def test_by_name():
    def run():
        fabric = launched("eamsgd")
        return type(fabric.strategy), fabric.strategy.momentum, fabric.world_size

    assert run_ranks(run, 2) == [(EASGDStrategy, 0.9, 2)] * 2


@pytest.mark.parametrize("failing", [None, 1])
def test_forked_ranks(failing):
    def train_rank(fabric):
        module = network(fabric.global_rank)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
        train(fabric, model, optimizer, 25)
        if fabric.global_rank == failing:
            raise KeyError("the user's own error")
        fabric.strategy.finalize()
        return fabric.strategy.communication.exchanges

    def run():
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]
        return Fabric(accelerator="cpu", devices=2, strategy="easgd_fork").launch(train_rank)

    (outcome,) = end_ranks(run, 1)
    if failing is None:
        assert (outcome.exitcode, outcome.value) == (0, 2), outcome.error
    else:
        assert outcome.exitcode != 0
        assert "the user's own error" in outcome.error


@pytest.mark.parametrize("name", ["easgd_fork", "easgd_async_fork"])
def test_whosever_error_a_parent_shows_it_says_why_the_first_rank_failed(name):
    """It shows that of the first in number that it finds ended: here of the other, as the first takes its time."""

    def train_rank(fabric):
        module = network(fabric.global_rank)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
        train(fabric, model, optimizer, 25)
        if fabric.global_rank == 1:
            threading.Thread(target=time.sleep, args=(20,)).start()  # it would be waited for, but the parent kills it
            raise KeyError("the user's own error")
        fabric.strategy.finalize()

    def run():
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            del os.environ[variable]
        Fabric(accelerator="cpu", devices=2, strategy=name).launch(train_rank)

    started = time.monotonic()
    (outcome,) = end_ranks(run, 1)
    assert outcome.exitcode != 0
    assert "Process 0 terminated" in outcome.error
    assert 'rank 1: KeyError: "the user\'s own error"' in outcome.error
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_processes_end_without_finalize(mode):
    def run():
        fabric = launched(EASGDStrategy(tau=2, mode=mode, timeout=TIMEOUT))
        module = network(0)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
        train(fabric, model, optimizer, 5)
        fabric.barrier()

    run_ranks(run, 2, timeout=40)


def test_downpour_takes_gradients_at_the_new_point_without_a_closure_too():
    def points(closure):
        fabric = launched(DownpourStrategy(order="round_robin", tau=2))
        point = Point(fabric.global_rank)
        model, optimizer = fabric.setup(point, torch.optim.SGD(point.parameters(), lr=0.1))
        seen = []

        def gradient():
            seen.append(point.x.item())
            optimizer.zero_grad()
            fabric.backward(model())

        for _ in range(7):
            if closure:
                optimizer.step(gradient)
            else:
                gradient()
                optimizer.step()
        fabric.strategy.finalize()
        return seen

    assert run_ranks(points, 2, False) == run_ranks(points, 2, True)


def test_refusals():
    with pytest.raises(ValueError, match=r"evaluate='worker'\): Fabric has no validation"):
        EASGDStrategy(evaluate="worker")
    with pytest.raises(ValueError, match=r"recalibrate_batchnorm=3\): .*update_bn"):
        EASGDStrategy(recalibrate_batchnorm=3)
    with pytest.raises(RuntimeError, match="no center before the first optimizer step"):
        _ = EASGDStrategy().center

    def run():
        fabric = launched(DownpourStrategy(), 1)
        point = Point()
        fabric.setup(point, torch.optim.SGD(point.parameters(), lr=0.1))
        with pytest.raises(ValueError, match="this module has no center"), fabric.strategy.center_weights(network(0)):
            pass

    run_ranks(run, 1)
