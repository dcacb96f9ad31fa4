"""A project that ran with ``DDPStrategy`` gives its arguments: they are accepted, kept, and warn or have effect."""

import inspect
import warnings

import lightning.fabric
import lightning.pytorch.cli
import pytest
import pytorch_lightning.cli
import torch
import torch.distributed as dist
import yaml
from ranks import run_ranks
from test_trees import Quadratic as OtherQuadratic
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toys import Quadratic, fitted

import lightning_easgd
import lightning_easgd.fabric
import lightning_easgd.pl
from lightning_easgd.lab.baselines.post_local_sgd import PostLocalSGDStrategy
from lightning_easgd.strategies.trees import lightning_fabric_tree

pytestmark = [
    pytest.mark.timeout(120),
    # LightningCLI itself uses what newer releases of jsonargparse deprecate.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

TREES = [lightning_easgd, lightning_easgd.pl, lightning_easgd.fabric, lightning_fabric_tree]
CLASSES = [getattr(tree, name) for tree in TREES for name in ("EASGDStrategy", "DownpourStrategy")]
LOCAL = [lightning_easgd.LocalStrategy, lightning_easgd.pl.LocalStrategy]
OF_THE_STRATEGY = {"ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"}
OF_THE_WRAPPER = set(inspect.signature(DistributedDataParallel).parameters) - {"module", "device_ids"}
WITH_EFFECT = {"broadcast_buffers", "forward_sync_buffers"}


@pytest.mark.parametrize("cls", [*CLASSES, *LOCAL, PostLocalSGDStrategy])
def test_signatures_name_every_argument_of_ddp(cls):
    parameters = inspect.signature(cls).parameters
    assert parameters.keys() >= OF_THE_STRATEGY | OF_THE_WRAPPER
    assert list(parameters)[:5] == list(inspect.signature(lightning.pytorch.strategies.DDPStrategy).parameters)[:5]


@pytest.mark.parametrize("cls", [*CLASSES, *(tree.LocalStrategy for tree in TREES)])
@pytest.mark.parametrize("value", [True, False])
def test_what_has_no_effect_is_kept_and_warns_once(cls, value):
    given = dict.fromkeys(OF_THE_WRAPPER - WITH_EFFECT, value)
    with pytest.warns(UserWarning, match="has no effect") as caught:
        strategy = cls(**given, broadcast_buffers=True) if "Local" not in cls.__name__ else cls(**given)
    (warning,) = caught
    assert all(f"{name}={value}" in str(warning.message) for name in given)
    assert "broadcast_buffers" not in str(warning.message)
    assert strategy._ddp_kwargs.items() >= given.items()


@pytest.mark.parametrize("cls", CLASSES)
def test_none_is_not_given(cls):
    strategy = cls(**dict.fromkeys(OF_THE_STRATEGY | OF_THE_WRAPPER))
    assert strategy._ddp_kwargs == {}


@pytest.mark.parametrize("cls", [*CLASSES, *LOCAL])
def test_a_timeout_of_none_is_the_default_as_for_ddp(cls):
    assert cls(timeout=None)._timeout == cls()._timeout


@pytest.mark.parametrize("name", sorted(OF_THE_STRATEGY))
@pytest.mark.parametrize("cls", [*CLASSES, PostLocalSGDStrategy])
def test_what_changes_the_reduction_of_gradients_is_refused(cls, name):
    with pytest.raises(TypeError, match=rf"{cls.__name__}\({name}=4\): .* remove it"):
        cls(**{name: 4})


@pytest.mark.parametrize("cls", CLASSES)
def test_a_misspelt_argument_of_ddp_is_named(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__}\(find_unused=True\): .*did you mean find_unused_parameters"):
        cls(find_unused=True)


def test_a_true_ddp_wrapper_gets_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy = PostLocalSGDStrategy(find_unused_parameters=True, bucket_cap_mb=1)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True, "bucket_cap_mb": 1}


CLIS = [
    (lightning.pytorch.cli.LightningCLI, Quadratic, "lightning_easgd"),
    (pytorch_lightning.cli.LightningCLI, OtherQuadratic, "lightning_easgd.pl"),
]


def parse(cli, model, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    trainer = {"accelerator": "cpu", "devices": 2, "logger": False}
    return cli(model, run=False, seed_everything_default=False, trainer_defaults=trainer).trainer.strategy


@pytest.mark.parametrize(("cli", "model", "package"), CLIS)
@pytest.mark.parametrize("name", ["EASGDStrategy", "DownpourStrategy", "LocalStrategy"])
def test_lightning_cli_takes_them(cli, model, package, name, monkeypatch, tmp_path):
    given = {"find_unused_parameters": False, "static_graph": True, "bucket_cap_mb": 50}
    nested = [f"--trainer.strategy.{key}={value}" for key, value in given.items()]
    file = tmp_path / "run.yaml"
    strategy = {"class_path": f"{package}.{name}", "init_args": given}
    file.write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    for arguments in (["--trainer.strategy", f"{package}.{name}", *nested], ["--config", str(file)]):
        with pytest.warns(UserWarning, match="has no effect") as caught:
            made = parse(cli, model, monkeypatch, *arguments)
        assert sum("has no effect" in str(each.message) for each in caught) == 1
        assert made._ddp_kwargs == given


class Counting(Quadratic):
    """Each rank starts with a parameter, a buffer, and an ignored buffer of its own."""

    _ddp_params_and_buffers_to_ignore = ("mask",)

    def __init__(self) -> None:
        super().__init__(record=False, steps=2)
        rank = float(dist.get_rank()) if dist.is_initialized() else 0.0
        self.register_buffer("count", torch.tensor([rank]))
        self.register_buffer("mask", torch.tensor([rank]))

    def on_fit_start(self) -> None:
        self.seen = self.x.item(), self.count.item(), self.mask.item()

    def setup(self, stage: str) -> None:
        with torch.no_grad():
            self.x.fill_(self.trainer.global_rank + 1)
            self.count.fill_(self.trainer.global_rank)
            self.mask.fill_(self.trainer.global_rank)


@pytest.mark.parametrize(
    ("strategy", "second"),
    [
        (lightning_easgd.EASGDStrategy, 0),
        (lambda: lightning_easgd.EASGDStrategy(broadcast_buffers=False), 1),
        (lambda: lightning_easgd.EASGDStrategy(forward_sync_buffers=False), 0),  # as torch has it: at the start only
        (lambda: lightning.pytorch.strategies.DDPStrategy(broadcast_buffers=False), 1),
    ],
)
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
def test_ranks_start_with_what_ddp_gives_them(strategy, second):
    def train():
        return fitted(Counting(), strategy(), 2).seen

    assert run_ranks(train, 2) == [(1, 0, 0), (1, second, 1)]


def test_fabric_starts_with_what_ddp_gives_it():
    def train():
        strategy = lightning_easgd.fabric.EASGDStrategy(broadcast_buffers=False)
        fabric = lightning.fabric.Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        module = nn.BatchNorm1d(1)
        with torch.no_grad():
            module.weight.fill_(fabric.global_rank + 1)
            module.running_mean.fill_(fabric.global_rank)
        module = fabric.setup_module(module)
        return module.weight.item(), module.running_mean.item()

    assert run_ranks(train, 2) == [(1, 0), (1, 1)]
