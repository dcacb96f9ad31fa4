"""A checkpoint that no meeting precedes holds the center, whatever the module makes of its state_dict; never a worker.

Such are a checkpoint on an error, and one of the signal handler of SLURM's requeue.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from ranks import end_ranks, run_ranks
from torch import Tensor, nn
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", r"ignore:.*called without a model", r'ignore:.*ckpt_path="last". is set'
)

STRATEGIES = {
    "sync": lambda: EASGDStrategy(tau=2),
    "async": lambda: EASGDStrategy(tau=2, mode="async"),
    "adownpour": lambda: DownpourStrategy(tau=2, average="polyak"),
}

PRECISIONS = ("32-true", "bf16-true")


class Plain(Regression):
    def center(self) -> dict[str, Tensor]:
        """The center as this rank knows it, in the parameters' dtype."""
        return {
            name: value.to(self.net[0].weight.dtype).clone()
            for name, value in self.trainer.strategy.known_center.items()
        }

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch.to(self.net[0].weight.dtype) + self.trainer.global_rank)


class Casts(Plain):
    """A hook that makes new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(lambda _, state, *__: {key: value.half() for key, value in state.items()})

    def center(self) -> dict[str, Tensor]:
        return {name: value.half() for name, value in super().center().items()}


class Renames(Plain):
    """An override that renames and clones."""

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        state = super().state_dict(*arguments, **keywords)
        return {f"model.{key}": value.clone() for key, value in state.items()}

    def center(self) -> dict[str, Tensor]:
        return {f"model.{name}": value for name, value in super().center().items()}


class Joins(Plain):
    """An override that joins parameters to one tensor."""

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"all": torch.cat([parameter.detach().flatten() for parameter in self.parameters()])}

    def center(self) -> dict[str, Tensor]:
        return {"all": torch.cat([value.flatten() for value in super().center().values()])}


class Tied(Plain):
    """A parameter with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 8)
        self.again.weight = self.net[0].weight
        self.again.bias = self.net[0].bias

    def center(self) -> dict[str, Tensor]:
        values = super().center()
        return values | {"again.weight": values["net.0.weight"]}


def worker(module: Plain) -> list[list[float]]:
    return [parameter.flatten().tolist() for parameter in module.parameters()]


def noting(cls: type[Plain], act: Any) -> type[Plain]:
    """The module, which at its 7th batch, between forward and backward, notes center and worker, and acts."""

    class Notes(cls):  # type: ignore[misc, valid-type]
        noted: Any = None

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss = super().training_step(batch, index)
            if index == 7 and self.noted is None:
                self.noted = self.center(), {key: value.clone() for key, value in self.state_dict().items()}
                before = worker(self)
                act(self)
                assert worker(self) == before
            return loss

    return Notes


@pytest.mark.parametrize(
    ("strategy", "cls", "precision"),
    [
        *(("sync", cls, precision) for cls in (Plain, Casts, Renames, Joins, Tied) for precision in PRECISIONS),
        ("async", Casts, "32-true"),
        ("adownpour", Casts, "32-true"),
    ],
)
def test_an_error_checkpoint_holds_the_center(tmp_path: Path, strategy: str, cls: type[Plain], precision: str) -> None:
    def fail(module: Plain) -> None:
        if module.trainer.is_global_zero:
            torch.save(module.noted, tmp_path / "center.pt")
        raise KeyError("wrong")

    def train() -> None:
        callbacks = [OnExceptionCheckpoint(tmp_path, "error")]
        trainer = quiet_trainer(
            strategy=STRATEGIES[strategy](),
            devices=2,
            callbacks=callbacks,
            enable_checkpointing=True,
            precision=precision,
        )
        trainer.fit(noting(cls, fail)())

    assert [outcome.exitcode for outcome in end_ranks(train, 2)] == [1, 1]
    center, own = torch.load(tmp_path / "center.pt")
    state = torch.load(tmp_path / "error.ckpt", weights_only=True)["state_dict"]
    for name, value in center.items():
        assert state[name].dtype == value.dtype
        assert strategy != "sync" or torch.equal(state[name], value), name  # an asynchronous center moves on
    assert not all(torch.equal(state[name], own[name]) for name in center)


@pytest.mark.parametrize("cls", [Casts, Renames, Tied])
def test_slurms_signal_handler_saves_the_center_and_leaves_the_step_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: type[Plain]
) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def be_signalled(module: Plain) -> None:
        time.sleep(0.2 * module.trainer.global_rank)
        os.kill(os.getpid(), signal.SIGUSR1)

    def train(signalled: bool, folder: Path) -> tuple[Any, Any]:
        rank = os.environ["RANK"]
        os.environ.update(
            SLURM_NTASKS="2", SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID="0", SLURM_JOB_ID="17",
            SLURM_JOB_NAME="train", SLURM_NTASKS_PER_NODE="2", SLURM_NODELIST="localhost",
        )  # fmt: skip
        os.environ["MAIN_ADDRESS"] = "127.0.0.1"
        torch.manual_seed(1)
        module = noting(cls, be_signalled if signalled else lambda _: None)()
        plugins = [SLURMEnvironment(auto_requeue=True)]
        trainer = quiet_trainer(
            strategy=EASGDStrategy(tau=2), devices=2, max_epochs=2, plugins=plugins, default_root_dir=folder
        )
        trainer.fit(module)
        return module.noted, worker(module)

    ((center, _), end), (_, other_end) = run_ranks(train, 2, True, tmp_path)
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert checkpoint["easgd"]["clocks"] == [7]
    for name, value in center.items():
        assert torch.equal(checkpoint["state_dict"][name], value), name
    assert end == other_end == run_ranks(train, 2, False, tmp_path / "other")[0][1]
