"""The local energy: its value, what it leaves untouched, and the callback on one process and on several."""

import copy
import csv
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from application import quiet_trainer, tiny_classifier
from lightning.pytorch.strategies import DDPStrategy
from official_data import write_cifar10
from ranks import run_ranks
from test_callbacks import Elastic
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.callbacks import LocalEnergyMonitor
from lightning_easgd.lab.data import CIFAR10DataModule, DigitsDataModule
from lightning_easgd.lab.data.crops import WORDS
from lightning_easgd.metrics import SIGMAS, LocalEnergy

pytestmark = pytest.mark.timeout(60)


class Net(nn.Module):
    """Linear layer behind BatchNorm and dropout, whose statistics and random numbers must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)
        self.last.weight.data.copy_(torch.randn(3, 6, generator=torch.Generator().manual_seed(3)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(inputs)))


def batches(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator)) for _ in range(count)
    ]


def measured(module: nn.Module, data: Any, **arguments: Any) -> LocalEnergy:
    energy = LocalEnergy(**arguments)
    for batch in data:
        energy.update(module, batch)
    return energy


def test_it_is_the_mean_increase_of_the_error():
    """Against a few lines that draw the same noise, perturb a copy, and count."""
    module, data = Net(), batches()
    found = measured(module, data, sigmas=(0.5, 1.0), draws=4, seed=9)
    generator = torch.Generator().manual_seed(9)
    noises = [[torch.randn(p.shape, generator=generator) for p in module.parameters()] for _ in range(4)]

    def error(sigma: float, noise: list[Tensor]) -> float:
        twin = copy.deepcopy(module).eval()
        for p, z in zip(twin.parameters(), noise, strict=True):
            p.data.copy_(p * (1 + sigma * z))
        wrong = [(twin(inputs).argmax(1) != targets).float() for inputs, targets in data]
        return float(torch.cat(wrong).mean())

    clean = error(0.0, noises[0])
    increases = np.array([[error(sigma, noise) - clean for noise in noises] for sigma in (0.5, 1.0)])
    assert increases.std(axis=1).min() > 0
    assert found.by_draw().numpy() == pytest.approx(increases, abs=1e-6)
    assert found.compute().numpy() == pytest.approx(increases.mean(axis=1), abs=1e-6)
    assert float(found.error()) == pytest.approx(clean)
    assert found.compute().dtype == torch.float64


def test_the_expected_increase_of_a_quadratic_loss():
    """E = ½ Σ h w² instead of an error: δE = ½ σ² Σ h w² in expectation."""
    module = nn.Linear(3, 1, bias=False)
    module.weight.data.copy_(torch.tensor([[1.0, -2.0, 3.0]]))

    def loss(module: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return 0.5 * (batch * module.weight.square()).sum(), 1

    energy = LocalEnergy(sigmas=(0.02, 0.1), draws=4000, errors=loss)
    energy.update(module, torch.tensor([2.0, 1.0, 0.5]))
    e = 0.5 * (2 * 1 + 1 * 4 + 0.5 * 9)
    # δE / σ² = Σ h w² (z²/2 + z/σ): its standard error at σ = 0.1 is about 10 √Σ(hw²)² / √4000.
    assert float(energy.error()) == pytest.approx(e)
    error = 10 * (4 + 16 + 20.25) ** 0.5 / 4000**0.5
    assert float(energy.compute()[1]) / 0.01 == pytest.approx(e, abs=4 * error)


def test_no_noise_changes_nothing():
    assert measured(Net(), batches(), sigmas=(0.0,), draws=3).by_draw().tolist() == [[0.0, 0.0, 0.0]]


def test_the_noise_is_that_of_the_seed_whatever_else_is_measured():
    module, data = Net(), batches()
    both = measured(module, data, sigmas=(0.3, 1.0), draws=5).by_draw()
    assert torch.equal(measured(module, data, sigmas=(1.0,), draws=3).by_draw()[0], both[1, :3])
    assert torch.equal(measured(copy.deepcopy(module), data, sigmas=(0.3,), draws=5).by_draw()[0], both[0])
    assert not torch.equal(measured(module, data, sigmas=(0.3, 1.0), draws=5, seed=1).by_draw(), both)


def state_of(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails, dtype):
    module = Net().to(dtype).train()
    module.norm.eval()  # a frozen layer stays frozen
    calls = []

    def errors(module: nn.Module, batch: Any) -> tuple[Tensor, int]:
        calls.append(state_of(module))
        assert not module.training
        module.norm.running_mean += 1
        if fails and len(calls) == 4:
            raise KeyError("forward")
        return torch.tensor(1.0), 1

    before, random = state_of(module), torch.get_rng_state()
    energy = LocalEnergy(sigmas=(0.1, 0.2), draws=2, errors=errors)
    if fails:
        with pytest.raises(KeyError):
            energy.update(module, None)
        assert float(energy.samples) == 0
    else:
        energy.update(module, None)
    assert all(map(torch.equal, state_of(module), before))
    assert torch.equal(torch.get_rng_state(), random)
    assert (module.training, module.drop.training, module.norm.training) == (True, True, False)
    assert not torch.equal(calls[1][0], calls[2][0])  # the errors did see other weights


def test_narrow_weights_are_perturbed_before_they_are_rounded():
    module = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    weight, seen = module.weight.detach().float(), []

    def errors(module: nn.Module, batch: Any) -> tuple[Tensor, int]:
        seen.append(module.weight.detach().clone())
        return torch.tensor(0.0), 1

    LocalEnergy(sigmas=(0.01,), draws=1, errors=errors).update(module, None)
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen[1], (weight + 0.01 * (noise * weight)).bfloat16())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sigmas": ()}, r"LocalEnergy\(sigmas=\[\]\)"),
        ({"sigmas": (-0.1,)}, r"LocalEnergy\(sigmas=\[-0.1\]\): .*not negative"),
        ({"sigmas": (float("inf"),)}, r"LocalEnergy\(sigmas=\[inf\]\)"),
        ({"draws": 0}, r"LocalEnergy\(draws=0\)"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, says):
    for make in (LocalEnergy, LocalEnergyMonitor):
        with pytest.raises(ValueError, match=f"^{says}"):
            make(**arguments)


@pytest.mark.parametrize("name", ["batches", "batch_size", "every_n_epochs"])
def test_monitor_refuses_zero(name):
    with pytest.raises(ValueError, match=rf"^LocalEnergyMonitor\({name}=0\)"):
        LocalEnergyMonitor(**{name: 0})


# The callback

QUICK = {"sigmas": (0.2, 1.0), "draws": 3}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def expected_of(module: L.LightningModule, **arguments: Any) -> LocalEnergy:
    """The local energy on the whole training set of the digits, at once."""
    data = DigitsDataModule()
    data.setup("fit")
    return measured(module, [data._splits["train"].tensors], **arguments)


def fit(monitor: LocalEnergyMonitor, *more: L.Callback, module: Any = None, **arguments: Any) -> L.LightningModule:
    torch.manual_seed(0)
    module = module or tiny_classifier()
    defaults = {"max_epochs": 2, "limit_train_batches": 6, "callbacks": [*more, monitor]}
    quiet_trainer(**(defaults | arguments)).fit(module, datamodule=DigitsDataModule())
    return module


def test_monitor_writes_what_the_metric_finds(tmp_path):
    monitor = LocalEnergyMonitor(tmp_path, batches=None, every_n_epochs=1, **QUICK)
    module = fit(monitor, strategy=Elastic())
    written = rows(tmp_path / "local_energy.csv")
    assert [(row["step"], row["weights"], row["sigma"]) for row in written] == [
        (step, weights, sigma) for step in ("6", "12") for weights in ("center", "worker_0") for sigma in ("0.2", "1.0")
    ]
    expected = expected_of(module, **QUICK)
    worker = written[-2:]
    assert [float(row["energy"]) for row in worker] == pytest.approx(expected.compute().tolist())
    assert monitor.last_energies["worker_0"] == pytest.approx(expected.compute().tolist())
    deviations = expected.by_draw().std(dim=1, unbiased=False).tolist()
    assert [float(row["deviation"]) for row in worker] == pytest.approx(deviations)
    assert [float(row["error"]) for row in worker] == pytest.approx([float(expected.error())] * 2)
    assert {(row["draws"], row["samples"]) for row in written} == {("3", "1259")}
    # The strategy's center answers 0 to everything, with or without noise.
    assert [float(row["energy"]) for row in written[-4:-2]] == [0, 0]


def test_training_goes_on_as_without_the_monitor(tmp_path):
    draws = []

    class Draws(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            draws.append(torch.rand(()).item())

    measured = fit(LocalEnergyMonitor(every_n_epochs=1, **QUICK), Draws())
    with_monitor, draws = draws, []
    plain = fit(LocalEnergyMonitor(draws=1), Draws())
    assert with_monitor == draws
    assert all(map(torch.equal, measured.parameters(), plain.parameters()))


def test_the_samples_are_spread_over_the_training_set(tmp_path):
    seen = []

    def errors(module: Any, batch: Any) -> tuple[Tensor, int]:
        seen.append(batch[0])
        return torch.tensor(0.0), len(batch[0])

    fit(LocalEnergyMonitor(batches=2, batch_size=5, sigmas=(0.1,), draws=1, errors=errors, workers=False))
    data = DigitsDataModule()
    data.setup("fit")
    images = data._splits["train"].tensors[0]
    chosen = images[[number * 1259 // 10 for number in range(10)]]
    assert torch.equal(torch.cat(seen[::2]), chosen)


def test_a_loader_without_datamodule_will_do(tmp_path):
    data = DigitsDataModule()
    data.setup("fit")
    monitor = LocalEnergyMonitor(tmp_path, batches=1, batch_size=8, **QUICK)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0, callbacks=[monitor])
    trainer.fit(tiny_classifier(), data.train_dataloader(), data.val_dataloader())
    assert {row["samples"] for row in rows(tmp_path / "local_energy.csv")} == {"8"}


def test_a_set_without_a_length_is_refused():
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(1, 8, 8), 0

    trainer = SimpleNamespace(train_dataloader=DataLoader(Endless()), datamodule=None)
    with pytest.raises(TypeError, match=r"LocalEnergyMonitor\(\).*train_evaluation_dataloader"):
        LocalEnergyMonitor()._training_batches(trainer)


def run(folder: str, strategy: Any) -> tuple[list[float], list[float]]:
    """The local energies of this rank's own weights, and of what `fit` left in the module."""
    alone = []

    class Own(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            weights = getattr(trainer.strategy, "worker_weights", None)
            if weights is None:
                alone.append(expected_of(pl_module, sync_on_compute=False, **QUICK).compute().tolist())
            else:
                with weights():
                    alone.append(expected_of(pl_module, sync_on_compute=False, **QUICK).compute().tolist())

    monitor = LocalEnergyMonitor(folder, batches=None, batch_size=100, **QUICK)
    module = fit(monitor, Own(), strategy=strategy(), devices=int(os.environ["WORLD_SIZE"]))
    return alone[0], expected_of(module, sync_on_compute=False, **QUICK).compute().tolist()


@pytest.mark.parametrize(
    ("strategy", "weights", "size"),
    [
        (partial(EASGDStrategy, tau=2), ["center", "worker_0", "worker_1"], 1),
        (partial(EASGDStrategy, tau=2, devices_per_worker=2), ["center", "worker_0", "worker_1"], 2),
        (LocalStrategy, ["center", "worker_0", "worker_1"], 1),
        (DDPStrategy, ["center"], 1),
    ],
    ids=["easgd", "easgd of two ranks", "local", "ddp"],
)
def test_two_workers(tmp_path, strategy, weights, size):
    first, second = run_ranks(run, 2 * size, str(tmp_path), strategy)[::size]
    found: dict[str, list[float]] = {}
    for row in rows(tmp_path / "local_energy.csv"):
        assert row["samples"] == "1259"
        found.setdefault(row["weights"], []).append(float(row["energy"]))
    assert list(found) == weights
    assert found["center"] == pytest.approx(first[1])  # what fit leaves on rank 0
    for rank, (own, _) in enumerate((first, second)):
        assert found.get(f"worker_{rank}", own) == pytest.approx(own)
    if len(weights) == 3:
        assert found["worker_0"] != found["worker_1"]


def test_training_images_in_order():
    data = DigitsDataModule(batch_size=16)
    data.setup("fit")
    images = torch.cat([images for images, _ in data.train_evaluation_dataloader()])
    assert torch.equal(images, data._splits["train"].tensors[0])


@pytest.mark.parametrize("val_fraction", [0.0, 0.2])
@pytest.mark.filterwarnings("ignore:verify=False:UserWarning")
def test_training_images_without_chance(tmp_path, val_fraction):
    """Those of the training part, in order, cut as in evaluation; validation images are others."""
    write_cifar10(tmp_path)
    data = CIFAR10DataModule(tmp_path, batch_size=7, val_fraction=val_fraction, verify=False)
    data.setup("fit")
    images, labels = data._images("train")
    rows = data.parts(labels)["train"]
    loader = data.train_evaluation_dataloader()
    plain = torch.cat([batch[0] for batch in loader])
    crops = data.eval_transform(images, rows, np.zeros((WORDS, len(rows)), np.uint64))
    assert torch.equal(plain, data.normalise(crops))
    assert torch.equal(torch.cat([batch[1] for batch in loader]), torch.from_numpy(labels[rows]))
    held_out = len(labels) - len(rows) if val_fraction else len(data._images("test")[1])
    assert len(data.val_dataloader().dataset) == held_out


def test_sigmas_of_the_paper():
    assert pytest.approx([0.01 * step for step in range(1, 11)]) == SIGMAS
