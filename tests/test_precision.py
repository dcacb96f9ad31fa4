"""The center is float32 or wider whatever the workers are, and loses nothing to rounding."""

import numpy as np
import pytest
import torch
from channels import LoneChannel
from lightning.pytorch.plugins import MixedPrecision
from ranks import run_ranks
from reference import synchronous_trace
from test_strategy import arrays, equal
from torch import nn
from toys import MINIMA, Quadratic, Regression, fitted

from lightning_easgd import EASGDStrategy
from lightning_easgd.averagers import ExchangeLine, SynchronousAverager, all_reduced_sums
from lightning_easgd.method.rates import MovingRates

pytestmark = pytest.mark.timeout(120)
both = pytest.mark.parametrize("mode", ["sync", "async"])


class Apart(Quadratic):
    """Rank i steps once, by i + 1 units in the last place of bfloat16, and then stays."""

    def __init__(self):
        super().__init__(lr=1.0, steps=101, record=False)

    def training_step(self, batch, index):
        return -(self.x * (2**-7 * (self.global_rank + 1))).sum() * (index == 0)


@both
def test_moves_of_the_center_far_below_the_workers_resolution_add_up(mode):
    """Near 1 a bfloat16 moves by 2⁻⁷; each of the 100 moves of the center is below 2⁻¹³."""

    def run():
        module = Apart()
        centers, workers = [], []

        def record(*_):
            strategy = module.trainer.strategy
            strategy.barrier()
            centers.append(strategy.center["x"].item())
            workers.append(module.x.item())
            strategy.barrier()

        module.on_train_batch_end = record
        order = "round_robin" if mode == "async" else "free"
        strategy = EASGDStrategy(mode=mode, tau=1, alpha=0, beta=0.01, order=order)
        fitted(module, strategy, 2, precision="bf16-true")
        return centers, set(workers), str(module.x.dtype)

    first, second = run_ranks(run, 2)
    assert (first[1], second[1]) == ({1 + 2**-7}, {1 + 2**-6})
    assert first[2] == "torch.bfloat16"
    center = 1.0
    for t in range(1, 101):
        if mode == "sync":
            center += 0.01 * (1 + 1.5 * 2**-7 - center)
        else:
            for units in (1, 2):
                center += 0.005 * (1 + units * 2**-7 - center)
        if t > 1:
            assert abs(first[0][t] - first[0][t - 1]) < 2**-13
        assert first[0][t] == pytest.approx(center, abs=2e-6)
    assert first[0] == second[0]
    assert center - 1 > 2**-8


def test_a_pull_below_the_workers_resolution_leaves_it_where_it_is():
    """What the docstring says: a bfloat16 worker stays apart by up to half its resolution divided by α."""

    def distance_left(dtype, units, alpha):
        parameter = nn.Parameter(torch.ones(1, dtype=dtype))
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        averager = SynchronousAverager(
            optimizer,
            ExchangeLine(LoneChannel([])),
            all_reduced_sums(lambda: LoneChannel([]), tau=1),
            number=0,
            tau=1,
            rates=MovingRates(alpha=alpha, beta=1e-9),
        )
        with torch.no_grad():
            parameter.add_(units * 2**-7)
        for _ in range(100):
            averager.begin()
            averager.finish()
        return (parameter.item() - 1) / 2**-7

    assert distance_left(torch.float32, 1, 0.25) == pytest.approx(0, abs=1e-4)
    assert distance_left(torch.bfloat16, 1, 0.25) == 1  # the pull of a quarter of a unit is rounded away, every time
    assert distance_left(torch.bfloat16, 2, 0.25) == 2  # half a unit: to even
    assert distance_left(torch.bfloat16, 16, 0.25) == 2
    assert distance_left(torch.bfloat16, 16, 0.125) == 4


def scaled(precision="16-mixed", **scaler):
    # Lightning replaces precision="16-mixed" on the CPU by bf16-mixed; the plugin does as it is told.
    return MixedPrecision(precision, "cpu", scaler=torch.amp.GradScaler("cpu", **scaler))


@both
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_the_scaler_skips_on_one_rank_still_exchanges(rank, mode):
    """Its clock goes on; what is left out is the gradient alone."""

    class Overflows(Quadratic):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * float("inf") if (self.global_rank, index) == (rank, 2) else loss

    def run():
        module = Overflows(steps=6, record=mode == "sync")
        strategy = EASGDStrategy(mode=mode, tau=2, alpha=0.2)
        fitted(module, strategy, 2, plugins=[scaled()])
        scale = module.trainer.precision_plugin.scaler.get_scale()
        return module.trace, strategy.communication.exchanges, scale, module.x.item()

    results = run_ranks(run, 2)
    assert [result[1] for result in results] == [2, 2]
    assert results[rank][2] == results[1 - rank][2] / 2  # each rank has a scaler of its own
    assert results[0][3] == results[1][3]
    if mode == "async":
        return
    x, center = np.ones(2), 1.0
    for t in range(6):
        pull = 0.2 * (x - center) * (t % 2 == 0)
        gradient = (x - np.array(MINIMA[:2])) * [(i, t) != (rank, 2) for i in range(2)]
        x, center = x - 0.1 * gradient - pull, center + pull.sum()
        traced = [results[0][0][t][0], *results[1][0][t]]
        np.testing.assert_allclose(traced, [*x, center], atol=1e-6)


def test_double_precision_follows_the_recursion_to_its_own_resolution():
    def run():
        return fitted(Quadratic(steps=20), EASGDStrategy(tau=3, alpha=0.3), 2, precision="64-true").trace

    first, second = np.array(run_ranks(run, 2))
    expected = synchronous_trace(2, 20, 3, 0.3, 0.6)
    np.testing.assert_allclose(np.column_stack([first[:, 0], second]), expected, rtol=1e-13)


@both
def test_the_worker_comes_back_bit_for_bit_in_every_precision(mode):
    class Kept(Regression):
        def on_train_batch_end(self, *_):
            before = arrays([p.double() for p in self.parameters()])
            with self.trainer.strategy.center_weights():
                shown = arrays([p.double() for p in self.parameters()])
            same.append((equal(before, arrays([p.double() for p in self.parameters()])), equal(before, shown)))

    same = []

    def run(precision):
        same.clear()
        module = fitted(Kept(), EASGDStrategy(mode=mode, tau=2), 2, precision=precision)
        return same[3:], {str(c.dtype) for c in module.trainer.strategy.center.values()}

    centers = {"bf16-true": "torch.float32", "64-true": "torch.float64", "bf16-mixed": "torch.float32"}
    expected = {precision: ([(True, False)] * 5, {center}) for precision, center in centers.items()}
    assert run_ranks(lambda: {precision: run(precision) for precision in centers}, 2) == [expected] * 2


def test_a_center_in_host_memory_has_the_same_bits():
    def run(precision, momentum, center_device):
        torch.manual_seed(0)
        strategy = EASGDStrategy(tau=2, center_device=center_device, momentum=momentum)
        module = fitted(Regression(), strategy, 2, precision=precision)
        assert {c.device.type for c in strategy.center.values()} == {"cpu"}
        return arrays([p.double() for p in module.parameters()])

    cases = [(precision, momentum) for precision in ("32-true", "bf16-true") for momentum in (None, 0.9)]
    for results in run_ranks(lambda: [(run(*case, None), run(*case, "cpu")) for case in cases], 2):
        for case, (here, there) in zip(cases, results, strict=True):
            assert equal(here, there), case
