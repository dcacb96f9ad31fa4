"""Two ranks on one GPU over gloo (NCCL refuses a shared device): each path that a GPU takes."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from test_strategy import arrays, equal
from torch.distributed import is_nccl_available
from toys import Regression, fitted, quiet_trainer

from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.staging import CudaStaging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODES = [{}, {"center_device": "cpu"}, {"mode": "async", "order": "round_robin"}]


def shared(cls=EASGDStrategy, **arguments):
    """A strategy whose two ranks both use the first GPU."""
    device = torch.device("cuda", 0)
    return cls(parallel_devices=[device, device], process_group_backend="gloo", **arguments)


class Worker(Callback):
    def on_train_batch_end(self, trainer, module, *_):
        self.last = arrays(p.double() for p in module.parameters())


def train(make, precision="32-true", compiled=False):
    torch.manual_seed(0)
    module = Regression(batches=12)
    if compiled:
        module.net = torch.compile(module.net)
    worker = Worker()
    trainer = {"accelerator": "auto", "devices": "auto", "precision": precision, "callbacks": [worker]}
    quiet_trainer(strategy=make(), **trainer).fit(module)
    return worker.last, arrays(p.double() for p in module.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("compiled", [False, True])
def test_fit(mode, precision, compiled):
    if compiled and precision == "bf16-true":
        pytest.skip("one narrow dtype is enough for the compiler")
    first, second = run_ranks(train, 2, lambda: shared(tau=2, **mode), precision, compiled, timeout=150)
    assert equal(first[1], second[1])
    assert not equal(first[0], second[0])


def test_a_center_in_host_memory_has_the_numbers_of_one_on_the_gpu():
    here, there = (run_ranks(train, 2, lambda m=m: shared(tau=2, **m), timeout=90) for m in MODES[:2])
    for one, other in zip(here, there, strict=True):
        for a, b in zip(one[0] + one[1], other[0] + other[1], strict=True):
            assert abs(a - b).max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_without_pull_a_worker_is_that_of_local_training(mode):
    local = run_ranks(train, 2, lambda: shared(LocalStrategy), "16-mixed", timeout=90)
    ours = run_ranks(train, 2, lambda: shared(tau=2, alpha=0, **mode), "16-mixed", timeout=90)
    assert all(equal(a[0], b[0]) for a, b in zip(local, ours, strict=True))


def test_nccl_with_a_single_rank():
    if not is_nccl_available():
        pytest.skip("this torch has no NCCL")

    def run():
        return arrays(fitted(Regression(), EASGDStrategy(tau=2), 1, accelerator="gpu").parameters())

    assert all(abs(value).max() < 100 for value in run_ranks(run, 1)[0])


def test_pinned_memory():
    def run():
        parameter = torch.randn(1000, device="cuda")
        flat = FlatTensors([[parameter]], torch.float32)
        assert FlatTensors([[parameter]], torch.float32, "cpu").flat.is_pinned()
        flat.load_([parameter])
        staging = CudaStaging(flat.flat)
        staging.depart()
        message = staging.messages()
        assert message.is_pinned()
        sent = torch.equal(message, parameter.cpu())
        message.mul_(2)
        staging.arrive()
        return sent, torch.equal(flat.flat, 2 * parameter)

    assert run_ranks(run, 1) == [(True, True)]
