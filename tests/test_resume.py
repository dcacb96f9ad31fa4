"""A resumed run goes on exactly where its checkpoint was saved, on every rank."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric
from toys import quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.method.schedules import ExponentialSchedule

pytestmark = pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint", "ignore:Checkpoint directory"
)

EVERY_STEP, EVERY_TWO, SOMETIMES = ({"every_n_train_steps": steps} for steps in (1, 2, 4))
DATA = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))


class ResumableLoader(DataLoader[Any]):
    """Knows how many batches it has given, and skips them when it goes on; shuffles by epoch."""

    def __init__(self, rank: int, ranks: int) -> None:
        sampler = DistributedSampler(DATA, ranks, rank, seed=5)
        super().__init__(DATA, batch_size=8, sampler=sampler)
        self.given = self.skip = 0

    def __iter__(self) -> Any:
        self.given, self.skip = self.skip, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= self.given:
                self.given += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given % len(self), "epoch": self.sampler.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip = state["given"]
        self.sampler.set_epoch(state["epoch"])  # Lightning sets it later than it begins to iterate


class EagerLoader(ResumableLoader):
    """Begins to iterate when it is told to, and draws random numbers for every batch."""

    def __iter__(self) -> Any:
        batches = DataLoader.__iter__(self)
        for _ in range(self.skip):
            next(batches)
        self.given, self.skip = self.skip, 0
        return self.augmented(batches)

    def augmented(self, batches: Any) -> Any:
        for batch in batches:
            self.given += 1
            yield batch + 0.1 * torch.randn(())


class Noisy(L.LightningModule):
    """Dropout (random numbers), BatchNorm (buffers), momentum and a schedule (state)."""

    def __init__(self, loader: Any = ResumableLoader) -> None:
        super().__init__()
        self.loader = loader
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.steps: dict[int, list[Tensor]] = {}

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        batch = batch.to(self.net[0].weight.dtype) + 0.1 * self.trainer.global_rank
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: Tensor, index: int) -> None:
        batch = batch.to(self.net[0].weight.dtype)
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean().float()
        self.log("loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7), "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(DATA[:16], batch_size=8)

    def on_train_start(self) -> None:
        self.last = self.trainer.global_step

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == self.last:  # a batch that was only accumulated
            return
        self.last = self.trainer.global_step
        state = self.trainer.optimizers[0].state_dict()["state"]
        buffers = [state[key]["momentum_buffer"] for key in state]
        values = [*self.parameters(), *self.buffers(), *buffers]
        self.steps[self.trainer.global_step] = [value.detach().clone() for value in values]


class Saver(ModelCheckpoint):
    """Leaves out most of what it is told to save in the middle of an epoch by runs that were resumed."""

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        if trainer.global_step % self.every == 0:
            super().on_train_batch_end(trainer, *rest)


def train(
    folder: str, make_strategy: Any, arguments: dict[str, Any], resume: str | None = None, module: Any = None
) -> dict[int, list[Tensor]]:
    """Fit, saving as told, and return what each step left; under -1 what the fit left."""
    torch.manual_seed(7)
    module = module or Noisy()
    saver = Saver(folder, filename="{step}", save_top_k=-1, **arguments.get("saving", EVERY_STEP))
    saver.every = 1 if resume is None else 5
    trainer = quiet_trainer(
        strategy=make_strategy(),
        devices=2,
        callbacks=[*arguments.get("callbacks", []), saver],
        **{
            "max_epochs": 3,
            "limit_val_batches": 0,
            "enable_checkpointing": True,
            "use_distributed_sampler": False,
            **arguments.get("trainer", {}),
        },
    )
    trainer.fit(module, ckpt_path=resume)
    module.steps[-1] = [parameter.detach().clone() for parameter in module.parameters()]
    return module.steps


def resume_from_all(folder: str, make_strategy: Any, arguments: dict[str, Any], make_module: Any = Noisy) -> list[str]:
    """Resume from each checkpoint of a run, and name those after which a step is not that of the run."""
    whole = train(folder, make_strategy, arguments, module=make_module())
    different = []
    saved = sorted(Path(folder).glob("*.ckpt"))
    assert saved
    for path in saved:
        again = train(f"{folder}/again", make_strategy, arguments, str(path), make_module())
        first = int(path.stem.split("=")[1].split("-")[0]) + 1
        assert [step for step in again if step != -1] == list(range(first, max(whole) + 1)), path.stem
        for step in sorted(again):
            if not all(map(torch.equal, again[step], whole[step])):
                different.append(f"{path.stem} at step {step}")
                break
    return different


def every_rank_goes_on_exactly(folder: Path, *what: Any) -> None:
    for rank, different in enumerate(run_ranks(resume_from_all, 2, str(folder), *what, timeout=120)):
        assert different == [], f"rank {rank}"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"trainer": {"precision": "bf16-true"}, "saving": EVERY_TWO},
        {"trainer": {"precision": "64-true", "max_epochs": 1}, "saving": EVERY_TWO},
        {"trainer": {"limit_val_batches": 2, "val_check_interval": 2, "max_epochs": 2}},
        {"trainer": {"limit_val_batches": 2}, "saving": {"every_n_epochs": 1, "save_on_train_epoch_end": True}},
        {"trainer": {"limit_val_batches": 2}, "saving": {"every_n_epochs": 1, "save_on_train_epoch_end": False}},
        {"trainer": {"accumulate_grad_batches": 2, "max_epochs": 4}, "saving": EVERY_TWO},
    ],
    ids=["32-true", "bf16-true", "64-true", "validation", "epoch end", "validation end", "accumulation"],
)
def test_sync_goes_on_exactly_from_every_checkpoint(tmp_path: Path, arguments: dict[str, Any]) -> None:
    every_rank_goes_on_exactly(tmp_path, partial(EASGDStrategy, tau=3, momentum=0.9), arguments)


def test_random_numbers_of_the_loader_go_on_exactly(tmp_path: Path) -> None:
    every_two = {"saving": EVERY_TWO}  # whether fetching draws is not known after one step
    every_rank_goes_on_exactly(tmp_path, partial(EASGDStrategy, tau=3), every_two, partial(Noisy, EagerLoader))


def saved_after_a_resumed_step(folder: str) -> list[bool]:
    """Resume at an epoch's end, and read what the checkpoint of one step later knows of each worker's loader."""
    make = partial(EASGDStrategy, tau=3)
    train(folder, make, {}, module=Noisy(EagerLoader))
    train(f"{folder}/again", make, {}, f"{folder}/step=4.ckpt", Noisy(EagerLoader))
    states = torch.load(f"{folder}/again/step=5.ckpt", weights_only=True)["easgd"]["workers"]
    return [state["fetching_draws"] for state in states]


def test_what_is_known_of_the_loader_is_known_to_a_resumed_run(tmp_path: Path) -> None:
    """Kind: a run does not see within its first step what that of before has seen."""
    assert run_ranks(saved_after_a_resumed_step, 2, str(tmp_path)) == [[True, True]] * 2


class Falling:
    """A factor of the learning rate, faster for a higher rank; a scheduler saves what it holds."""

    def __init__(self, rank: int) -> None:
        self.base = 0.9 - 0.2 * rank

    def __call__(self, step: int) -> float:
        return float(self.base**step)


class Scheduled(Noisy):
    """Each worker's learning rate has a schedule of its own."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Falling(self.global_rank))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Overflowing(Noisy):
    """The loss of rank 1 is infinite once in an epoch: its scaler leaves out a step, and halves the scale."""

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * float("inf") if (self.global_rank, index) == (1, 1) else loss

    def on_train_batch_end(self, *_: Any) -> None:
        super().on_train_batch_end()
        state = self.trainer.precision_plugin.state_dict()
        self.steps[self.trainer.global_step].append(torch.tensor([state["scale"], state["_growth_tracker"]]))


def with_scaler() -> EASGDStrategy:
    # Lightning replaces precision="16-mixed" on the CPU by bf16-mixed; the plugin does as it is told.
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    return EASGDStrategy(tau=3, precision_plugin=MixedPrecision("16-mixed", "cpu", scaler=scaler))


@pytest.mark.parametrize(
    ("make_strategy", "module"),
    [(partial(EASGDStrategy, tau=3), Scheduled), (with_scaler, Overflowing)],
    ids=["scheduler", "scaler"],
)
def test_what_each_worker_has_of_its_own_goes_on_exactly(tmp_path: Path, make_strategy: Any, module: Any) -> None:
    """Kind: what differs by worker and is neither parameter nor optimizer; Lightning goes on with rank 0's."""
    every_two = {"saving": EVERY_TWO}
    every_rank_goes_on_exactly(tmp_path, make_strategy, every_two, module)


class Thresholds(Noisy):
    """A validation writes to a buffer that all ranks have in common, and puts one in place that each has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("common", torch.zeros(()))
        self.register_buffer("own", torch.zeros(2))

    def on_validation_epoch_end(self) -> None:
        self.common += 1
        self.own = torch.full((2,), float(self.common + self.global_rank))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.own += 1
        return super().training_step(batch, index)


def test_buffers_that_a_validation_writes_to_go_on_exactly(tmp_path: Path) -> None:
    saving = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    arguments = {"trainer": {"limit_val_batches": 2}, "saving": saving}
    every_rank_goes_on_exactly(tmp_path, partial(EASGDStrategy, tau=3), arguments, Thresholds)


class OneThreshold(Thresholds):
    """One rank alone writes to a buffer that all had in common."""

    writer = 0

    def on_validation_epoch_end(self) -> None:
        if self.global_rank == self.writer:
            self.common += 1


class OtherThreshold(OneThreshold):
    writer = 1


@pytest.mark.parametrize("module", [OneThreshold, OtherThreshold])
@pytest.mark.parametrize("recalibrate", [0, 1])
def test_a_buffer_that_a_validation_writes_to_on_one_rank_goes_on_exactly(
    tmp_path: Path, module: type[Noisy], recalibrate: int
) -> None:
    saving = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    arguments = {"trainer": {"limit_val_batches": 2}, "saving": saving}
    make = partial(EASGDStrategy, tau=3, recalibrate_batchnorm=recalibrate)
    every_rank_goes_on_exactly(tmp_path, make, arguments, module)


def test_buffers_that_are_calibrated_in_the_center_go_on_exactly(tmp_path: Path) -> None:
    recalibrating = partial(EASGDStrategy, tau=3, recalibrate_batchnorm=1)
    every_rank_goes_on_exactly(tmp_path, recalibrating, {"saving": SOMETIMES})


class Metered(Noisy):
    """Its state has tensors that are neither parameters nor buffers, and which each training resets."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()
        self.metric.persistent(True)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.metric.reset()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.metric.update(loss.detach())
        return loss


def test_a_metric_that_is_reset_is_no_edited_checkpoint(tmp_path: Path) -> None:
    every_rank_goes_on_exactly(tmp_path, partial(EASGDStrategy, tau=3), {"saving": SOMETIMES}, Metered)


class Constrained(nn.Linear):
    """Keeps its weight short, also where it is evaluated, as ``nn.Embedding(max_norm=...)`` does."""

    def forward(self, batch: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.3)
        return super().forward(batch)


class Renormalized(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = Constrained(4, 8)


def test_a_center_that_a_validation_renormalizes_goes_on_exactly(tmp_path: Path) -> None:
    saving = {"every_n_epochs": 1, "save_on_train_epoch_end": False}
    arguments = {"trainer": {"limit_val_batches": 2}, "saving": saving}
    every_rank_goes_on_exactly(tmp_path, partial(EASGDStrategy, tau=3), arguments, Renormalized)


class ChannelsLast(Noisy):
    """A fused optimizer goes through memory, where the state has to lie as its parameter does."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)), layer, nn.Flatten(), nn.Linear(3, 1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, fused=True)


@pytest.mark.parametrize("worker_state", ["embed", "sidecar"])
def test_the_state_of_a_fused_optimizer_goes_on_exactly(tmp_path: Path, worker_state: str) -> None:
    make = partial(EASGDStrategy, tau=3, worker_state=worker_state)
    every_rank_goes_on_exactly(tmp_path, make, {"saving": SOMETIMES}, ChannelsLast)


def test_random_numbers_that_callbacks_draw_are_not_those_of_the_loader(tmp_path: Path) -> None:
    class Draws(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.randn(3)

    every_two = {"saving": EVERY_TWO, "callbacks": [Draws()]}
    every_rank_goes_on_exactly(tmp_path, partial(EASGDStrategy, tau=3), every_two)


def test_sidecar_goes_on_exactly(tmp_path: Path) -> None:
    every_rank_goes_on_exactly(tmp_path, partial(EASGDStrategy, tau=3, worker_state="sidecar"), {"saving": EVERY_TWO})


def test_a_schedule_goes_on_exactly(tmp_path: Path) -> None:
    rising = partial(EASGDStrategy, tau=3, momentum=0.9, beta=1.0, rho=ExponentialSchedule(0.1, 9.0, 12))
    every_rank_goes_on_exactly(tmp_path, rising, {"saving": SOMETIMES})


@pytest.mark.parametrize(
    "make_strategy",
    [
        partial(EASGDStrategy, tau=3, mode="async", order="round_robin", momentum=0.9),
        partial(EASGDStrategy, tau=3, mode="async", order="round_robin", alpha=0.2, beta=0.9),
        partial(DownpourStrategy, tau=2, order="round_robin"),
        partial(DownpourStrategy, tau=2, order="round_robin", average="polyak"),
    ],
    ids=["EAMSGD", "asymmetric", "DOWNPOUR", "ADOWNPOUR"],
)
def test_async_in_a_fixed_order_goes_on_exactly(tmp_path: Path, make_strategy: Any) -> None:
    every_rank_goes_on_exactly(tmp_path, make_strategy, {"trainer": {"max_epochs": 2}})


def test_fabric_goes_on_exactly_from_what_was_loaded_before_setup(tmp_path: Path) -> None:
    def steps(fabric: Fabric, model: Any, optimizer: Any, first: int, last: int) -> list[list[Tensor]]:
        values = []
        for step in range(first, last):
            optimizer.zero_grad()
            fabric.backward(model(DATA[step * 8 : step * 8 + 8] + 0.1 * fabric.global_rank).square().mean())
            optimizer.step()
            values.append([value.detach().clone() for value in (*model.parameters(), *model.buffers())])
        return values

    def run() -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        results = []
        for resumed in (False, True):
            fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(tau=3))
            fabric.launch()
            torch.manual_seed(1)
            module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
            state = {"model": module, "optimizer": torch.optim.Adam(module.parameters(), 0.01)}
            if resumed:
                fabric.load(tmp_path / "x.ckpt", state)
            model, optimizer = fabric.setup(state["model"], state["optimizer"])
            if not resumed:
                steps(fabric, model, optimizer, 0, 3)
                fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
            results.append(steps(fabric, model, optimizer, 3, 8))
            fabric.strategy.finalize()
        return results[0], results[1]

    for whole, again in run_ranks(run, 2):
        assert all(torch.equal(a, b) for step in zip(whole, again, strict=True) for a, b in zip(*step, strict=True))
