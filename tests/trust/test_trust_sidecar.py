"""A checkpoint that cannot be written leaves the one before whole and nothing torn, and the error says what it was."""

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from ranks import end_ranks, run_ranks
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")


def fit(folder: Path, strategy: Any, module: Any = None, callbacks: Any = (), **arguments: Any) -> L.Trainer:
    """Write one file again and again, at every second step."""
    saver = ModelCheckpoint(folder, "last", every_n_train_steps=2, save_top_k=1, enable_version_counter=False)
    trainer = quiet_trainer(
        strategy=strategy, devices=2, callbacks=[*callbacks, saver], enable_checkpointing=True, limit_val_batches=0,
        **arguments,
    )  # fmt: skip
    trainer.fit(module or Regression())
    return trainer


def fill_disk(rank: int, number: int) -> None:
    """From this sidecar on this rank finds the disk full, in the middle of its file."""
    opened = LocalFileSystem.open
    files = 0

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def write(self, part: Any) -> int:
            if self.file.tell() + len(part) > 500:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(part)

        def flush(self) -> None:
            self.file.flush()

        def close(self) -> None:
            self.file.close()

    def open_(self: Any, path: str, mode: str = "rb", **keywords: Any) -> Any:
        nonlocal files
        file = opened(self, path, mode, **keywords)
        if ".easgd/" not in str(path) or mode != "wb":
            return file
        files += 1
        return Full(file) if files >= number else file

    if int(os.environ["RANK"]) == rank:
        LocalFileSystem.open = open_  # type: ignore[method-assign]


def whole(file: Path) -> int:
    """The step of a checkpoint, if it and all that belongs to it are there, and nothing else."""
    checkpoint = torch.load(file, weights_only=True)
    folder = file.parent / f"{file.name}.easgd"
    generation = checkpoint["easgd"]["generation"]
    assert [path.name for path in folder.iterdir()] == [generation]
    assert sorted(path.name for path in (folder / generation).iterdir()) == ["rank_0.pt", "rank_1.pt"]
    for path in (folder / generation).iterdir():
        torch.load(path, weights_only=True)
    return checkpoint["global_step"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk(tmp_path: Path, rank: int) -> None:
    def train() -> None:
        fill_disk(rank, 2)
        fit(tmp_path, EASGDStrategy(tau=3, worker_state="sidecar"))

    outcomes = end_ranks(train, 2)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "No space left on device" in outcomes[rank].error
    assert f"(rank {rank})" in outcomes[rank].error
    assert "some rank could not write" in outcomes[1 - rank].error
    assert whole(tmp_path / "last.ckpt") == 2


def test_a_disk_that_is_full_from_the_first(tmp_path: Path) -> None:
    def train() -> None:
        fill_disk(1, 1)
        fit(tmp_path, DownpourStrategy(tau=3, worker_state="sidecar"))

    outcomes = end_ranks(train, 2)
    assert "No space left on device" in outcomes[1].error
    assert "DownpourStrategy(worker_state='sidecar')" in outcomes[1].error
    assert "EASGDStrategy" not in outcomes[1].error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        outcomes = end_ranks(lambda: fit(disk, EASGDStrategy(tau=3, worker_state="sidecar")), 2)
        assert [outcome.exitcode for outcome in outcomes] == [1, 1]
        assert any("No space left on device" in outcome.error for outcome in outcomes)
        assert whole(disk / "last.ckpt") >= 2
    finally:
        subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.parametrize("worker_state", ["sidecar", "embed"])
def test_rank_0_cannot_write_the_checkpoint(tmp_path: Path, worker_state: str) -> None:
    """The workers' states were written before it, and go."""

    def train() -> None:
        written = TorchCheckpointIO.save_checkpoint
        calls = 0

        def save(*arguments: Any, **keywords: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written(*arguments, **keywords)

        TorchCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]
        fit(tmp_path, EASGDStrategy(tau=3, worker_state=worker_state))

    outcomes = end_ranks(train, 2, timeout=30)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "No space left on device" in outcomes[0].error
    assert "rank 0 could not write the checkpoint" in outcomes[1].error
    if worker_state == "sidecar":
        assert whole(tmp_path / "last.ckpt") == 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("worker_state", ["sidecar", "embed"])
def test_a_rank_whose_state_cannot_be_saved(tmp_path: Path, worker_state: str, rank: int) -> None:
    """A generator cannot be pickled; that is found out when a rank prepares its state, or writes it."""

    class Adds(L.Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            if trainer.global_rank == rank:
                checkpoint["optimizer_states"][0]["mine"] = (number for number in range(3))

    def train() -> None:
        fit(tmp_path, EASGDStrategy(tau=3, worker_state=worker_state), callbacks=[Adds()])

    outcomes = end_ranks(train, 2, timeout=30)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "generator" in outcomes[rank].error
    assert "generator" not in outcomes[1 - rank].error.splitlines()[-1]
    assert not (tmp_path / "last.ckpt.easgd").exists()


def test_training_may_go_on_after_a_checkpoint_that_failed(tmp_path: Path) -> None:
    """A generation that was discarded is not taken for the one that the checkpoint names."""

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            number = trainer.global_step
            opened = LocalFileSystem.open
            if number == 4:
                fill_disk(1, 1)
                with pytest.raises(RuntimeError, match="could not write beside"):
                    trainer.save_checkpoint(tmp_path / "last.ckpt")
                LocalFileSystem.open = opened  # type: ignore[method-assign]
            elif number in (2, 6):
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    def train() -> int:
        strategy = EASGDStrategy(tau=3, worker_state="sidecar")
        trainer = quiet_trainer(strategy=strategy, devices=2, callbacks=[Saves()], limit_val_batches=0)
        trainer.fit(Regression())
        return trainer.global_step

    assert run_ranks(train, 2) == [8, 8]
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    folder = tmp_path / "last.ckpt.easgd"
    assert len(list((folder / checkpoint["easgd"]["generation"]).iterdir())) == 2
    assert len(list(folder.iterdir())) == 2  # and the one before


def test_under_fabric(tmp_path: Path) -> None:
    def train() -> None:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2, worker_state="sidecar"))
        fabric.launch()
        module = torch.nn.Linear(4, 1)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), 0.1))
        for step in range(4):
            fabric.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
            if step == 2:
                fill_disk(1, 1)
            if step:
                fabric.save(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer, "global_step": step})

    outcomes = end_ranks(train, 2)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "No space left on device" in outcomes[1].error
    assert whole(tmp_path / "last.ckpt") == 1
