"""Lightning's class trees: names in every registry whatever the order of imports, and no mixing of trees."""

import operator
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.fabric
import lightning.pytorch
import lightning_fabric
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.strategies import STRATEGY_REGISTRY as OTHER_FABRIC_REGISTRY
from lightning_utilities.core.imports import compare_version
from preloaded import python_of_torch
from pytorch_lightning.strategies import StrategyRegistry as OtherRegistry
from ranks import end_ranks, run_ranks
from test_asynchronous import ASYNCHRONOUS
from test_elastic import SYNCHRONOUS
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toys import MINIMA, quiet_trainer

import lightning_easgd
import lightning_easgd.fabric
import lightning_easgd.pl
from lightning_easgd.callbacks import ElasticMonitor, TimeSplit
from lightning_easgd.strategies.trees import lightning_fabric_tree
from lightning_easgd.strategies.trees.class_trees import tree_of

pytestmark = pytest.mark.timeout(150)

NAMES = [
    name + suffix
    for name in ("easgd", "easgd_async", "eamsgd", "eamsgd_async", "downpour", "mdownpour", "local_sgd", "diloco")
    for suffix in ("", "_spawn", "_fork", "_notebook")
]
REGISTRIES = {
    "lightning.pytorch": lightning.pytorch.strategies.StrategyRegistry,
    "pytorch_lightning": OtherRegistry,
    "lightning.fabric": lightning.fabric.strategies.STRATEGY_REGISTRY,
    "lightning_fabric": OTHER_FABRIC_REGISTRY,
}


@pytest.mark.parametrize("tree", REGISTRIES)
def test_every_registry_has_every_name_with_its_own_class(tree):
    for name in NAMES:
        assert tree_of(type(REGISTRIES[tree].get(name))) == tree


CHECK = """
import sys
registered = lambda module, name: "easgd_spawn" in getattr(sys.modules[module + ".strategies"], name)
for module, name in {
    "lightning.pytorch": "StrategyRegistry", "pytorch_lightning": "StrategyRegistry",
    "lightning.fabric": "STRATEGY_REGISTRY", "lightning_fabric": "STRATEGY_REGISTRY",
}.items():
    if module in sys.modules:
        assert registered(module, name), module
print(*sorted({"lightning", "pytorch_lightning", "torch"} & set(sys.modules)))
print(*sorted(finder.tree for finder in sys.meta_path if hasattr(finder, "tree")))
"""


def in_new_process(code: str, interpreter: str = sys.executable) -> list[str]:
    """What it prints in an interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text("import warnings; warnings.simplefilter('error')\n" + code)
        done = subprocess.run(
            [interpreter, script],
            capture_output=True, text=True, timeout=140, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


LIGHTNING, OTHER = ["lightning.fabric", "lightning.pytorch"], ["lightning_fabric", "pytorch_lightning"]


@pytest.mark.parametrize(
    ("code", "imported", "waiting"),
    [
        ("import lightning_easgd", [], LIGHTNING + OTHER),
        ("import lightning_easgd, lightning", ["lightning", "torch"], OTHER),
        ("import lightning, lightning_easgd", ["lightning", "torch"], OTHER),
        ("import lightning_easgd, pytorch_lightning", ["pytorch_lightning", "torch"], LIGHTNING),
        ("import pytorch_lightning, lightning_easgd", ["pytorch_lightning", "torch"], LIGHTNING),
        # Our class first: its tree is imported in the middle of our own module.
        ("from lightning_easgd import EASGDStrategy", ["lightning", "torch"], OTHER),
        ("from lightning_easgd.pl import EASGDStrategy", ["pytorch_lightning", "torch"], LIGHTNING),
        ("import lightning_easgd.strategies.trees.lightning_fabric_tree", ["torch"], [*LIGHTNING, "pytorch_lightning"]),
        ("import lightning, lightning_easgd, pytorch_lightning", ["lightning", "pytorch_lightning", "torch"], []),
    ],
)
def test_order_of_imports(code, imported, waiting):
    lines = in_new_process(code + CHECK, python_of_torch() if imported else sys.executable)
    assert [line.split() for line in lines] == [imported, sorted(waiting)]


def test_reload():
    code = """
import importlib, lightning_easgd
importlib.reload(lightning_easgd)
import lightning.fabric
importlib.reload(lightning.fabric)
importlib.reload(lightning_easgd)
"""
    lines = in_new_process(code + CHECK, python_of_torch())
    assert lines[1].split() == OTHER


FAILING = """
import sys, pathlib, tempfile, warnings
folder = tempfile.mkdtemp()
package = pathlib.Path(folder, "pytorch_lightning")
package.mkdir()
sys.path.insert(0, folder)
import lightning_easgd
(package / "__init__.py").write_text("raise ImportError('half installed')")
try:
    import pytorch_lightning
except ImportError as error:
    assert "half installed" in str(error)
assert any(getattr(finder, "tree", None) == "pytorch_lightning" for finder in sys.meta_path)
(package / "__init__.py").write_text("version = 'of long ago'")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import pytorch_lightning
print(pytorch_lightning.version)
print(*(warning.message for warning in caught))
"""


def test_a_tree_of_an_unknown_release_can_still_be_imported():
    version, warning = in_new_process("import sys; sys.dont_write_bytecode = True\n" + FAILING)
    assert version == "of long ago"
    assert "are not registered in pytorch_lightning" in warning


def test_a_missing_tree_stays_missing():
    code = """
import sys
sys.path[:] = [entry for entry in sys.path if "site-packages" not in entry]
sys.path_importer_cache.clear()
"""
    lines = in_new_process(
        "import lightning_easgd, typing_extensions"
        + code
        + """
try:
    import lightning_fabric
except ModuleNotFoundError as error:
    print(error.name)
print(any(getattr(finder, "tree", None) == "lightning_fabric" for finder in sys.meta_path))
"""
    )
    assert lines == ["lightning_fabric", "True"]


class Quadratic(pl.LightningModule):
    """As in toys, of the other tree."""

    def __init__(self, steps: int = 6) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(1))
        self.steps = steps
        self.trace: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return 0.5 * (self.x - MINIMA[self.trainer.global_rank]).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.zeros(self.steps * self.trainer.world_size), batch_size=1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.strategy.barrier()
        self.trace.append((self.x.item(), self.trainer.strategy.center["x"].item()))
        self.trainer.strategy.barrier()


def other_trainer(**arguments: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return pl.Trainer(**(defaults | arguments))


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [
        (lightning_easgd.pl.EASGDStrategy(tau=1, alpha=0.2), SYNCHRONOUS),
        (lightning_easgd.pl.EASGDStrategy(tau=2, alpha=0.2, mode="async", order="round_robin"), ASYNCHRONOUS),
    ],
)
def test_golden_traces_in_pytorch_lightning(strategy, rows):
    def train():
        module = Quadratic()
        other_trainer(strategy=strategy, devices=2).fit(module)
        assert module.x.item() == strategy.center["x"].item()
        return module.trace

    traces = np.array(run_ranks(train, 2))
    assert np.column_stack([*traces[:, :, 0], traces[0, :, 1]]) == pytest.approx(np.array(rows), abs=1e-6)


@pytest.mark.processes
@pytest.mark.skipif(
    compare_version("pytorch_lightning", operator.lt, "2.6"), reason="it takes no callback of the other tree before 2.6"
)
def test_spawned_ranks_and_callbacks_in_pytorch_lightning(tmp_path):
    module = Quadratic(steps=12)
    callbacks = [ElasticMonitor(every_n_exchanges=1, directory=tmp_path), TimeSplit(tmp_path)]
    other_trainer(strategy="easgd_fork", devices=2, callbacks=callbacks).fit(module)
    assert module.x.item() != 1  # the parent has the center
    assert len((tmp_path / "elastic" / "rank_1.csv").read_text().splitlines()) == 2  # one exchange
    assert (tmp_path / "time.csv").exists()


def test_batchnorm_is_recalibrated_in_pytorch_lightning():
    class Normalised(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.norm(batch).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(torch.randn(48, 3, generator=torch.Generator().manual_seed(0)), batch_size=4)

    def train():
        module = Normalised()
        strategy = lightning_easgd.pl.EASGDStrategy(tau=2, recalibrate_batchnorm=6)
        other_trainer(strategy=strategy, devices=2).fit(module)
        return module.norm.num_batches_tracked.item(), module.norm.running_mean.tolist()

    data = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))  # all of it, once
    for count, mean in run_ranks(train, 2):
        assert count == 6
        assert mean == pytest.approx(data.mean(0).tolist(), abs=1e-6)


def test_sigterm_ends_forked_ranks_in_pytorch_lightning():
    class Terminate(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if (trainer.global_rank, trainer.global_step) == (1, 5):
                os.kill(os.getpid(), signal.SIGTERM)

    def run():
        strategy = lightning_easgd.pl.EASGDStrategy(tau=2, start_method="fork")
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
            del os.environ[name]
        other_trainer(strategy=strategy, devices=2, callbacks=[Terminate()]).fit(Quadratic(steps=400))

    (outcome,) = end_ranks(run, 1, timeout=60)
    assert outcome.exitcode != 0


TREES = {
    "lightning.pytorch": (lightning_easgd, quiet_trainer),
    "pytorch_lightning": (lightning_easgd.pl, other_trainer),
    "lightning.fabric": (lightning_easgd.fabric, lightning.fabric.Fabric),
    "lightning_fabric": (lightning_fabric_tree, lightning_fabric.Fabric),
}
MIXED = [(theirs, own) for theirs in TREES for own in TREES if theirs != own]


@pytest.mark.parametrize(("theirs", "own"), MIXED)
@pytest.mark.parametrize("name", ["EASGDStrategy", "DownpourStrategy", "LocalStrategy"])
def test_an_instance_of_another_tree_is_refused(theirs, own, name):
    strategy, make = getattr(TREES[own][0], name)(), TREES[theirs][1]
    with pytest.raises(ValueError, match=f"{name}, a strategy for {own}"):
        make(accelerator="cpu", devices=2, strategy=strategy)


@pytest.mark.parametrize(("theirs", "own"), MIXED)
def test_a_class_of_another_tree_is_refused_by_name(theirs, own):
    strategies, registry = TREES[own][0], REGISTRIES[theirs]
    registry.register("of_another_tree", strategies.EASGDStrategy)
    try:
        with pytest.raises(TypeError, match=rf"strategy for {own} and was given to {theirs}; use lightning_easgd\."):
            TREES[theirs][1](accelerator="cpu", devices=2, strategy="of_another_tree")
    finally:
        del registry["of_another_tree"]


def test_unknown_names():
    with pytest.raises(AttributeError, match="has no attribute 'EASGDStrategie'"):
        _ = lightning_easgd.EASGDStrategie
    assert set(lightning_easgd.__all__) <= set(dir(lightning_easgd))
