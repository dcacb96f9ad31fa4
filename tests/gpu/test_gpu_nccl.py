"""Over NCCL: one rank, and two, with a GPU for each where there are two."""

from functools import partial

import numpy as np
import pytest
import torch
from bowls import SGD, Bowls, flat, rows
from devices import fit, in_precision, over_nccl
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from recursions import Adam, Sgd, downpour, minima, post_local, round_robin, synchronous
from toys import Regression

from lightning_easgd import DownpourStrategy, LocalStrategy
from lightning_easgd.lab.baselines.post_local_sgd import PostLocalSGDStrategy

pytestmark = pytest.mark.usefixtures("nccl")
STEPS = 11
SINGLE = {"rtol": 1e-6, "atol": 1e-6}
IN_TURN = {"mode": "async", "order": "round_robin"}
ranks_of = pytest.mark.parametrize("ranks", [1, 2])

CASES = {
    "tau 1": ({"tau": 1, "alpha": 0.2}, lambda b: synchronous(b, STEPS, 1, 0.2, len(b) * 0.2, lambda _: Sgd())),
    "alpha and beta": (
        {"tau": 2, "alpha": 0.3, "beta": 0.7},
        lambda b: synchronous(b, STEPS, 2, 0.3, 0.7, lambda _: Sgd()),
    ),
    "eamsgd": (
        {"tau": 2, "alpha": 0.15, "momentum": 0.9},
        lambda b: synchronous(b, STEPS, 2, 0.15, len(b) * 0.15, lambda _: Sgd(delta=0.9)),
    ),
    "center on the CPU": (
        {"tau": 5, "alpha": 0.2, "center_device": "cpu"},
        lambda b: synchronous(b, STEPS, 5, 0.2, len(b) * 0.2, lambda _: Sgd()),
    ),
    "async": (IN_TURN | {"tau": 2, "alpha": 0.2}, lambda b: round_robin(b, STEPS, 2, 0.2, lambda _: Sgd())),
    "async eamsgd": (
        IN_TURN | {"tau": 2, "alpha": 0.2, "momentum": 0.9},
        lambda b: round_robin(b, STEPS, 2, 0.2, lambda _: Sgd(delta=0.9)),
    ),
}


@ranks_of
@pytest.mark.parametrize("case", CASES)
def test_traces(case, ranks):
    strategy, reference = CASES[case]
    reads = "in turn" if "mode" in strategy else "center"
    found, end = rows(partial(Bowls, STEPS, reads=reads), partial(over_nccl, ranks=ranks, **strategy), ranks)
    expected = reference(minima(ranks))
    np.testing.assert_allclose(found, expected, **SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


@ranks_of
@pytest.mark.parametrize("tau", [1, 5])
def test_exchanges_left_under_way(tau, ranks):
    make = partial(over_nccl, ranks=ranks, tau=tau, alpha=0.2)
    adam = partial(torch.optim.Adam, lr=0.1)
    found, end = rows(partial(Bowls, STEPS, optimizer=adam, reads="worker"), make, ranks)
    expected = synchronous(minima(ranks), STEPS, tau, 0.2, ranks * 0.2, lambda _: Adam())
    np.testing.assert_allclose(found, expected[:, :-1], **SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


@ranks_of
def test_downpour(ranks):
    make = partial(over_nccl, DownpourStrategy, ranks=ranks, order="round_robin", tau=2)
    found, _ = rows(partial(Bowls, STEPS, reads="in turn"), make, ranks)
    np.testing.assert_allclose(found, downpour(minima(ranks), STEPS, 2, lambda _: Sgd()), **SINGLE)


@ranks_of
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_two_optimizers_of_different_rhythm(mode, ranks):
    """Each has its channel: NCCL would hang, or mix up their sums, if ranks started them in another order."""
    order = {"order": "round_robin"} if mode == "async" else {}
    make = partial(over_nccl, ranks=ranks, mode=mode, tau=2, alpha=0.2, **order)
    found, end = rows(partial(Bowls, STEPS, by_hand=True, reads="worker"), make, ranks)
    for part, steps in ((slice(0, 2), STEPS), (slice(2, 5), STEPS // 2)):
        b = minima(ranks)[:, part]
        expected = synchronous(b, steps, 2, 0.2, ranks * 0.2, lambda _: Sgd())[-1]
        if mode == "async":
            expected = round_robin(b, steps, 2, 0.2, lambda _: Sgd())[-1]
        np.testing.assert_allclose(found[-1, :, part], expected[:-1], **SINGLE)
        np.testing.assert_allclose(end[part], expected[-1], **SINGLE)


@ranks_of
@pytest.mark.parametrize("center_device", [None, "cpu"])
@pytest.mark.parametrize("wire_dtype", ["bfloat16", "int8"])
def test_compressed_differences(wire_dtype, center_device, ranks):
    """Next to the exact recursion: what rounding drops is sent later."""
    make = partial(over_nccl, ranks=ranks, tau=2, alpha=0.3, wire_dtype=wire_dtype, center_device=center_device)
    found, _ = rows(partial(Bowls, STEPS), make, ranks)
    exact = synchronous(minima(ranks), STEPS, 2, 0.3, ranks * 0.3, lambda _: Sgd())
    quantum = {"bfloat16": 2.0**-8, "int8": 1 / 127}[wire_dtype]
    one = ranks * 0.3 * abs(exact[:, :-1] - exact[:, -1:]).max() * quantum
    np.testing.assert_allclose(found, exact, rtol=0, atol=3 * one)


@ranks_of
def test_post_local_sgd(ranks):
    make = partial(over_nccl, PostLocalSGDStrategy, ranks=ranks, tau=3, warmup_steps=2)
    found, end = rows(partial(Bowls, STEPS, reads="worker"), make, ranks)
    expected = post_local(minima(ranks), STEPS, 3, 2)
    np.testing.assert_allclose(found, expected[:, :-1], **SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


@ranks_of
@pytest.mark.parametrize("mode", [{}, {"center_device": "cpu"}, IN_TURN], ids=["sync", "center on the CPU", "async"])
def test_mixed_precision(mode, ranks):
    """Validation, buffers and the scaler; without a pull the worker is that of local training."""

    class Last(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            self.worker = flat(module.parameters())

    def run():
        results = []
        for make in (
            partial(over_nccl, tau=2, alpha=0, beta=0.5, **mode),
            partial(over_nccl, LocalStrategy),
        ):
            torch.manual_seed(0)
            module, last = Regression(batches=12), Last()
            settings = in_precision("16-mixed") | {"val_check_interval": 5, "deterministic": "warn"}
            fit(module, make(ranks=ranks), callbacks=[last], **settings)
            loss = float(module.trainer.callback_metrics["val_loss"])
            results.append((last.worker, flat(module.parameters()), flat(module.buffers()), loss))
        return results

    results = run_ranks(run, ranks, timeout=150)
    for (worker, center, buffers, loss), (local, *_) in results:
        np.testing.assert_array_equal(worker, local)
        assert np.isfinite(loss)
        assert (center == results[0][0][1]).all()
        assert (buffers == results[0][0][2]).all()
        assert abs(worker - center).max() > 1e-4


@pytest.mark.usefixtures("two_cuda_devices")
@pytest.mark.parametrize("mode", [{}, IN_TURN, {"center_device": "cpu"}], ids=["sync", "async", "center on the CPU"])
def test_rank_1_makes_no_context_on_device_0(mode):
    """Its threads begin on device 0; a context there would cost half a gigabyte for each rank of a node."""

    def run():
        fit(Bowls(STEPS, optimizer=SGD, reads="worker"), over_nccl(ranks=2, tau=2, **mode))
        return [torch._C._cuda_hasPrimaryContext(number) for number in range(2)]

    first, second = run_ranks(run, 2, timeout=150)
    assert first == [True, False]
    assert second == [False, True]
