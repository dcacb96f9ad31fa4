"""{precision} × {1, 2 optimizers} × {automatic, manual} × {accumulation} × {sync, async}, each against a reference.

In float32 it is the recursion of the paper; in mixed precision with α = 0, bit for bit, training without communication.
"""

from itertools import product

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from ranks import run_ranks
from reference import round_robin_trace, synchronous_trace
from test_strategy import arrays, equal
from torch import nn
from torch.utils.data import DataLoader
from toys import MINIMA, Regression, fitted

from lightning_easgd import EASGDStrategy, LocalStrategy

pytestmark = pytest.mark.timeout(180)
PRECISIONS = ["32", "bf16-mixed", "16-mixed"]
LOOPS = list(product([1, 2], ["automatic", "manual"], [1, 3]))
MODES = ["sync", "async"]
BATCHES, TAU, ALPHA, LR = 24, 2, 0.3, 0.1


class Cell(Regression):
    """Optimizers stepped by Lightning, or by hand, after ``accumulate`` batches; a second one every other time."""

    def __init__(self, optimizers, optimization, accumulate):
        super().__init__(batches=BATCHES)
        self.automatic_optimization = optimization == "automatic"
        self.accumulate = accumulate
        self.net = nn.ModuleList(self.part() for _ in range(optimizers))

    def training_step(self, batch, index):
        if self.automatic_optimization:
            return self.part_loss(self.net[0], batch, index)
        optimizers = self.optimizers(use_pl_optimizer=True)
        for number, optimizer in enumerate(optimizers if len(self.net) > 1 else [optimizers]):
            every = self.accumulate * (number + 1)
            self.manual_backward(self.part_loss(self.net[number], batch, index) / every)
            if (index + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()
        return None

    def on_train_batch_end(self, *_):
        self.last = arrays(self.parameters())


class Quadratics(Cell):
    """½(x - b)² with b of the rank and of the batch within its accumulation."""

    def part(self):
        return nn.ParameterList([torch.ones(1)])

    def part_loss(self, part, batch, index):
        return 0.5 * (part[0] - MINIMA[self.trainer.global_rank] - index % self.accumulate).square().sum()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=LR) for part in self.net]


class Networks(Cell):
    """Small networks, whose matrix products run in the narrow dtype, with momentum."""

    def part(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def part_loss(self, part, batch, index):
        output = part(batch)
        assert output.dtype in (torch.bfloat16, torch.float16)
        return (output - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in self.net]

    def train_dataloader(self):
        data = torch.randn(BATCHES * 16, 4, generator=torch.Generator().manual_seed(1))
        return DataLoader(data, batch_size=8)


def fit_cell(module_class, precision, loop, strategy):
    """Worker weights and optimizer states at the end, the center, the number of exchanges, and the scaler's state."""
    torch.manual_seed(0)
    module = module_class(*loop)
    amp = {}
    if precision != "32":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18) if precision == "16-mixed" else None
        amp = {"plugins": [MixedPrecision(precision, "cpu", scaler=scaler)]}
    accumulate = loop[2] if loop[1] == "automatic" else 1  # Lightning refuses it in manual optimization
    trainer = fitted(module, strategy, 2, accumulate_grad_batches=accumulate, limit_val_batches=0, **amp).trainer
    states = [
        value for optimizer in trainer.optimizers for of_one in optimizer.state.values() for value in of_one.values()
    ]
    communication = getattr(trainer.strategy, "communication", None)
    return {
        "worker": module.last,
        "center": arrays(module.parameters()),
        "states": arrays(states),
        "exchanges": communication and communication.exchanges,
        "scaler": trainer.precision_plugin.state_dict(),
    }


def easgd(mode, **arguments):
    return EASGDStrategy(mode=mode, tau=TAU, order="round_robin" if mode == "async" else "free", **arguments)


def fit_all():
    """All cells, one after the other in the same processes."""
    results = {}
    for precision, loop in product(PRECISIONS, LOOPS):
        if loop[:2] == (2, "automatic"):
            continue
        if precision != "32":
            results[precision, loop, "local"] = fit_cell(Networks, precision, loop, LocalStrategy())
        for mode in MODES:
            if precision == "32":
                results[precision, loop, mode] = fit_cell(Quadratics, precision, loop, easgd(mode, alpha=ALPHA))
            else:
                results[precision, loop, mode] = fit_cell(Networks, precision, loop, easgd(mode, alpha=0))
    return results


@pytest.fixture(scope="module")
def cells():
    return run_ranks(fit_all, 2, timeout=100)


def name(value):
    return value if isinstance(value, str) else f"{value[0]}-{value[1]}-{value[2]}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loop", LOOPS, ids=name)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cell(cells, precision, loop, mode):
    optimizers, optimization, accumulate = loop
    if optimizers == 2 and optimization == "automatic":
        pytest.skip("Lightning refuses several optimizers in automatic optimization")
    results = [of_rank[precision, loop, mode] for of_rank in cells]
    steps = [BATCHES // accumulate // (number + 1) for number in range(optimizers)]
    assert [result["exchanges"] for result in results] == [sum((count - 1) // TAU for count in steps)] * 2
    assert equal(results[0]["center"], results[1]["center"])
    if precision == "32":
        minima = [minimum + (accumulate - 1) / 2 for minimum in MINIMA[:2]]
        for number, count in enumerate(steps):
            if mode == "sync":
                expected = synchronous_trace(2, count, TAU, ALPHA, 2 * ALPHA, lr=LR, minima=minima)[-1]
            else:
                expected = round_robin_trace(minima, count, TAU, ALPHA, lr=LR)[-1]
            actual = [result["worker"][number].item() for result in results] + [results[0]["center"][number].item()]
            np.testing.assert_allclose(actual, expected, atol=2e-6)
        return
    for rank, result in enumerate(results):
        local = cells[rank][precision, loop, "local"]
        assert equal(result["worker"], local["worker"])
        assert equal(result["states"], local["states"])
        assert result["scaler"] == local["scaler"]
    assert not equal(results[0]["worker"], results[1]["worker"])
    if precision == "16-mixed":
        assert 0 < result["scaler"]["scale"] < 2.0**18  # steps were skipped


def test_lightning_refuses_what_is_skipped():
    module = Quadratics(2, "automatic", 1)
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        fitted(module, "auto", 1)
