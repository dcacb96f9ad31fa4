"""A run that is resumed as another run: other optimizers, parameters, periods, modes; nothing is mixed up or raised."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from ranks import run_ranks
from torch import Tensor, nn
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:The dirpath has changed", "ignore:Using ModelCheckpoint with manual"
)


class Net(Regression):
    """Remembers where it started."""

    momentum = 0.0

    def loss(self, batch: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return super().loss(batch.to(dtype) + self.trainer.global_rank)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.005, momentum=self.momentum)

    def values(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.named_parameters()}

    def on_train_batch_start(self, *_: Any) -> None:
        if not hasattr(self, "start"):
            self.start = self.values()
            strategy = self.trainer.strategy
            self.start_center = {name: value.clone() for name, value in strategy.known_center.items()}
            self.clocks = [averager.clock for averager in strategy._averagers]

    def on_train_batch_end(self, *_: Any) -> None:
        self.last = self.values()


class TwoOptimizers(Net):
    """The second has what the first does not have; both make all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers(use_pl_optimizer=True):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = [*self.net[:2].parameters()], [*self.net[2:].parameters()]
        return [torch.optim.SGD(part, lr=0.005, momentum=0.9) for part in parts]


class Reordered(Net):
    """The same parameters in another order, one of them new."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(1, 1)

    def loss(self, batch: Tensor) -> Tensor:
        return super().loss(batch) + self.extra(batch[:, :1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.extra.parameters(), *reversed([*self.net.parameters()])], lr=0.005)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        groups = checkpoint["optimizer_states"][0]["param_groups"]
        groups[0]["params"] = list(range(len(list(self.parameters()))))
        for key, value in self.extra.state_dict().items():
            checkpoint["state_dict"][f"extra.{key}"] = value


def train(folder: Path, strategy: Any, module: Any = Net, **arguments: Any) -> Any:
    torch.manual_seed(1)
    net = module()
    trainer = quiet_trainer(
        strategy=strategy,
        devices=2,
        callbacks=[ModelCheckpoint(folder, "x", every_n_train_steps=8, enable_version_counter=False)],
        enable_checkpointing=True,
        limit_val_batches=0,
        **arguments,
    )
    trainer.fit(net)
    return net.last


def resume(file: Path, strategy: Any, module: Any = Net, **arguments: Any) -> tuple[Any, Any, list[int], str]:
    torch.manual_seed(2)
    net = module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(strategy=strategy, devices=2, max_epochs=2, limit_val_batches=0, **arguments).fit(
            net, ckpt_path=file
        )
    return net.start, net.start_center, net.clocks, " ".join(str(each.message) for each in caught)


STRATEGIES: dict[str, Callable[..., Any]] = {
    "sync": lambda: EASGDStrategy(tau=3),
    "tau": lambda: EASGDStrategy(tau=5),
    "int8": lambda: EASGDStrategy(tau=3, wire_dtype="int8"),
    "eamsgd": lambda: EASGDStrategy(tau=3, momentum=0.9),
    "async": lambda: EASGDStrategy(tau=3, mode="async"),
    "eamsgd async": lambda: EASGDStrategy(tau=3, mode="async", momentum=0.9),
}


def test_another_kind_of_elastic_averaging(tmp_path: Path) -> None:
    cases = [
        ("sync", "tau", "32-true"),
        ("sync", "async", "bf16-true"),
        ("async", "sync", "bf16-true"),
        ("sync", "eamsgd", "32-true"),
        ("eamsgd", "eamsgd async", "32-true"),
        ("eamsgd async", "sync", "32-true"),
        ("async", "int8", "32-true"),
        ("int8", "async", "bf16-true"),
    ]

    def both(before: str, after: str, precision: str) -> tuple[Any, Any]:
        own = train(tmp_path, STRATEGIES[before](), precision=precision)
        return own, resume(tmp_path / "x.ckpt", STRATEGIES[after](), precision=precision)

    for results in run_ranks(lambda: [both(*case) for case in cases], 2):
        for case, (own, (start, _, clocks, warned)) in zip(cases, results, strict=True):
            assert all(torch.equal(start[name], value) for name, value in own.items()), case
            assert clocks == [8], case
            assert "at the center" not in warned, case


DOWNPOURS: dict[str, Callable[..., Any]] = {
    "downpour": lambda: DownpourStrategy(tau=1),
    "mdownpour": lambda: DownpourStrategy(tau=1, momentum=0.5),
    "adownpour": lambda: DownpourStrategy(tau=1, average="polyak"),
    "mvadownpour": lambda: DownpourStrategy(tau=1, average=0.1),
}


def test_another_kind_of_downpour(tmp_path: Path) -> None:
    """The center's own memory is its own kind's: a momentum is not taken for an average."""
    cases = {
        "downpour": ["adownpour"],
        "mdownpour": ["mdownpour", "adownpour"],
        "adownpour": ["mdownpour", "mvadownpour"],
    }

    def go_on(before: str, after: str) -> Any:
        net = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = quiet_trainer(strategy=DOWNPOURS[after](), devices=2, max_epochs=2, limit_val_batches=0)
            stores: list[Any] = []

            def note(*_: Any) -> None:
                if not stores:
                    trainer.strategy.barrier()
                    stores.append(trainer.strategy._averaging.center_state_dict().get("stores"))
                    trainer.strategy.barrier()

            net.on_train_batch_start = note  # type: ignore[method-assign]
            trainer.fit(net, ckpt_path=tmp_path / before / "x.ckpt")
        return stores[0]

    def run() -> dict[tuple[str, str], Any]:
        for before in cases:
            train(tmp_path / before, DOWNPOURS[before]())
        return {(before, after): go_on(before, after) for before, all_after in cases.items() for after in all_after}

    for (before, after), stores in run_ranks(run, 2)[0].items():
        checkpoint = torch.load(tmp_path / before / "x.ckpt", weights_only=True)
        saved = checkpoint["easgd"]["center"].get("stores")
        model = torch.cat([checkpoint["state_dict"][name].flatten() for name, _ in Net().named_parameters()])
        center = model if saved is None else saved[0][0]
        assert torch.equal(stores[0][0], center), (before, after)
        if before == after or {before, after} == {"adownpour", "mvadownpour"}:
            assert torch.equal(stores[1][0], saved[1][0]), (before, after)
        elif after == "mdownpour":
            assert not stores[1][0].any(), (before, after)
        else:
            assert torch.equal(stores[1][0], center), (before, after)


@pytest.mark.parametrize("name", ["sync", "async", "downpour"])
def test_more_or_fewer_optimizers(tmp_path: Path, name: str) -> None:
    make = (STRATEGIES | DOWNPOURS)[name]
    cases = [(Net, TwoOptimizers), (TwoOptimizers, Net)]

    def both(before: Any, after: Any) -> tuple[Any, Any]:
        class Anew(after):  # type: ignore[misc]
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                checkpoint["optimizer_states"] = []

        return train(tmp_path, make(), before), resume(tmp_path / "x.ckpt", make(), Anew)

    for results in run_ranks(lambda: [both(*case) for case in cases], 2):
        for case, (own, (start, _, clocks, _)) in zip(cases, results, strict=True):
            assert all(torch.equal(start[key], value) for key, value in own.items()), case
            assert clocks[0] == 8, case


def test_parameters_in_another_order(tmp_path: Path) -> None:
    cases = [("sync", "bf16-true"), ("int8", "32-true"), ("async", "bf16-true"), ("downpour", "32-true")]

    def both(name: str, precision: str) -> tuple[Any, Any]:
        make = (STRATEGIES | DOWNPOURS)[name]
        own = train(tmp_path / name, make(), precision=precision)
        return own, resume(tmp_path / name / "x.ckpt", make(), Reordered, precision=precision)

    for case, *results in zip(cases, *run_ranks(lambda: [both(*each) for each in cases], 2), strict=True):
        saved = torch.load(tmp_path / case[0] / "x.ckpt", weights_only=True)["easgd"]
        for own, (start, center, _, _) in results:
            assert all(torch.equal(start[key], value) for key, value in own.items()), case
            if case == ("sync", "bf16-true"):
                sizes = [size for _, size in saved["layouts"][0]]
                parts = torch.split(saved["center"]["stores"][0][0], sizes)
                for (key, _), part in zip(saved["layouts"][0], parts, strict=True):
                    assert torch.equal(center[key].flatten(), part)
        assert "extra.weight" in results[0][1][3], case


def test_an_asynchronous_writer_writes_what_was_there(tmp_path: Path) -> None:
    owns = run_ranks(lambda: train(tmp_path, EASGDStrategy(tau=3), plugins=[AsyncCheckpointIO()]), 2)
    for own, (start, _, _, _) in zip(
        owns, run_ranks(resume, 2, tmp_path / "x.ckpt", EASGDStrategy(tau=3)), strict=True
    ):
        assert all(torch.equal(start[key], value) for key, value in own.items())
