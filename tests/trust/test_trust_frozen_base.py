"""What is the same on all ranks is stored once, by the state_dict, and not once for each worker."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import run_ranks
from torch import Tensor, nn
from toys import Regression, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.strategies.worker_state.interning import interned

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")

STRATEGIES: dict[str, Callable[..., Any]] = {
    "sync": lambda **k: EASGDStrategy(tau=3, **k),
    "async": lambda **k: EASGDStrategy(tau=3, mode="async", **k),
    "downpour": lambda **k: DownpourStrategy(tau=3, **k),
}
SIZE = 256
SHARED = ("base.weight", "base.bias", "scale")


class Adapted(Regression):
    """A frozen base of 263 kB that no optimizer has, a buffer that never changes, and a small trained part."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(SIZE, SIZE).requires_grad_(False)
        self.register_buffer("scale", torch.ones(SIZE))
        self.register_buffer("table", torch.ones(3), persistent=False)

    def loss(self, batch: Tensor) -> Tensor:
        hidden = self.base(batch.repeat(1, SIZE // 4)) * self.scale * self.table.sum()
        return super().loss(batch + 1e-3 * hidden[:, :4] + self.trainer.global_rank)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)

    def on_train_batch_start(self, *_: Any) -> None:
        if not hasattr(self, "start"):
            self.start = {
                name: value.detach().clone() for name, value in (*self.named_parameters(), *self.named_buffers())
            }

    def on_train_batch_end(self, *_: Any) -> None:
        self.last = {name: value.detach().clone() for name, value in (*self.named_parameters(), *self.named_buffers())}


def train(folder: Path, strategy: Any, ranks: int, module: Any = Adapted) -> dict[str, Tensor]:
    torch.manual_seed(1)
    callbacks = [ModelCheckpoint(folder, "x", every_n_train_steps=8)]
    net = module()
    quiet_trainer(
        strategy=strategy, devices=ranks, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0
    ).fit(net)
    return net.last if module is Adapted else {}


def resume(file: Path, strategy: Any, ranks: int, module: Any = Adapted) -> tuple[dict[str, Tensor], str]:
    torch.manual_seed(2)
    net = module()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet_trainer(strategy=strategy, devices=ranks, max_epochs=2, limit_val_batches=0)
        trainer.fit(net, ckpt_path=file)
    return net.start, " ".join(str(each.message) for each in caught)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_file_is_no_larger_than_ddps_by_more_than_what_is_trained(tmp_path: Path, ranks: int) -> None:
    run_ranks(train, 1, tmp_path / "ddp", "ddp", 1)
    run_ranks(train, ranks, tmp_path / "easgd", EASGDStrategy(tau=3), ranks)
    sizes = {name: (tmp_path / name / "x.ckpt").stat().st_size for name in ("ddp", "easgd")}
    random_states = 12_000  # of Python, NumPy and torch
    trained = 10_000  # with its momentum, and the loops
    assert sizes["ddp"] > 4 * SIZE * SIZE
    assert sizes["easgd"] < sizes["ddp"] + ranks * (trained + random_states)


def test_it_comes_back_with_the_rest(tmp_path: Path) -> None:
    cases = [(name, worker_state) for name in STRATEGIES for worker_state in ("embed", "sidecar")]

    def both(name: str, state: str) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], str]]:
        folder = tmp_path / f"{name} {state}"
        own = train(folder, STRATEGIES[name](worker_state=state), 2)
        return own, resume(folder / "x.ckpt", STRATEGIES[name](worker_state=state), 2)

    for case, *results in zip(cases, *run_ranks(lambda: [both(*each) for each in cases], 2), strict=True):
        for own, (start, _) in results:
            assert all(torch.equal(start[key], value) for key, value in own.items()), case
        assert "start at the center" not in results[0][1][1], case
        if case[1] == "embed":
            path = tmp_path / " ".join(case) / "x.ckpt"
            for worker in torch.load(path, weights_only=True)["easgd"]["workers"]:
                assert not worker["tensors"].keys() & set(SHARED), case
                assert "table" in worker["tensors"], case  # the state_dict does not have it


def test_equal_parts_of_two_states_are_one_object() -> None:
    first = {"a": torch.zeros(3), "b": [torch.ones(2), 1], "python": (3, (1, 2), None), "shape": torch.zeros(2, 2)}
    other = {"a": torch.zeros(3), "b": [torch.ones(2), 2], "python": (3, (1, 2), None), "shape": torch.zeros(4)}
    state = interned(other, first)
    assert state["a"] is first["a"]
    assert state["b"][0] is first["b"][0]
    assert state["b"][1] == 2
    assert state["python"] is first["python"]
    assert state["shape"] is other["shape"]
    assert interned(torch.tensor([-0.0]), torch.tensor([0.0])).signbit().item()
    nan = torch.tensor([float("nan")])
    assert interned(nan.clone(), nan) is nan
    assert interned((True,), (1,))[0] is True
    assert interned([1], [1, 2]) == [1]


def test_a_base_that_the_file_leaves_out_is_not_stored_by_the_workers_either(tmp_path: Path) -> None:
    def run() -> str:
        train(tmp_path, EASGDStrategy(tau=3), 2, Dropping)
        return resume(tmp_path / "x.ckpt", EASGDStrategy(tau=3), 2, Dropping)[1]

    assert "start at the center" not in run_ranks(run, 2)[0]
    assert (tmp_path / "x.ckpt").stat().st_size < 4 * SIZE * SIZE


class Dropping(Adapted):
    """Its base comes from elsewhere."""

    strict_loading = False

    def __init__(self) -> None:
        super().__init__()
        nn.init.constant_(self.base.weight, 0.01)
        nn.init.constant_(self.base.bias, 0.01)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name in SHARED:
            del checkpoint["state_dict"][name]


def test_an_edited_base_stays_edited(tmp_path: Path) -> None:
    run_ranks(train, 2, tmp_path, EASGDStrategy(tau=3), 2)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    checkpoint["state_dict"]["base.bias"].fill_(0.5)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    for start, _ in run_ranks(resume, 2, tmp_path / "x.ckpt", EASGDStrategy(tau=3), 2):
        assert torch.equal(start["base.bias"], torch.full((SIZE,), 0.5))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.net = nn.Linear(SIZE, SIZE).requires_grad_(False), nn.Linear(4, 1)

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)


def test_under_fabric(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"

    def run(resumed: bool) -> dict[str, Tensor]:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=2))
        fabric.launch()
        torch.manual_seed(resumed)
        module = Plain()
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.net.parameters(), 0.01))
        if resumed:
            fabric.load(file, {"model": model, "optimizer": optimizer})
        else:
            for _ in range(5):
                fabric.backward(model(torch.ones(2, 4) + fabric.global_rank).sum())
                optimizer.step()
            fabric.save(file, {"model": model, "optimizer": optimizer})
        return {name: value.detach().clone() for name, value in module.named_parameters()}

    for own, start in zip(run_ranks(run, 2, False), run_ranks(run, 2, True), strict=True):
        assert all(torch.equal(start[name], value) for name, value in own.items())
    assert file.stat().st_size < 1.3 * 4 * SIZE * SIZE
