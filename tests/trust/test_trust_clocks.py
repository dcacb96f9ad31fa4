"""Where the workers' own states cannot be restored their clocks go on all the same: schedules go with the lr."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from ranks import end_ranks, run_ranks
from torch import Tensor
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.method.schedules import LinearSchedule

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint",
    r"ignore:.*called without a model", r'ignore:.*ckpt_path="last". is set',
)  # fmt: skip

STRATEGIES = {
    "sync": lambda **k: EASGDStrategy(tau=3, alpha=LinearSchedule(0.4, 0.0, 60), beta=0.9, **k),
    "async": lambda **k: EASGDStrategy(tau=3, alpha=LinearSchedule(0.4, 0.0, 60), beta=0.9, mode="async", **k),
    "downpour": lambda **k: DownpourStrategy(tau=3, **k),
}


class Clocked(Regression):
    """Remembers its clocks when training starts."""

    fails = False

    def on_train_batch_start(self, *_: Any) -> None:
        if not hasattr(self, "clocks"):
            self.clocks = [averager.clock for averager in self.trainer.strategy._averagers]

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        if self.fails and self.trainer.current_epoch == 1 and index == 3:
            raise KeyError("wrong")
        return super().training_step(batch, index)


class Failing(Clocked):
    fails = True


class Two(Clocked):
    """Two optimizers, of which the second makes every other step only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        loss = self.loss(batch)
        first, second = self.optimizers()
        self.manual_backward(loss)
        first.step()
        if index % 2:
            second.step()
        self.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[n].parameters(), lr=0.01) for n in (0, 3)]


def train(folder: Path, strategy: Any, module: Any = Clocked) -> None:
    callbacks = [ModelCheckpoint(folder, "x"), OnExceptionCheckpoint(folder, "error")]
    trainer = quiet_trainer(
        strategy=strategy, devices=2, max_epochs=2, callbacks=callbacks[:1], enable_checkpointing=True
    )
    if module is Failing:
        trainer.callbacks.append(callbacks[1])
    trainer.fit(module())


def resume(file: Path, strategy: Any, ranks: int = 2, module: Any = Clocked) -> tuple[list[int], str]:
    again = module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(strategy=strategy, devices=ranks, max_epochs=3).fit(again, ckpt_path=file)
    return again.clocks, " ".join(str(each.message) for each in caught)


def test_another_number_of_workers(tmp_path: Path) -> None:
    cases = [
        ("sync", "embed", Two),
        ("sync", "sidecar", Clocked),
        ("sync", "none", Clocked),
        ("async", "embed", Two),
        ("downpour", "sidecar", Clocked),
    ]

    def each(do: Any) -> list[Any]:
        return [
            do(tmp_path / f"{name} {state}", STRATEGIES[name](worker_state=state), module)
            for name, state, module in cases
        ]

    run_ranks(each, 2, train)
    for results in run_ranks(each, 3, lambda folder, *given: resume(folder / "x.ckpt", given[0], 3, given[1])):
        for case, (clocks, _) in zip(cases, results, strict=True):
            assert clocks == ([16] if case[2] is Clocked else [16, 8]), case


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_state_of_workers_was_saved_or_is_wanted(tmp_path: Path, name: str) -> None:
    make = STRATEGIES[name]

    def run() -> list[tuple[list[int], str]]:
        train(tmp_path / "none", make(worker_state="none"))
        train(tmp_path / "embed", make())
        return [
            resume(tmp_path / "none/x.ckpt", make(worker_state="none")),
            resume(tmp_path / "none/x.ckpt", make()),
            resume(tmp_path / "embed/x.ckpt", make(worker_state="none")),
        ]

    neither, not_saved, not_wanted = run_ranks(run, 2)[0]
    assert neither[0] == not_saved[0] == not_wanted[0] == [16]
    assert "at the center" not in neither[1]
    assert "starts at the center" in not_saved[1]


def test_a_torn_sidecar(tmp_path: Path) -> None:
    make = STRATEGIES["sync"]
    run_ranks(train, 2, tmp_path, make(worker_state="sidecar"))
    sidecar = tmp_path / "x.ckpt.easgd"
    tear = {
        "torn": lambda: next(sidecar.glob("*/rank_1.pt")).write_bytes(b"torn"),
        "missing": lambda: shutil.rmtree(sidecar),
    }
    for kind, damage in tear.items():
        damage()
        for clocks, _ in run_ranks(resume, 2, tmp_path / "x.ckpt", make(worker_state="sidecar")):
            assert clocks == [16], kind


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_checkpoint_on_an_error(tmp_path: Path, name: str) -> None:
    assert [each.exitcode for each in end_ranks(train, 2, tmp_path, STRATEGIES[name](), Failing)] == [1, 1]
    extra = torch.load(tmp_path / "error.ckpt", weights_only=True)["easgd"]
    assert extra["clocks"] == [11]
    for clocks, _ in run_ranks(resume, 2, tmp_path / "error.ckpt", STRATEGIES[name]()):
        assert clocks == [11]


def test_workers_of_another_method_and_ddps_checkpoint(tmp_path: Path) -> None:
    def run() -> list[tuple[str, list[int]]]:
        train(tmp_path / "downpour", STRATEGIES["downpour"]())
        train(tmp_path / "ddp", "ddp", Regression)
        cases = [("downpour", "sync"), *(("ddp", name) for name in STRATEGIES)]
        return [(case, resume(tmp_path / case[0] / "x.ckpt", STRATEGIES[case[1]]())[0]) for case in cases]

    for told in run_ranks(run, 2):
        for case, clocks in told:
            assert clocks == [16], case


def test_a_checkpoint_of_version_0_1_0(tmp_path: Path) -> None:
    run_ranks(train, 2, tmp_path, STRATEGIES["sync"]())
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    extra = checkpoint["easgd"]
    checkpoint["easgd"] = {key: extra[key] for key in ("format", "method", "world_size", "center", "workers")}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for ranks in (2, 3):
        for clocks, _ in run_ranks(resume, ranks, tmp_path / "old.ckpt", STRATEGIES["sync"](), ranks):
            assert clocks == [16]


@pytest.mark.parametrize("worker_state", ["embed", "none"])
def test_under_fabric(tmp_path: Path, worker_state: str) -> None:
    def run(ranks: int, resumed: bool) -> int:
        strategy = FabricEASGDStrategy(tau=2, alpha=LinearSchedule(0.4, 0.0, 60), beta=0.9, worker_state=worker_state)
        fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
        fabric.launch()
        module = torch.nn.Linear(4, 1)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), 0.1))
        state = {"model": model, "optimizer": optimizer}
        if resumed:
            fabric.load(tmp_path / "x.ckpt", state)
        for _ in range(5):
            fabric.backward(model(torch.ones(2, 4)).sum())
            optimizer.step()
        if not resumed:
            fabric.save(tmp_path / "x.ckpt", state)
        return strategy._averagers[0].clock

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_ranks(run, 2, 2, False) == [5, 5]
        assert run_ranks(run, 3, 3, True) == [10, 10, 10]


def test_a_checkpoint_saved_after_fit(tmp_path: Path) -> None:
    states = ("embed", "none")

    def run() -> None:
        for state in states:
            trainer = quiet_trainer(strategy=STRATEGIES["sync"](worker_state=state), devices=2, max_epochs=2)
            trainer.fit(Clocked())
            trainer.save_checkpoint(tmp_path / f"{state}.ckpt")

    def go_on() -> list[list[int]]:
        return [resume(tmp_path / f"{each}.ckpt", STRATEGIES["sync"](worker_state=each), 3)[0] for each in states]

    run_ranks(run, 2)
    assert run_ranks(go_on, 3) == [[[16], [16]]] * 3
