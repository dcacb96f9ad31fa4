"""Workers of several ranks that share a GPU, over gloo and over NCCL: DDP, FSDP2 and tensor parallelism inside."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from bowls import SGD, Bowls, ShardedBowls, flat, rows
from devices import fit, in_precision, over_nccl, shared
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from recursions import SIZE, Adam, Sgd, minima, synchronous
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils.data import DataLoader

from lightning_easgd import EASGDModelParallelStrategy, EASGDStrategy

pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
STEPS = 11
SINGLE = {"rtol": 2e-6, "atol": 2e-6}
WITH_DDP = partial(EASGDStrategy, devices_per_worker=2)
dry = pytest.mark.dry


@pytest.fixture(params=["gloo", "nccl"])
def on_devices(request):
    """What makes a strategy whose ranks are on the device."""
    if request.param == "gloo":
        return shared
    request.getfixturevalue("nccl")
    return over_nccl


@dataclass
class Case:
    """Arguments of the strategy, and of the optimizer of the recursion."""

    strategy: dict[str, Any]
    delta: float = 0.0
    clip: float = np.inf

    @property
    def trainer(self) -> dict[str, Any]:
        return {} if self.clip == np.inf else {"gradient_clip_val": self.clip}

    def reference(self, b, local=None):
        """The rows of workers with these minima."""
        given = self.strategy
        beta = given.get("beta", len(b) * given["alpha"])
        local = local or (lambda _: Sgd(delta=self.delta, clip=self.clip))
        return synchronous(b, STEPS, given["tau"], given["alpha"], beta, local)


@dataclass
class ShardedCase(Case):
    """And the workers: how many, the shape of each, and the rows of the two weights."""

    workers: int = 2
    shape: tuple[int, int] = (2, 1)
    sizes: tuple[int, int] = field(default=(2, SIZE - 2))


def minima_of_workers(workers, size):
    """Those of the mean of what the data-parallel ranks of a worker minimize."""
    return minima(workers * size).reshape(workers, size, SIZE).mean(1)


def of_workers(found, workers, size):
    """The rows of the workers, whose ranks are bitwise the same, and of the center where it has been read."""
    x, center = np.split(found, [workers * size], axis=1)
    x = x.reshape(len(x), workers, size, SIZE)
    assert (x == x[:, :, :1]).all(), "the ranks of a worker are bitwise the same"
    return np.concatenate([x[:, :, 0], center], axis=1)


def expect(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, **tolerance)
    assert abs(expected - expected[0]).max() > 0.1, "the trace of something that moves"


INSIDE = {
    "tau 1": Case({"tau": 1, "alpha": 0.2}),
    "alpha, beta and clipping": Case({"tau": 2, "alpha": 0.3, "beta": 0.7}, clip=1.0),
    "center on the CPU": Case({"tau": 5, "alpha": 0.4, "center_device": "cpu"}),
    "eamsgd": Case({"tau": 2, "alpha": 0.15, "momentum": 0.9}, delta=0.9),
    "eamsgd, center on the CPU": Case({"tau": 2, "alpha": 0.15, "momentum": 0.9, "center_device": "cpu"}, delta=0.9),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=dry if name == "eamsgd" else ()) for name in INSIDE])
def test_with_ddp(name, on_devices):
    case = INSIDE[name]
    make = partial(on_devices, WITH_DDP, ranks=4, **case.strategy)
    found, end = rows(partial(Bowls, STEPS), make, 4, **case.trainer)
    expected = case.reference(minima_of_workers(2, 2))
    expect(of_workers(found, 2, 2), expected, SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


def test_with_ddp_and_exchanges_left_under_way(on_devices):
    """Nobody reads the center before the end: sums of slices travel beside the reductions of gradients."""
    case = Case({"tau": 5, "alpha": 0.2})
    module = partial(Bowls, STEPS, optimizer=partial(torch.optim.Adam, lr=0.1), reads="worker")
    found, end = rows(module, partial(on_devices, WITH_DDP, ranks=4, **case.strategy), 4)
    expected = case.reference(minima_of_workers(2, 2), lambda _: Adam())
    expect(of_workers(found, 2, 2), expected[:, :2], SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


@pytest.mark.parametrize("precision", [pytest.param("16-mixed", marks=dry), "bf16-mixed"])
def test_with_ddp_in_mixed_precision(precision, on_devices):
    """In half precision one rank's loss overflows: all ranks of its worker skip the step, and that worker alone."""
    half = precision == "16-mixed"
    case = Case({"tau": 2, "alpha": 0.15, "momentum": 0.9}, delta=0.9)
    module = partial(Bowls, STEPS, overflow=(1, 4)) if half else partial(ShardedBowls, STEPS)
    scaler = {"init_scale": 2.0**10} if half else {}

    def train():
        fitted = fit(module(), on_devices(WITH_DDP, ranks=4, **case.strategy), **in_precision(precision, **scaler))
        return np.array(fitted.trace), fitted.trainer.precision_plugin.state_dict().get("scale")

    traces, scales = zip(*run_ranks(train, 4, timeout=120), strict=True)
    traces = np.stack(traces, axis=1)
    assert (traces[:, :, 1] == traces[:, :1, 1]).all(), "the center is bitwise the same on all ranks"
    found = of_workers(np.concatenate([traces[:, :, 0], traces[:, 0, 1:]], axis=1), 2, 2)
    expected = case.reference(
        minima_of_workers(2, 2), lambda worker: Sgd(delta=0.9, skip=4 if half and worker == 0 else None)
    )
    if half:
        expect(found, expected, SINGLE)
        assert scales == (2.0**9, 2.0**9, 2.0**10, 2.0**10)
    else:
        expect(found, expected, {"rtol": 0, "atol": abs(expected).max() * 2.0**-7})
        assert abs(found - expected).max() > 1e-4, "something was rounded"


@pytest.mark.parametrize(
    ("cls", "module", "given"),
    [
        (WITH_DDP, Bowls, {"wire_dtype": "bfloat16"}),
        (WITH_DDP, Bowls, {"wire_dtype": "int8", "center_device": "cpu"}),
        (partial(EASGDModelParallelStrategy, 2), ShardedBowls, {"wire_dtype": "int8"}),
    ],
    ids=["DDP, bfloat16", "DDP, int8, center on the CPU", "FSDP2, int8"],
)
def test_compressed_differences(cls, module, given, on_devices):
    """Next to the exact recursion: what rounding drops is sent later."""
    case = Case({"tau": 2, "alpha": 0.3})
    found, _ = rows(partial(module, STEPS), partial(on_devices, cls, ranks=4, **case.strategy, **given), 4)
    exact = case.reference(minima_of_workers(2, 2))
    quantum = {"bfloat16": 2.0**-8, "int8": 1 / 127}[given["wire_dtype"]]
    one = 2 * 0.3 * abs(exact[:, :-1] - exact[:, -1:]).max() * quantum
    expect(of_workers(found, 2, 2), exact, {"rtol": 0, "atol": 3 * one})
    assert abs(found[:, -1] - exact[:, -1]).max() > 1e-6, "something was rounded"


SHARDED = {
    "FSDP2": ShardedCase({"tau": 2, "alpha": 0.3, "beta": 0.7}, clip=1.0),
    "FSDP2 with an empty shard": ShardedCase(
        {"tau": 1, "alpha": 0.15, "momentum": 0.9}, delta=0.9, sizes=(1, SIZE - 1)
    ),
    "FSDP2, center on the CPU": ShardedCase({"tau": 5, "alpha": 0.4, "center_device": "cpu"}),
    "TP": ShardedCase({"tau": 2, "alpha": 0.15, "momentum": 0.9}, delta=0.9, clip=1.0, shape=(1, 2)),
    "FSDP2 and TP": ShardedCase({"tau": 2, "alpha": 0.3, "beta": 0.7}, workers=1, shape=(2, 2)),
    "workers of one rank": ShardedCase({"tau": 2, "alpha": 0.2}, shape=(1, 1)),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=dry if name == "FSDP2" else ()) for name in SHARDED])
def test_sharded_workers(name, on_devices):
    case = SHARDED[name]
    data, tensor = case.shape
    ranks = case.workers * data * tensor
    make = partial(on_devices, EASGDModelParallelStrategy, ranks=ranks, **case.strategy)
    make = partial(make, data_parallel_size=data, tensor_parallel_size=tensor)
    found, end = rows(partial(ShardedBowls, STEPS, sizes=case.sizes), make, ranks, **case.trainer)
    expected = case.reference(minima_of_workers(case.workers, data))
    expect(of_workers(found, case.workers, data * tensor), expected, SINGLE)
    np.testing.assert_allclose(end, expected[-1, -1], **SINGLE)


class Validated(ShardedBowls):
    def validation_step(self, batch, index):
        self.log("val_loss", self.loss([0, 1]), sync_dist=True)

    def val_dataloader(self):
        return DataLoader(torch.zeros(2 * self.trainer.distributed_sampler_kwargs["num_replicas"]), batch_size=1)


class Save(Callback):
    """Saves a checkpoint after the first epoch, and keeps the center of then."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)
            self.center = flat(trainer.strategy.center.values())


SAVED = {
    "DDP": WITH_DDP,
    "FSDP2, a folder": partial(EASGDModelParallelStrategy, 2),
    "FSDP2, one file": partial(EASGDModelParallelStrategy, 2, save_distributed_checkpoint=False),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=dry if "folder" in kind else ()) for kind in SAVED])
def test_a_run_goes_on_exactly_and_validation_changes_nothing(kind, on_devices, tmp_path):
    """From a checkpoint that is the center, saved while an exchange is under way."""
    path = tmp_path / "end.ckpt"

    def run(ckpt_path=None, callbacks=(), limit_val_batches=0):
        strategy = on_devices(SAVED[kind], ranks=4, tau=4, alpha=0.3, beta=0.8, momentum=0.9)
        module = Validated(7, optimizer=SGD, reads="worker")
        trainer = {"max_epochs": 2, "val_check_interval": 3, "limit_val_batches": limit_val_batches}
        fit(module, strategy, ckpt_path, callbacks=list(callbacks), **trainer)
        return np.array(module.trace), flat(module.parameters())

    def train():
        save = Save(path)
        return run(), run(callbacks=[save], limit_val_batches=2), run(path), save.center

    def read():
        """In a process of its own, as torch may look for a device."""
        whole = path
        if path.is_dir():
            whole = tmp_path / "whole.ckpt"
            dcp_to_torch_save(path, whole)
        return flat(torch.load(whole, map_location="cpu", weights_only=True)["state_dict"].values())

    results = run_ranks(train, 4, timeout=150)
    for (trace, end), (watched, watched_end), (resumed, resumed_end), center in results:
        assert len(trace) == 14
        np.testing.assert_array_equal(watched, trace)
        np.testing.assert_array_equal(resumed, trace[7:])
        np.testing.assert_array_equal(watched_end, end)
        np.testing.assert_array_equal(resumed_end, end)
        np.testing.assert_array_equal(end, results[0][0][1])
        np.testing.assert_array_equal(center, results[0][3])
    assert abs(results[0][0][0] - results[2][0][0]).max() > 0.1, "the workers are not alike"
    (saved,) = run_ranks(read, 1)
    np.testing.assert_array_equal(saved, results[0][3])
