"""Mixed and narrow precision: the center stays wide and common, the workers are those of local training."""

from functools import partial

import numpy as np
import pytest
import torch
from bowls import flat
from devices import device, fit, in_precision, shared
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from toys import Regression

from lightning_easgd import DownpourStrategy, EASGDStrategy, LocalStrategy

IN_TURN = {"mode": "async", "order": "round_robin"}
MODES = {
    "sync": {},
    "center on the CPU": {"center_device": "cpu"},
    "eamsgd": {"momentum": 0.9},
    "int8": {"wire_dtype": "int8"},
    "async": IN_TURN,
    "async eamsgd": IN_TURN | {"momentum": 0.9},
}
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
# The same kernels in every run; "warn": no operation here lacks such a form, and what torch says of it is no failure.
EXACT = {"deterministic": "warn"}


class Worker(Callback):
    """What the worker holds after each batch."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *_):
        self.steps.append(flat(module.parameters()))


def train(make_strategy, precision, where=None, **scaler):
    """The workers' weights after each step, the center, its dtypes and the validation's losses."""
    torch.manual_seed(0)
    module, worker = Regression(batches=12), Worker()
    settings = in_precision(precision, where, **scaler) | {"val_check_interval": 4, "callbacks": [worker]}
    fit(module, make_strategy(), **settings, **EXACT)
    dtypes = {str(value.dtype) for value in getattr(module.trainer.strategy, "center", {}).values()}
    return {
        "workers": np.array(worker.steps),
        "center": flat(module.parameters()),
        "buffers": flat(module.buffers()),
        "dtypes": dtypes,
        "loss": float(module.trainer.callback_metrics["val_loss"]),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mode", MODES)
def test_the_center_is_wide_common_and_apart_from_the_workers(mode, precision):
    first, second = run_ranks(train, 2, partial(shared, tau=2, **MODES[mode]), precision, timeout=120)
    assert first["dtypes"] == second["dtypes"] == {"torch.float32"}
    assert (first["center"] == second["center"]).all()
    assert (first["buffers"] == second["buffers"]).all()
    assert np.isfinite(first["loss"])
    assert first["loss"] == second["loss"]
    assert abs(first["workers"][-1] - second["workers"][-1]).max() > 1e-4
    assert abs(first["workers"][-1] - first["center"]).max() > 1e-4


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.dry)])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_training_is_that_on_the_cpu(mode, precision):
    """To the precision of the products: 8 bits in bfloat16, of which 12 steps with momentum add up some."""

    def both():
        make = partial(shared, tau=2, **MODES[mode])
        cpu = torch.device("cpu")
        return train(make, precision), train(partial(make, where=cpu), precision, cpu)

    tolerance = 1e-4 if precision == "32-true" else 0.15
    for here, on_cpu in run_ranks(both, 2, timeout=120):
        np.testing.assert_allclose(here["workers"], on_cpu["workers"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(here["center"], on_cpu["center"], rtol=0, atol=tolerance)
        assert here["loss"] == pytest.approx(on_cpu["loss"], rel=3 * tolerance)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("mode", ["sync", "center on the CPU", "async"])
def test_without_pull_a_worker_is_that_of_local_training_bit_for_bit(mode, precision):
    """Also with a scale of which the first steps overflow."""
    scaler = {"init_scale": 2.0**20} if precision == "16-mixed" else {}

    def both():
        local = train(partial(shared, LocalStrategy), precision, **scaler)
        ours = train(partial(shared, tau=2, alpha=0, beta=0.5, **MODES[mode]), precision, **scaler)
        return local["workers"], ours["workers"]

    for local, ours in run_ranks(both, 2, timeout=120):
        np.testing.assert_array_equal(ours, local)
        assert abs(local[-1] - local[0]).max() > 1e-3


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_a_center_in_host_memory_has_the_numbers_of_one_on_the_gpu(momentum, precision):
    """What is computed elsewhere is one subtraction and one sum, to a rounding of the float32 center's."""

    def both():
        make = partial(shared, tau=2, momentum=momentum)
        return [train(partial(make, center_device=place), precision) for place in (None, "cpu")]

    tolerance = {"32-true": 1e-5, "16-mixed": 2e-2, "bf16-true": 0.1}[precision]  # narrow products pass roundings on
    for here, there in run_ranks(both, 2, timeout=120):
        np.testing.assert_allclose(there["workers"], here["workers"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(there["center"], here["center"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make", [EASGDStrategy, partial(EASGDStrategy, **IN_TURN), DownpourStrategy])
def test_the_worker_comes_back_bit_for_bit(make, precision):
    class Swapped(Callback):
        def on_train_batch_end(self, trainer, module, batch, outputs, index):
            before = flat(module.parameters())
            with trainer.strategy.center_weights():
                shown = flat(module.parameters())
            after = flat(module.parameters())
            seen.append(((before == after).all(), (before == shown).all()))

    seen = []

    def run():
        fit(Regression(), shared(make, tau=2), callbacks=[Swapped()], **in_precision(precision))
        return all(same for same, _ in seen), all(same for _, same in seen[3:])

    assert run_ranks(run, 2, timeout=120) == [(True, False)] * 2


@pytest.mark.usefixtures("cuda")
def test_the_device_is_the_gpu():
    def run():
        module = Regression()
        fit(module, shared(tau=2), max_steps=3)
        strategy = module.trainer.strategy
        return str(strategy.root_device), strategy.parallel_devices == [device()] * 2

    assert run_ranks(run, 2, timeout=120) == [("cuda:0", True)] * 2
