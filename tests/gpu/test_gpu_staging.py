"""The served center's way from the GPU and back, also where copies are slow."""

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from bowls import flat
from devices import count_cuda_devices, device, fit, on_gpu, shared
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from torch import nn
from toys import Quadratic, Regression

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.averagers.served import averaging as serving
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport import staging
from lightning_easgd.transport.staging import make_staging

LONG = 200_000_000  # clock cycles of a GPU: about 0.1 s


def slowly(vector_staging):
    """Make the copies of a staging wait for 0.1 s on its stream."""
    if on_gpu():
        with torch.cuda.stream(vector_staging._queue._side):
            torch.cuda._sleep(LONG)


def make_slow(patch):
    """Every copy of every exchange comes late."""
    if not on_gpu():
        return
    for name in ("depart", "arrive"):
        original = getattr(staging.DeviceStaging, name)

        def late(self, original=original):
            slowly(self)
            original(self)

        patch.setattr(staging.DeviceStaging, name, late)


def in_process(function):
    """Run on one rank, so that this process never touches CUDA."""
    return run_ranks(function, 1, timeout=90)[0]


@pytest.mark.dry
@pytest.mark.parametrize("size", [1, 1_000_003])
def test_what_is_sent_is_what_the_parameter_held_at_departure(size):
    def run():
        parameter = torch.randn(size, device=device())
        wire = FlatTensors([[parameter]], torch.float32)
        way, held = make_staging(wire.flat), parameter.cpu().clone()
        wire.load_([parameter])
        slowly(way)
        way.depart()
        parameter.fill_(7.0)  # as the optimizer's step does
        return torch.equal(way.messages(), held)

    assert in_process(run)


@pytest.mark.usefixtures("cuda")
def test_departure_waits_for_the_kernels_that_write_the_vector():
    def run():
        vector = torch.zeros(1_000_000, device=device())
        way = make_staging(vector)
        torch.cuda._sleep(LONG)
        vector.fill_(3.0)
        way.depart()
        return bool((way.messages() == 3.0).all())

    assert in_process(run)


@pytest.mark.usefixtures("cuda")
def test_the_messages_are_not_there_before_the_copy():
    def run():
        vector = torch.full((1_000_000,), 5.0, device=device())
        way = make_staging(vector)
        torch.cuda.synchronize()
        slowly(way)
        started = time.monotonic()
        way.depart()
        departed = time.monotonic() - started
        message = way.messages()
        return departed, time.monotonic() - started, bool((message == 5.0).all())

    departed, arrived, right = in_process(run)
    assert right
    assert departed < arrived / 2, "departing waits for nothing"
    assert arrived > 0.02


@pytest.mark.parametrize("size", [1, 1_000_003])
def test_the_next_kernel_sees_the_answers(size):
    def run():
        vector = torch.ones(size, device=device())
        way = make_staging(vector)
        way.depart()
        way.messages().mul_(2.0)
        slowly(way)
        way.arrive()
        return torch.equal((vector + 1.0).cpu(), torch.full((size,), 3.0))

    assert in_process(run)


@pytest.mark.usefixtures("cuda")
def test_messages_are_pinned_as_is_a_center_on_the_host():
    def run():
        parameter = torch.randn(1000, device=device())
        here, there = (FlatTensors([[parameter]], torch.float32, place) for place in (None, "cpu"))
        way = make_staging(here.flat)
        way.depart()
        return here.flat.is_cuda, way.messages().is_pinned(), there.flat.is_pinned(), there.like().flat.is_pinned()

    assert in_process(run) == (True, True, True, True)


def test_the_exchange_thread_is_on_the_ranks_device():
    """A thread begins on device 0, and CUDA must not make a context there for a rank of another device."""
    seen = []

    def run():
        name = "DeviceStaging" if on_gpu() else "HostStaging"
        original = getattr(staging, name).messages

        def watched(self):
            message = original(self)
            seen.append((threading.current_thread().name, torch.cuda.current_device() if on_gpu() else None))
            return message

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(getattr(staging, name), "messages", watched)
            fit(Regression(), shared(mode="async", tau=2), limit_val_batches=0)
        names = {thread.startswith("easgd-exchange") for thread, _ in seen}
        contexts = [
            torch._C._cuda_hasPrimaryContext(number) for number in range(count_cuda_devices() if on_gpu() else 0)
        ]
        return names, {number for _, number in seen}, contexts[1:]

    for names, devices, other_contexts in run_ranks(run, 2, timeout=120):
        assert names == {True}
        assert devices == {0 if on_gpu() else None}
        assert not any(other_contexts)


class Linear(Quadratic):
    """f_i = (i + 1) · x with many elements: every x is a whole number."""

    def __init__(self, steps):
        super().__init__(lr=1.0, steps=steps, record=False)
        self.x = nn.Parameter(torch.zeros(1000))

    def training_step(self, batch, index):
        return (self.x * (self.trainer.global_rank + 1)).sum()


class Last(Callback):
    def on_train_end(self, trainer, module):
        with trainer.strategy.worker_weights():
            self.worker = flat(module.parameters())


@pytest.mark.filterwarnings("ignore:.*is unstable")
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(("alpha", "tolerance"), [(1.0, 0.0), (0.3, 1e-5)])
def test_conservation_in_free_order(alpha, tolerance, slow):
    """Σ x_i + x̃ moves by the gradients alone: no answer is lost, doubled or applied before it is there."""
    steps = 20 if slow else 100

    def run():
        last, module = Last(), Linear(steps)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serving, "open_center", partial(serving.open_center, chunk_elements=300))
            if slow:
                make_slow(patch)
            fit(module, shared(mode="async", tau=1, alpha=alpha), callbacks=[last])
        return last.worker, flat(module.parameters())

    (x, center), (y, other) = run_ranks(run, 2, timeout=150)
    assert (center == other).all()
    np.testing.assert_allclose(x + y + center, np.full(1000, -steps * 3.0), rtol=tolerance)


@pytest.mark.parametrize("make", [partial(EASGDStrategy, mode="async", order="round_robin"), DownpourStrategy])
def test_slow_copies_change_no_number(make):
    order = {"order": "round_robin"}

    def run():
        results = []
        for slow in (False, True):
            torch.manual_seed(0)
            module, last = Regression(batches=8), Last()
            with pytest.MonkeyPatch.context() as patch:
                if slow:
                    make_slow(patch)
                fit(module, shared(partial(make, **order), tau=2), callbacks=[last], deterministic="warn")
            results.append((last.worker, flat(module.parameters())))
        return results

    for (worker, center), (slow_worker, slow_center) in run_ranks(run, 2, timeout=150):
        np.testing.assert_array_equal(worker, slow_worker)
        np.testing.assert_array_equal(center, slow_center)
        assert abs(worker - center).max() > 1e-4
