"""A run on the GPU goes on exactly where it was saved, and its checkpoints are those of a run on the CPU."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from bowls import flat
from devices import device, fit, in_precision, on_gpu, shared
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from ranks import run_ranks
from test_resume import Noisy
from torch.utils.data import DataLoader
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint",
    "ignore:Checkpoint directory",
    "ignore:Detected call of `lr_scheduler",  # the scaler has skipped the first step
)
CPU = torch.device("cpu")
IN_TURN = {"mode": "async", "order": "round_robin"}
STRATEGIES = {
    "sync": partial(EASGDStrategy, tau=3),
    "center on the CPU": partial(EASGDStrategy, tau=3, center_device="cpu"),
    "eamsgd": partial(EASGDStrategy, tau=3, momentum=0.9),
    "int8": partial(EASGDStrategy, tau=3, wire_dtype="int8"),
    "sidecar": partial(EASGDStrategy, tau=3, worker_state="sidecar"),
    "async": partial(EASGDStrategy, tau=3, **IN_TURN),
    "async eamsgd": partial(EASGDStrategy, tau=3, momentum=0.9, **IN_TURN),
    "downpour": partial(DownpourStrategy, tau=2, order="round_robin"),
}


class Steps(Callback):
    """By step: parameters, buffers, the momenta, and the state of the device's generator."""

    def __init__(self) -> None:
        self.seen: dict[int, np.ndarray] = {}
        self.started: np.ndarray | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.started is None:
            self.started = flat(module.parameters())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        of_optimizer = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        tensors = [value for value in of_optimizer if isinstance(value, torch.Tensor)]
        on = trainer.strategy.root_device
        generator = torch.cuda.get_rng_state(on) if on.type == "cuda" else torch.get_rng_state()
        self.seen[trainer.global_step] = flat([*module.parameters(), *module.buffers(), *tensors, generator])


def train(
    folder: Path,
    make_strategy: Any,
    resume: Path | None = None,
    *,
    where: torch.device | None = None,
    precision: str = "32-true",
    dropout: float = 0.3,
    scaler: dict[str, Any] | None = None,
) -> tuple[Steps, np.ndarray, dict[str, Any]]:
    """Fit 8 steps, saving after 3 and 6; what each step left, the model, and the scaler's state."""
    torch.manual_seed(7)
    module, steps = Noisy(), Steps()
    module.net[2].p = dropout
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    settings = in_precision(precision, where, **(scaler or {})) | {
        "max_epochs": 2,
        "limit_val_batches": 0,
        "enable_checkpointing": True,
        "use_distributed_sampler": False,
        "deterministic": "warn",
    }
    accelerator = {"accelerator": "auto", "devices": "auto"}
    strategy = shared(make_strategy, where=where)
    trainer = quiet_trainer(strategy=strategy, callbacks=[steps, saver], **accelerator, **settings)
    trainer.fit(module, ckpt_path=None if resume is None else str(resume))
    return steps, flat(module.parameters()), trainer.precision_plugin.state_dict()


def goes_on_exactly(folder: Path, make_strategy: Any, **settings: Any) -> list[str]:
    """On a rank: what differs between a run and those that go on from its checkpoints."""
    whole, end, scaler = train(folder / "whole", make_strategy, **settings)
    assert sorted(whole.seen) == list(range(1, 9))
    different = []
    for step in (3, 6):
        again, same_end, same_scaler = train(
            folder / f"again{step}", make_strategy, folder / "whole" / f"step={step}.ckpt", **settings
        )
        if sorted(again.seen) != list(range(step + 1, 9)):
            different.append(f"steps {sorted(again.seen)} from {step}")
        different += [f"{t} from {step}" for t, seen in again.seen.items() if not np.array_equal(seen, whole.seen[t])]
        if not np.array_equal(end, same_end):
            different.append(f"the model from {step}")
        if scaler != same_scaler:
            different.append(f"the scaler from {step}")
    return different


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_goes_on_exactly(tmp_path, name):
    """With dropout: the device's generator goes on, too."""
    assert run_ranks(goes_on_exactly, 2, tmp_path, STRATEGIES[name], timeout=150) == [[], []]


@pytest.mark.parametrize("name", ["sync", "eamsgd", "async"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_a_run_in_narrow_precision_goes_on_exactly(tmp_path, name, precision):
    """The scaler's first steps overflow, and it grows every two good steps: its state counts."""
    scaler = {"init_scale": 2.0**18, "growth_interval": 2} if precision == "16-mixed" else None
    check = partial(goes_on_exactly, precision=precision, scaler=scaler)
    assert run_ranks(check, 2, tmp_path, STRATEGIES[name], timeout=150) == [[], []]


def test_a_run_in_which_the_state_is_left_out_does_not(tmp_path):
    """The control: these tests see what is missing."""
    different = run_ranks(goes_on_exactly, 2, tmp_path, partial(EASGDStrategy, tau=3, worker_state="none"), timeout=150)
    assert all(different)


@pytest.mark.parametrize(
    "name", [pytest.param("sync", marks=pytest.mark.dry), "eamsgd", "sidecar", "async", "downpour"]
)
@pytest.mark.parametrize("to_cpu", [True, False])
def test_a_run_goes_on_on_another_kind_of_device(tmp_path, name, to_cpu):
    """From the worker's own point, and along its way to the rounding of the other device; without random numbers."""

    def run():
        here, there = (device(), CPU) if to_cpu else (CPU, device())
        settings = {"dropout": 0.0}
        whole, end, _ = train(tmp_path / "whole", STRATEGIES[name], where=here, **settings)
        path = tmp_path / "whole" / "step=3.ckpt"
        again, other_end, _ = train(tmp_path / "again", STRATEGIES[name], path, where=there, **settings)
        return whole.seen, end, again.started, again.seen, other_end

    results = run_ranks(run, 2, timeout=150)
    for whole, end, started, again, other_end in results:
        np.testing.assert_array_equal(started, whole[3][: started.size])
        assert sorted(again) == [4, 5, 6, 7, 8]
        for step, values in again.items():
            # Without the generators' states at the end, which are of different kinds.
            np.testing.assert_allclose(values[: started.size], whole[step][: started.size], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(other_end, end, rtol=1e-4, atol=1e-5)
    assert (results[0][4] == results[1][4]).all()


@pytest.mark.parametrize("mode", [{}, IN_TURN, {"center_device": "cpu"}])
def test_a_checkpoint_is_an_ordinary_one(tmp_path, mode):
    """For readers without a GPU and without this package's strategies."""

    def run():
        saver = ModelCheckpoint(tmp_path, filename="x", save_on_train_epoch_end=True)
        module = Regression()
        fit(module, shared(tau=2, **mode), callbacks=[saver], enable_checkpointing=True)
        return flat(module.state_dict().values())

    first, second = run_ranks(run, 2, timeout=120)
    assert (first == second).all()
    saved = torch.load(tmp_path / "x.ckpt", map_location="cpu", weights_only=True)
    plain = Regression()
    plain.load_state_dict(saved["state_dict"])
    assert (flat(plain.state_dict().values()) == first).all()


def test_a_model_is_validated_from_a_checkpoint_of_the_other_device(tmp_path):
    """The metric is that at the center, wherever it is taken."""

    class Checked(Regression):
        def val_dataloader(self):
            return DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(2)), batch_size=8)

    def run():
        saver = ModelCheckpoint(tmp_path, filename="x", save_on_train_epoch_end=True)
        module = Checked()
        fit(module, shared(tau=2), callbacks=[saver], enable_checkpointing=True)
        value = float(module.trainer.callback_metrics["val_loss"])
        other = Checked.load_from_checkpoint(tmp_path / "x.ckpt", map_location="cpu").eval()
        with torch.no_grad():
            losses = [float(other.loss(batch)) for batch in other.val_dataloader()]
        return value, float(np.mean(losses))

    for value, expected in run_ranks(run, 2, timeout=120):
        assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("cuda")
def test_a_checkpoint_keeps_the_gpus_generator(tmp_path):
    """Each rank its own: the generators have drawn differently."""

    def run():
        train(tmp_path, STRATEGIES["sync"])
        assert on_gpu()
        torch.cuda.manual_seed(0)
        before = torch.cuda.get_rng_state()
        steps, *_ = train(tmp_path / "again", STRATEGIES["sync"], tmp_path / "step=6.ckpt")
        return bool((before == torch.cuda.get_rng_state()).all()), sorted(steps.seen)

    assert run_ranks(run, 2, timeout=120) == [(False, [7, 8])] * 2
