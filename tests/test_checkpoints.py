"""What a checkpoint is: an ordinary file for everybody, whole at every moment, and more for our workers."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from ranks import end_ranks, run_ranks
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.strategies.worker_state import worker_states
from lightning_easgd.strategies.worker_state.keeper import edited_tensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint",
    "ignore:Checkpoint directory",
    "ignore:Be aware that when using `ckpt_path`",
    r"ignore:.*called without a model",  # with OnExceptionCheckpoint, which resumes by itself
    r'ignore:.*ckpt_path="last". is set',
)


def fit(module: Any = None, resume: Any = None, ranks: int = 2, strategy: Any = None, **arguments: Any) -> L.Trainer:
    """Fit a model that validates itself at every epoch's end."""
    torch.manual_seed(1)
    trainer = quiet_trainer(strategy=strategy or EASGDStrategy(tau=3), devices=ranks, **({"max_epochs": 2} | arguments))
    trainer.fit(module or Regression(), ckpt_path=resume)
    return trainer


def saving(folder: Any, **arguments: Any) -> dict[str, Any]:
    saver = ModelCheckpoint(folder, **({"save_top_k": -1} | arguments))
    return {"callbacks": [saver], "enable_checkpointing": True}


def started(*arguments: Any, **keywords: Any) -> tuple[list[list[float]], list[list[float]], str]:
    """Resume, and return where this worker and its center started, and all that was warned of."""
    module = Starts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, *arguments, max_epochs=3, **keywords)
    return numbers(module.start), numbers(module.start_center), " ".join(str(each.message) for each in caught)


class Starts(Regression):
    """Remembers where this worker was when it began to train, and where its center was."""

    def on_train_batch_start(self, *_: Any) -> None:
        if not hasattr(self, "start"):
            self.start = self.values()
            self.start_center = [value.clone() for value in self.trainer.strategy.center.values()]

    def values(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]


def numbers(tensors: Any) -> list[list[float]]:
    return [tensor.flatten().tolist() for tensor in tensors]


# The file


@pytest.mark.parametrize("worker_state", ["embed", "sidecar", "none"])
def test_a_checkpoint_is_an_ordinary_one(tmp_path: Path, worker_state: str) -> None:
    def train() -> list[list[float]]:
        fit(strategy=EASGDStrategy(tau=3, worker_state=worker_state), **saving(tmp_path, filename="x"))
        return []

    run_ranks(train, 2)
    file = tmp_path / "x.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    extra = checkpoint.pop("easgd")
    common = {"format", "method", "world_size", "center", "exchanged", "trained", "stores", "clocks", "layouts"}
    assert set(extra) == common | {"shared", "sums", "fingerprints"} | {
        "embed": {"workers"}, "sidecar": {"generation"}, "none": set()
    }[worker_state]  # fmt: skip
    if worker_state == "embed":
        assert len(extra["workers"]) == 2
        first, second = (numbers(worker["tensors"].values()) for worker in extra["workers"])
        assert first != second != numbers(checkpoint["state_dict"].values())
    module = Regression.load_from_checkpoint(file)
    assert numbers(module.state_dict().values()) == numbers(checkpoint["state_dict"].values())
    # Plain Lightning, one device, goes on from it.
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, ckpt_path=file)
    assert trainer.global_step > 16


def test_it_loads_where_this_package_is_missing(tmp_path: Path) -> None:
    run_ranks(lambda: fit(**saving(tmp_path, filename="x")) and None, 2)
    code = (
        "import sys, torch; sys.modules['lightning_easgd'] = None;"
        f"c = torch.load({str(tmp_path / 'x.ckpt')!r}, weights_only=True); print(sorted(c['state_dict'])[0])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "net.0.bias"


def test_weights_only_and_asynchronous_writers(tmp_path: Path) -> None:
    def train() -> None:
        fit(**saving(tmp_path, filename="weights", save_weights_only=True))
        fit(plugins=[AsyncCheckpointIO()], **saving(tmp_path, filename="{step}", every_n_train_steps=3))

    run_ranks(train, 2)
    assert "easgd" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)

    def resume() -> list[list[float]]:
        module = Starts()
        fit(module, tmp_path / "step=9.ckpt")
        return numbers(module.start)

    workers = torch.load(tmp_path / "step=9.ckpt", weights_only=True)["easgd"]["workers"]
    saved = [[worker["tensors"][name] for name, _ in Regression().named_parameters()] for worker in workers]
    assert run_ranks(resume, 2) == [numbers(tensors) for tensors in saved]


def test_a_checkpoint_saved_after_fit_goes_on_too(tmp_path: Path) -> None:
    def train() -> tuple[Any, Any]:
        ended, again = Regression(), Starts()
        own = []
        last = type("Last", (L.Callback,), {"on_train_batch_end": lambda *_: own.append(Starts.values(ended))})
        trainer = fit(ended, callbacks=[last()])
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        fit(again, tmp_path / "x.ckpt", max_epochs=3)
        return numbers(own[-1]), numbers(again.start)

    for own, start in run_ranks(train, 2):
        assert start == own


@pytest.mark.parametrize("worker_state", ["embed", "sidecar", "none"])
def test_a_checkpoint_saved_after_a_fit_without_steps_is_the_one_that_was_read(
    tmp_path: Path, worker_state: str
) -> None:
    def train() -> tuple[Any, Any]:
        def strategy() -> EASGDStrategy:
            return EASGDStrategy(tau=3, outer_momentum=0.5, worker_state=worker_state)

        starts = []
        fit(strategy=strategy()).save_checkpoint(tmp_path / "x.ckpt")
        fit(None, tmp_path / "x.ckpt", strategy=strategy()).save_checkpoint(tmp_path / "y.ckpt")
        for name in ("x", "y"):
            again = Starts()
            fit(again, tmp_path / f"{name}.ckpt", strategy=strategy(), max_epochs=3)
            starts.append([*numbers(again.start), *numbers(again.parameters()), *numbers(again.buffers())])
        return starts[0], starts[1]

    for read, saved in run_ranks(train, 2):
        assert saved == read


def test_an_edit_is_not_lost_in_a_fit_without_steps(tmp_path: Path) -> None:
    def strategy() -> EASGDStrategy:
        return EASGDStrategy(tau=3, outer_momentum=0.5)

    def save() -> None:
        fit(strategy=strategy()).save_checkpoint(tmp_path / "x.ckpt")

    def go_on() -> tuple[Any, Any]:
        fit(None, tmp_path / "x.ckpt", strategy=strategy()).save_checkpoint(tmp_path / "y.ckpt")
        read, saved = (started(tmp_path / f"{name}.ckpt", strategy=strategy()) for name in "xy")
        return read, saved

    run_ranks(save, 2)
    checkpoint = torch.load(tmp_path / "x.ckpt")
    checkpoint["state_dict"]["net.0.weight"] += 100
    torch.save(checkpoint, tmp_path / "x.ckpt")
    outcomes = run_ranks(go_on, 2)
    assert "net.0.weight had other names, shapes or values" in outcomes[0][0][2]
    for read, saved in outcomes:
        assert saved == read
        assert min(saved[0][0]) > 50


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_checkpoint_saved_after_fit_has_the_center_beside_what_callbacks_left(tmp_path: Path, mode: str) -> None:
    class Average(L.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            self.center = numbers(trainer.strategy.center.values())
            with torch.no_grad():
                module.net[0].weight.fill_(7)

    def train() -> tuple[Any, Any]:
        average, again = Average(), Starts()
        fit(strategy=EASGDStrategy(tau=12, mode=mode), callbacks=[average]).save_checkpoint(tmp_path / "x.ckpt")
        fit(again, tmp_path / "x.ckpt", strategy=EASGDStrategy(tau=12, mode=mode), max_epochs=3)
        return average.center, numbers(again.start_center)

    for center, start in run_ranks(train, 2):  # the resumed run, from step 16 to 24, makes no exchange
        assert start == center
    assert 7.0 in torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]["net.0.weight"]


def test_a_fit_knows_nothing_of_the_fit_before(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:  # as the LR finder does
            if trainer.max_epochs == 4:
                trainer.save_checkpoint(tmp_path / "4.ckpt")

    class Fails(Regression):
        def on_train_start(self) -> None:
            raise KeyError("wrong")

    def train() -> tuple[Any, Any]:
        trainer = fit(callbacks=[Saves()])
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        trainer.fit_loop.max_epochs = 3
        with pytest.raises(KeyError):
            trainer.fit(Fails(), ckpt_path=tmp_path / "x.ckpt")
        trainer.fit_loop.max_epochs = 4
        module = Starts()
        trainer.fit(module)
        return numbers(module.start), numbers(module.start_center)

    for start, center in run_ranks(train, 2):
        assert start == center
    assert "easgd" not in torch.load(tmp_path / "4.ckpt", weights_only=True)


def test_a_resumed_run_may_have_one_more_scheduler(tmp_path: Path) -> None:
    class Scheduled(Starts):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    run_ranks(lambda: fit(**saving(tmp_path, filename="x")) and None, 2)
    assert run_ranks(lambda: fit(Scheduled(), tmp_path / "x.ckpt", max_epochs=3).global_step, 2) == [24, 24]


# Other workers


@pytest.mark.parametrize("worker_state", ["embed", "sidecar"])
@pytest.mark.parametrize(
    "strategy", [EASGDStrategy, lambda **k: EASGDStrategy(mode="async", **k), DownpourStrategy], ids=["s", "a", "d"]
)
def test_another_number_of_workers_starts_at_the_center_and_says_so(
    tmp_path: Path, strategy: Any, worker_state: str
) -> None:
    file = tmp_path / "x.ckpt"
    run_ranks(lambda: fit(strategy=strategy(tau=3), **saving(tmp_path, filename="x")) and None, 2)

    center = torch.load(file, weights_only=True)["state_dict"]
    expected = numbers(center[name] for name, _ in Regression().named_parameters())
    resumed = run_ranks(lambda: started(file, 3, strategy(tau=3)), 3)
    assert [start for start, _, _ in resumed] == [expected] * 3  # an asynchronous center may have moved on already
    assert "saved by 2 workers, and now there are 3" in resumed[0][2]


def test_a_missing_or_torn_sidecar_starts_at_the_center_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"

    def train() -> None:
        fit(strategy=EASGDStrategy(tau=3, worker_state="sidecar"), **saving(tmp_path, filename="x"))

    run_ranks(train, 2)
    torn = max((tmp_path / "x.ckpt.easgd").glob("*/rank_1.pt"))
    content = torn.read_bytes()
    for rest in (content[: len(content) // 2], b"", None):
        torn.unlink(missing_ok=True)
        if rest is not None:
            torn.write_bytes(rest)
        resumed = run_ranks(lambda: started(file), 2)
        assert all(start == center for start, center, _ in resumed)
        assert "missing or torn" in resumed[0][2]
        torn.write_bytes(content)
    assert any(start != center for start, center, _ in run_ranks(lambda: started(file), 2))


def test_sidecars_go_with_their_checkpoints(tmp_path: Path) -> None:
    def train() -> None:
        strategy = EASGDStrategy(tau=3, worker_state="sidecar")
        only_one = saving(tmp_path, filename="{step}", save_top_k=1, every_n_train_steps=2, save_last=True)
        fit(strategy=strategy, **only_one)

    run_ranks(train, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.ckpt", "last.ckpt.easgd", "step=16.ckpt", "step=16.ckpt.easgd"
    ]  # fmt: skip
    # Of a file that is written again and again the generation before the last is kept, not more.
    assert len(list((tmp_path / "last.ckpt.easgd").iterdir())) == 2
    assert len(list((tmp_path / "step=16.ckpt.easgd").iterdir())) == 1


def test_a_link_to_a_checkpoint_finds_its_sidecar(tmp_path: Path) -> None:
    def train() -> None:
        fit(
            strategy=EASGDStrategy(tau=3, worker_state="sidecar"),
            **saving(tmp_path, filename="{step}", save_top_k=1, every_n_train_steps=4, save_last="link"),
        )

    run_ranks(train, 2)
    assert (tmp_path / "last.ckpt").is_symlink()
    for start, center, warned in run_ranks(lambda: started(tmp_path / "last.ckpt"), 2):
        assert start != center
        assert "missing or torn" not in warned


# Trouble


@pytest.mark.parametrize("worker_state", ["embed", "sidecar"])
def test_a_kill_between_any_two_writes_leaves_a_whole_checkpoint(tmp_path: Path, worker_state: str) -> None:
    """One file is written at every step; both ranks are killed at the k-th write of any file, for each k."""

    def train(folder: str, writes: int) -> None:
        def count(event: str, arguments: Any) -> None:
            nonlocal writes
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "shutil.move") and folder in str(arguments[:2]):
                writes -= 1
                if writes == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        last = saving(folder, filename="last", every_n_train_steps=1, save_top_k=1, enable_version_counter=False)
        fit(strategy=EASGDStrategy(tau=2, worker_state=worker_state), max_epochs=1, **last)

    def resume(file: str) -> int:
        return fit(Starts(), file, max_epochs=2).global_step

    outcomes, resumed = [], 0
    for writes in range(6, 26, 3):
        folder = tmp_path / str(writes)
        outcomes += [outcome.exitcode for outcome in end_ranks(train, 2, str(folder), writes)]
        whole = list(folder.glob("*.ckpt"))
        for file in whole:
            torch.load(file, weights_only=True)
        if whole:
            assert run_ranks(resume, 2, str(whole[0])) == [16, 16]
            resumed += 1
    assert -signal.SIGKILL in outcomes
    assert resumed > 0


def test_a_second_kill_before_the_checkpoint_is_replaced_leaves_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"

    def train(killed: bool, resume: Any = None) -> None:
        last = saving(tmp_path, filename="last", every_n_train_steps=2, save_top_k=1, enable_version_counter=False)
        if killed:  # the workers' states are beside the checkpoint, and it is never written

            def kill(*_: Any, **__: Any) -> None:
                if file.exists():
                    os.kill(os.getpid(), signal.SIGKILL)

            TorchCheckpointIO.save_checkpoint = kill  # type: ignore[method-assign]
        epochs = 1 if resume is None else 2
        fit(strategy=EASGDStrategy(tau=2, worker_state="sidecar"), max_epochs=epochs, resume=resume, **last)

    def written() -> list[str]:
        generation = torch.load(file, weights_only=True)["easgd"]["generation"]
        return sorted(path.name for path in (tmp_path / "last.ckpt.easgd" / generation).iterdir())

    run_ranks(train, 2, False)
    for _ in range(3):
        assert end_ranks(train, 2, True, file)[0].exitcode == -signal.SIGKILL
        assert written() == ["rank_0.pt", "rank_1.pt"]
    run_ranks(train, 2, False, file)
    assert written() == ["rank_0.pt", "rank_1.pt"]
    assert len(list((tmp_path / "last.ckpt.easgd").iterdir())) == 2


def test_an_error_checkpoint_holds_the_center_and_waits_for_nobody(tmp_path: Path) -> None:
    class Fails(Regression):
        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if index == 5:
                raise KeyError("wrong")
            return super().training_step(batch, index)

    def train() -> None:
        fit(Fails(), callbacks=[OnExceptionCheckpoint(tmp_path, "error")], enable_checkpointing=True)

    outcomes = end_ranks(train, 2)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "workers" not in torch.load(tmp_path / "error.ckpt", weights_only=True)["easgd"]


def test_an_error_in_a_hook_of_one_rank_ends_all_at_once(tmp_path: Path) -> None:
    class Fails(Regression):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.trainer.global_rank == 1:
                raise KeyError("wrong")

    outcomes = end_ranks(lambda: fit(Fails(), **saving(tmp_path, filename="x")), 2, timeout=40)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "KeyError" in outcomes[1].error


def test_slurms_requeue_signal_saves_the_center_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requeued = tmp_path / "scontrol"
    requeued.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/called\n")
    requeued.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    class Signalled(Starts):
        center: Any = None

        def on_before_zero_grad(self, optimizer: Any) -> None:  # in the middle of a step, on one rank before the other
            if self.trainer.global_step == 7 and self.center is None:
                time.sleep(0.3 * self.trainer.global_rank)
                self.center = numbers(self.trainer.strategy._averagers[0].center_values())
                os.kill(os.getpid(), signal.SIGUSR1)

    def train() -> tuple[Any, int]:
        rank = os.environ["RANK"]
        os.environ.update(
            SLURM_NTASKS="2", SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NODEID="0", SLURM_JOB_ID="17",
            SLURM_JOB_NAME="train", SLURM_NTASKS_PER_NODE="2", SLURM_NODELIST="localhost",
        )  # fmt: skip
        os.environ["MAIN_ADDRESS"] = "127.0.0.1"
        module = Signalled()
        trainer = fit(module, plugins=[SLURMEnvironment(auto_requeue=True)], default_root_dir=tmp_path)
        return module.center, trainer.global_step

    (center, steps), (_, others) = run_ranks(train, 2)
    assert (steps, others) == (16, 16)
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert numbers(checkpoint["state_dict"][name] for name, _ in Regression().named_parameters()) == center
    assert (tmp_path / "called").read_text() == "requeue 17\n"
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"worker_state='file'.*'embed'.*'sidecar'.*'none'"):
        EASGDStrategy(worker_state="file")


def test_parameters_that_the_saved_worker_did_not_have_start_at_the_center_and_are_named(tmp_path: Path) -> None:
    class Renames(Starts):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = None, self.net

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return (self.other(batch) - batch.sum(1, keepdim=True)).square().mean()

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.replace("net.", "other."): state[name] for name in state}

    def resume() -> tuple[Any, Any, str]:
        module = Renames()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(module, tmp_path / "x.ckpt", max_epochs=3)
        return numbers(module.start), numbers(module.start_center), " ".join(str(each.message) for each in caught)

    run_ranks(lambda: fit(**saving(tmp_path, filename="x")) and None, 2)
    resumed = run_ranks(resume, 2)
    assert all(start == center for start, center, _ in resumed)
    assert "other.0.weight" in resumed[0][2]


def test_after_a_fit_a_rank_that_an_error_leaves_alone_saves_alone(tmp_path, monkeypatch):
    """Kind: the checkpoint of an error in a validation after ``fit``, for which no other rank comes."""

    def run():
        trainer = quiet_trainer(strategy=EASGDStrategy(tau=3), devices=1)
        trainer.fit(Regression())
        gathered = []
        monkeypatch.setattr(worker_states, "gather_states", lambda *arguments: gathered.append(arguments))

        class Fails(Regression):
            def validation_step(self, batch, index):
                raise KeyError("wrong")

        trainer.callbacks.append(OnExceptionCheckpoint(tmp_path))
        with pytest.raises(KeyError):
            trainer.validate(Fails())
        return len(gathered), len(list(tmp_path.iterdir()))

    assert run_ranks(run, 1) == [(0, 1)]


def test_an_edited_key_that_is_gone_when_training_starts_is_no_tensors():
    assert edited_tensors(torch.nn.Linear(1, 1), {"gone", "bias"}) == {"bias"}
