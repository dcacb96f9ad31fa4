"""A tensor that is not the one that was saved, wherever it was changed, starts at the center, and the run says so.

All others go on exactly where each worker was.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from torch import Tensor, nn
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")

STRATEGIES: dict[str, Callable[..., Any]] = {
    "sync": lambda **k: EASGDStrategy(tau=3, **k),
    "int8": lambda **k: EASGDStrategy(tau=3, wire_dtype="int8", **k),
    "async": lambda **k: EASGDStrategy(tau=3, mode="async", **k),
    "downpour": lambda **k: DownpourStrategy(tau=3, **k),
    "adownpour": lambda **k: DownpourStrategy(tau=3, average="polyak", **k),
    "mdownpour": lambda **k: DownpourStrategy(tau=1, momentum=0.5, **k),
}
EDITED = "net.0.weight"


class Net(Regression):
    """Remembers where it started: this worker, and the center."""

    inputs = 4
    momentum = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = nn.Linear(self.inputs, 8)

    def loss(self, batch: Tensor) -> Tensor:
        batch = torch.nn.functional.pad(batch, (0, self.inputs - 4)).to(self.net[0].weight.dtype)
        return super().loss(batch + self.trainer.global_rank)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.005, momentum=self.momentum)

    def on_train_batch_start(self, *_: Any) -> None:
        if not hasattr(self, "start"):
            strategy = self.trainer.strategy
            self.start = {name: value.detach().clone() for name, value in self.named_parameters()}
            self.start_center = {name: value.clone() for name, value in strategy.known_center.items()}

    def on_train_batch_end(self, *_: Any) -> None:
        self.last = {name: value.detach().clone() for name, value in self.named_parameters()}


class LoadHook(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][EDITED] = torch.full_like(checkpoint["state_dict"][EDITED], 0.5)


class InPlaceHook(Net):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][EDITED].fill_(0.5)


class AfterLoading(Net):
    def on_fit_start(self) -> None:
        if getattr(self, "edits", True) and self.trainer.ckpt_path:
            with torch.no_grad():
                self.net[0].weight.fill_(0.5)

    def on_train_start(self) -> None:
        self.on_fit_start()


class Wider(Net):
    inputs = 6

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][EDITED] = torch.full((8, 6), 0.5)


class Renames(Net):
    """Its state has other names and other tensors than the module."""

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        state = super().state_dict(*arguments, **keywords)
        return {f"model.{name}": value.clone() for name, value in state.items()}

    def load_state_dict(self, state: Any, *arguments: Any, **keywords: Any) -> Any:
        return super().load_state_dict({name[6:]: value for name, value in state.items()}, *arguments, **keywords)


class RenamesAndEdits(Renames):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["model." + EDITED].fill_(0.5)


class SavesOtherNames(Net):
    """Hooks that change the names in the file, and back."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"model.{name}": value for name, value in checkpoint["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name[6:]: value for name, value in checkpoint["state_dict"].items()}


class SavesHalf(Net):
    """The file holds half the bits: what is loaded is what was written."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value.half() for name, value in checkpoint["state_dict"].items()}


class SavesAnother(Net):
    """As callbacks do that average: the file holds another state."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: 2 * value for name, value in checkpoint["state_dict"].items()}


def train(folder: Path, strategy: Any, module: Any = Net, **arguments: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    callbacks = [ModelCheckpoint(folder, "x", every_n_train_steps=8)]
    net = module()
    quiet_trainer(
        strategy=strategy, devices=2, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0, **arguments
    ).fit(net)
    return net.last


def resume(file: Path, strategy: Any, module: Any = Net, **arguments: Any) -> tuple[Any, Any, str]:
    torch.manual_seed(2)
    net = module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_trainer(strategy=strategy, devices=2, max_epochs=2, limit_val_batches=0, **arguments).fit(
            net, ckpt_path=file
        )
    text = " ".join(
        str(each.message) for each in caught if "starts at" in str(each.message) or "start at" in str(each.message)
    )
    return net.start, net.start_center, text


def edit(file: Path) -> None:
    """By one of the ranks that have trained, or by who has started them."""
    if os.environ.get("RANK", "0") == "0":
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["state_dict"][EDITED] = torch.full_like(checkpoint["state_dict"][EDITED], 0.5)
        torch.save(checkpoint, file)
    if dist.is_initialized():
        dist.barrier()


def check_edited(
    owns: Iterable[dict[str, Tensor]], resumed: Sequence[tuple[Any, Any, str]], case: Any = None, moves: bool = False
) -> None:
    for own, (start, center, _) in zip(owns, resumed, strict=True):
        assert torch.equal(start[EDITED], torch.full_like(start[EDITED], 0.5)), case
        if not moves:  # an asynchronous center may have moved already
            assert torch.equal(center[EDITED], torch.full_like(center[EDITED], 0.5)), case
        for name, value in own.items():
            assert name == EDITED or torch.equal(start[name], value), (case, name)
    assert EDITED in resumed[0][2], case
    assert "start at the center" in resumed[0][2], case
    assert "net.3.weight" not in resumed[0][2], case


@pytest.mark.parametrize("worker_state", ["embed", "sidecar"])
def test_a_hook_that_changes_what_is_loaded(tmp_path: Path, worker_state: str) -> None:
    modules = [LoadHook, InPlaceHook, AfterLoading, Wider]

    def run() -> tuple[Any, Any]:
        own = train(tmp_path, EASGDStrategy(tau=3, worker_state=worker_state))
        make = partial(EASGDStrategy, tau=3, worker_state=worker_state)
        return own, [resume(tmp_path / "x.ckpt", make(), module) for module in modules]

    owns, resumed = zip(*run_ranks(run, 2), strict=True)
    for module, of_module in zip(modules, zip(*resumed, strict=True), strict=True):
        check_edited(owns, of_module, module)


def edited_between(folder: Path, name: str, **arguments: Any) -> tuple[Any, Any]:
    own = train(folder, STRATEGIES[name](), **arguments)
    edit(folder / "x.ckpt")
    return own, resume(folder / "x.ckpt", STRATEGIES[name](), **arguments)


def test_an_edited_file(tmp_path: Path) -> None:
    results = run_ranks(lambda: [edited_between(tmp_path / name, name) for name in STRATEGIES], 2)
    for name, *of_ranks in zip(STRATEGIES, *results, strict=True):
        check_edited(*zip(*of_ranks, strict=True), name, moves=name != "sync")


def test_the_wide_center_of_narrow_parameters_begins_at_the_edit_too(tmp_path: Path) -> None:
    names = ("sync", "async", "downpour")
    results = run_ranks(lambda: [edited_between(tmp_path / n, n, precision="bf16-true") for n in names], 2)
    for name, *of_ranks in zip(names, *results, strict=True):
        owns, resumed = zip(*of_ranks, strict=True)
        check_edited(owns, resumed, name, moves=name != "sync")
        if name == "sync":
            stored = torch.load(tmp_path / name / "x.ckpt", weights_only=True)["easgd"]["center"]["stores"][0][0]
            whole = torch.cat([value.flatten() for value in resumed[0][1].values()])
            assert torch.equal(whole[32:], stored[32:])


def test_what_a_downpour_worker_adds_does_not_hold_the_edit(tmp_path: Path) -> None:
    """The edit is where the worker starts from, not a step that it has made."""

    class Still(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    run_ranks(train, 2, tmp_path, DownpourStrategy(tau=3), Still)
    edit(tmp_path / "x.ckpt")

    def go_on() -> Tensor:
        net = Still()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quiet_trainer(strategy=DownpourStrategy(tau=3), devices=2, max_epochs=2).fit(
                net, ckpt_path=tmp_path / "x.ckpt"
            )
        return net.net[0].weight.detach()

    for weight in run_ranks(go_on, 2):
        assert torch.equal(weight, torch.full((8, 4), 0.5))


def test_nothing_was_edited(tmp_path: Path) -> None:
    modules = [Net, Renames, SavesOtherNames, SavesHalf, SavesAnother]

    def both(module: Any) -> tuple[Any, Any]:
        folder = tmp_path / module.__name__
        own = train(folder, EASGDStrategy(tau=3), module)
        return own, resume(folder / "x.ckpt", EASGDStrategy(tau=3), module)

    for results in run_ranks(lambda: [*map(both, modules)], 2):
        for module, (own, (start, _, warned)) in zip(modules, results, strict=True):
            assert not warned, module
            assert all(torch.equal(start[name], value) for name, value in own.items()), module


def test_another_precision_is_no_edit(tmp_path: Path) -> None:
    owns = run_ranks(train, 2, tmp_path, EASGDStrategy(tau=3))
    resumed = run_ranks(lambda: resume(tmp_path / "x.ckpt", EASGDStrategy(tau=3), precision="bf16-true"), 2)
    for own, (start, _, warned) in zip(owns, resumed, strict=True):
        assert not warned
        assert all(torch.equal(start[name], value.bfloat16()) for name, value in own.items())


def test_an_edit_that_cannot_be_located_sets_all_to_the_center(tmp_path: Path) -> None:
    run_ranks(train, 2, tmp_path, EASGDStrategy(tau=3), Renames)
    resumed = run_ranks(resume, 2, tmp_path / "x.ckpt", EASGDStrategy(tau=3), RenamesAndEdits)
    for start, center, _ in resumed:
        assert all(torch.equal(start[name], center[name]) for name in start)
        assert torch.equal(start[EDITED], torch.full((8, 4), 0.5))
    assert "start at the center" in resumed[0][2]


def test_older_checkpoints_go_on_and_another_shape_raises_nothing(tmp_path: Path) -> None:
    owns = run_ranks(train, 2, tmp_path, EASGDStrategy(tau=3))
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for worker in checkpoint["easgd"]["workers"]:  # older ones hold all tensors of each worker
        worker["tensors"] |= {name: checkpoint["state_dict"][name] for name in checkpoint["easgd"]["shared"]}
    for key in ("exchanged", "stores", "clocks", "layouts", "shared", "sums", "fingerprints"):
        del checkpoint["easgd"][key]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    for own, (start, _, warned) in zip(
        owns, run_ranks(resume, 2, tmp_path / "x.ckpt", EASGDStrategy(tau=3)), strict=True
    ):
        assert not warned
        assert all(torch.equal(start[name], value) for name, value in own.items())
    check_edited(owns, run_ranks(resume, 2, tmp_path / "x.ckpt", EASGDStrategy(tau=3), Wider))


@pytest.mark.parametrize("first", [False, True], ids=["load after setup", "load before setup"])
def test_under_fabric(tmp_path: Path, first: bool) -> None:
    file = tmp_path / "x.ckpt"

    def run(resumed: bool) -> tuple[Any, Any]:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2))
        fabric.launch()
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        state = {"model": module, "optimizer": torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)}
        if resumed and first:
            fabric.load(file, state)
        model, optimizer = fabric.setup(module, state["optimizer"])
        if resumed and not first:
            fabric.load(file, {"model": model, "optimizer": optimizer})
        if not resumed:
            for _ in range(5):
                fabric.backward(model(torch.ones(2, 4) + fabric.global_rank).sum())
                optimizer.step()
            fabric.save(file, {"model": model, "optimizer": optimizer})
        start = {name: value.detach().clone() for name, value in module.named_parameters()}
        center = dict(fabric.strategy.center) if resumed else None
        fabric.strategy.finalize()
        return start, center

    owns = run_ranks(run, 2, False)
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["model"]["0.weight"].fill_(0.5)
    torch.save(checkpoint, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = run_ranks(run, 2, True)
    for (own, _), (start, center) in zip(owns, resumed, strict=True):
        assert torch.equal(start["0.weight"], torch.full((8, 4), 0.5))
        assert torch.equal(center["0.weight"], torch.full((8, 4), 0.5))
        assert all(torch.equal(start[name], own[name]) for name in own if name != "0.weight")


class Momentum(Net):
    momentum = 0.9


class WiderMomentum(Wider):
    momentum = 0.9


class WiderMomentumToo(WiderMomentum):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"] = torch.full((8, 6), 0.25)


class OtherRate(Momentum):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = 0.001


def test_an_optimizers_state_of_another_shape(tmp_path: Path) -> None:
    modules = [WiderMomentum, WiderMomentumToo]

    def run() -> tuple[Any, Any]:
        own = train(tmp_path, EASGDStrategy(tau=3), Momentum)
        return own, [resume(tmp_path / "x.ckpt", EASGDStrategy(tau=3), module) for module in modules]

    owns, resumed = zip(*run_ranks(run, 2), strict=True)
    for module, of_module in zip(modules, zip(*resumed, strict=True), strict=True):
        check_edited(owns, of_module, module)


def test_an_edited_learning_rate_counts_on_every_rank_and_nothing_else_is_lost(tmp_path: Path) -> None:
    def go_on() -> tuple[Any, float, str]:
        buffers: list[Any] = []

        class Looks(OtherRate):
            def on_train_batch_start(self, *_: Any) -> None:
                super().on_train_batch_start()
                optimizer = self.trainer.optimizers[0]
                buffers.append(
                    {key: optimizer.state[value]["momentum_buffer"].clone() for key, value in self.named_parameters()}
                )
                self.rate = optimizer.param_groups[0]["lr"]

        net = Looks()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(strategy=EASGDStrategy(tau=3), devices=2, max_epochs=2, limit_val_batches=0).fit(
                net, ckpt_path=tmp_path / "x.ckpt"
            )
        return buffers[0][EDITED], net.rate, " ".join(str(each.message) for each in caught)

    run_ranks(train, 2, tmp_path, EASGDStrategy(tau=3), Momentum)
    workers = torch.load(tmp_path / "x.ckpt", weights_only=True)["easgd"]["workers"]
    resumed = run_ranks(go_on, 2)
    for worker, (buffer, rate, _) in zip(workers, resumed, strict=True):
        assert rate == 0.001
        assert torch.equal(buffer, worker["optimizer_states"][0]["state"][0]["momentum_buffer"])
    assert "optimizer_states.0.param_groups" in resumed[0][2]
    assert "optimizer_states.0.state" not in resumed[0][2]
