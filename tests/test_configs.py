"""Every shipped configuration composes, instantiates and runs; every argument has its key."""

import inspect
import itertools
import re
from contextlib import nullcontext
from datetime import timedelta

import lightning as L
import pytest
import torch
from application import CONF, command, composed, only_run, options
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from membership_job import Job
from official_data import WNIDS, write_cifar10, write_cifar100, write_imagenet, write_mnist
from omegaconf import DictConfig, OmegaConf

from lightning_easgd import DownpourStrategy, EASGDModelParallelStrategy, EASGDStrategy, LocalStrategy
from lightning_easgd.lab.building import build_model, build_strategy, build_trainer
from lightning_easgd.lab.command_errors import explain
from lightning_easgd.lab.data import DataError
from lightning_easgd.lab.data.images import ImageArguments, ImageDataModule
from lightning_easgd.lab.evaluate import evaluate
from lightning_easgd.lab.train import train
from lightning_easgd.method.rules import PlainRule
from lightning_easgd.strategies.ddp_arguments import known_ddp_arguments

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_"))
# What the Trainer gives to a strategy itself, and what it takes for the sake of projects that ran with DDP.
FROM_TRAINER = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
FROM_TRAINER |= set(known_ddp_arguments())
# Strategies of one device in a launch.
ALONE = ("single", "easgd_elastic")
QUICK = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "plot=false",
)


def available(option: str) -> bool:
    """Whether an experiment's data and model are there."""
    config = OmegaConf.load(CONF / "experiment" / f"{option}.yaml")
    nested = [entry for entry in config.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    chosen = {
        key.removeprefix("override /"): value
        for entry in config.get("defaults", [])
        if not isinstance(entry, str)
        for key, value in entry.items()
    }
    return all((CONF / group / f"{value}.yaml").exists() for group, value in chosen.items()) and all(
        map(available, nested)
    )


EXPERIMENTS = [
    pytest.param(name, marks=[] if available(name) else pytest.mark.skip("its data or model is not here yet"))
    for name in options("experiment")
]
# Experiments with a grid are run by easgd-compare, in test_compare.py.
SINGLE_RUNS = [
    name for name in options("experiment") if "grid" not in OmegaConf.load(CONF / "experiment" / f"{name}.yaml")
]


def keyword_arguments(function) -> set[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds} - {"self"}


def pairwise(*groups: list[str]) -> list[tuple[str, ...]]:
    """Rows, an option of each group in each, in which every two options of two groups meet: greedy, always the same.

    Each group is instantiated by itself; what two of them could spoil for each other shows in some row, and that a
    third must be there as well has no cause.
    """

    def pairs(row: tuple[str, ...]) -> set[tuple[tuple[int, str], ...]]:
        return set(itertools.combinations(enumerate(row), 2))

    rows: list[tuple[str, ...]] = []
    product = list(itertools.product(*groups))
    left = set().union(*map(pairs, product))
    while left:
        rows.append(max(product, key=lambda row: len(pairs(row) & left)))
        left -= pairs(rows[-1])
    return rows


COMBINED = ("strategy", "optimizer", "scheduler", "logger")
# Those of services, whose packages are not installed, are in test_settings.py.
LOGGERS = [name for name in options("logger") if name not in ("comet", "many_loggers", "mlflow", "wandb")]


@pytest.mark.parametrize(COMBINED, pairwise(*map(options, COMBINED[:-1]), LOGGERS))
def test_every_pair_of_options_instantiates(tmp_path, monkeypatch, strategy, optimizer, scheduler, logger):
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://localhost:1")
    monkeypatch.setenv("REPLICA_GROUP_ID", "0")
    options = [f"strategy={strategy}", f"optimizer={optimizer}", f"scheduler={scheduler}", f"logger={logger}"]
    config = composed(tmp_path, *options, *(["trainer.devices=1"] if strategy in ALONE else []))
    trainer = build_trainer(config)
    assert trainer.world_size == (1 if strategy in ALONE else 4)
    assert len(trainer.loggers) == {"none": 0, "csv": 1, "tensorboard": 2}[logger]
    configured = build_model(config).configure_optimizers()
    made = configured["optimizer"] if isinstance(configured, dict) else configured
    assert type(made).__name__.lower() == optimizer
    assert isinstance(configured, dict) == (scheduler != "none")


# What is chosen beside the others, in as few configurations as there are options; what chooses others itself is alone.
BESIDE = ("callbacks", "data", "logger", "model", "optimizer", "scheduler", "strategy", "trainer")
TOGETHER = [
    [f"{group}={option}" for group, option in zip(BESIDE, row, strict=True) if option is not None]
    for row in itertools.zip_longest(*map(options, BESIDE))
]


@pytest.mark.parametrize(
    "chosen",
    [
        *TOGETHER,
        *([f"{group}={option}"] for group in GROUPS if group not in (*BESIDE, "experiment", "hydra")
          for option in options(group)),
        *(pytest.param([f"experiment={each.values[0]}"], marks=each.marks) for each in EXPERIMENTS),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_composes_without_missing_values(tmp_path, chosen):
    config = composed(tmp_path, *chosen)
    assert not OmegaConf.missing_keys(config)
    OmegaConf.to_container(config, resolve=True)


def test_what_a_comment_suggests_for_the_command_line_is_taken(tmp_path):
    comments = [line for line in (CONF / "strategy" / "easgd.yaml").read_text().splitlines() if "+strategy." in line]
    given = [re.search(r"\+strategy\S+=[\w.]+", line)[0] for line in comments]
    assert [override.split(".")[1] for override in given] == ["center_rule", "fault_tolerance"]
    rule = given[0].replace("my_module.MyRule", "lightning_easgd.method.rules.PlainRule")
    assert instantiate(composed(tmp_path, rule).strategy).center_rule == PlainRule()
    assert instantiate(composed(tmp_path, given[1]).strategy).elastic is not None


def test_strategy_yaml_has_every_argument():
    for name in ("easgd", "eamsgd"):
        assert set(OmegaConf.load(CONF / "strategy" / "easgd.yaml")) - {"_target_"} == (
            keyword_arguments(EASGDStrategy.__init__) - FROM_TRAINER
        ), name
    assert set(OmegaConf.load(CONF / "strategy" / "easgd_fsdp.yaml")) - {"_target_"} == (
        keyword_arguments(EASGDModelParallelStrategy.__init__)
    )
    assert set(OmegaConf.load(CONF / "strategy" / "downpour.yaml")) - {"_target_"} == (
        keyword_arguments(DownpourStrategy.__init__) - FROM_TRAINER
    )
    assert set(OmegaConf.load(CONF / "strategy" / "local.yaml")) - {"_target_", "tau"} == (
        keyword_arguments(LocalStrategy.__init__) - FROM_TRAINER
    )


def test_trainer_yaml_has_every_argument():
    groups_of_their_own = {"strategy", "callbacks", "logger"}
    newer_than_2_5 = {"enable_autolog_hparams", "model_registry"}
    keys = set(OmegaConf.load(CONF / "trainer" / "default.yaml")) - {"_target_"}
    assert keys == keyword_arguments(L.Trainer.__init__) - groups_of_their_own - newer_than_2_5


# The data and the transform that a model is meant for, and the model that data are meant for.
DATA_OF = {
    "digits_net": ("digits", None), "convnet7": ("cifar10", "cifar_paper"), "strided_net": ("fashion_mnist", None),
    "convnet11": ("imagenet", "imagenet_paper"), "resnet18": ("imagenet", "imagenet_standard"),
    "resnet50": ("imagenet", "imagenet_standard"), "resnet18_small": ("cifar10", "cifar_standard"),
    "resnet50_small": ("cifar100", "cifar_standard"),
}  # fmt: skip
MODEL_OF = {"digits": "digits_net", "imagenet": "resnet18"}
TRANSFORMS_OF = {
    "cifar10": "cifar", "cifar100": "cifar", "mnist": "mnist", "fashion_mnist": "mnist", "imagenet": "imagenet",
}  # fmt: skip


def nodes(config: DictConfig) -> list[DictConfig]:
    """Everything below a node that is instantiated, and the node."""
    parts = [config[key] for key in config if isinstance(config[key], DictConfig)]
    inner = [node for part in parts for node in nodes(part)]
    return [config, *inner] if "_target_" in config else inner


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group in ("data", "model") for option in options(group)]
)
def test_data_and_model_yaml_have_every_argument(tmp_path, group, option):
    elsewhere = {"optimizer", "scheduler"}
    for node in nodes(composed(tmp_path, f"{group}={option}")[group]):
        initializer = get_class(node._target_).__init__
        handed_on = keyword_arguments(ImageDataModule.__init__) if "images" in initializer.__annotations__ else set()
        arguments = keyword_arguments(initializer) | handed_on
        assert set(node) - {"_target_"} - elsewhere == arguments - elsewhere, node._target_


def test_the_arguments_that_data_modules_hand_on_are_those_of_their_base():
    assert set(ImageArguments.__annotations__) == keyword_arguments(ImageDataModule.__init__)


@pytest.mark.parametrize(
    ("data", "transform"),
    [
        (data, name)
        for data, kind in TRANSFORMS_OF.items()
        for name in options("data/transform")
        if name.startswith(kind)
    ],
)
def test_data_and_transforms_agree_with_their_defaults_in_python(tmp_path, data, transform):
    config = composed(tmp_path, f"data={data}", f"data/transform={transform}").data
    module = instantiate(config)
    assert list(module.image_shape) == list(config.image_shape)
    assert module.num_classes == config.num_classes
    facts = type(module).facts
    assert (tuple(config.mean), tuple(config.std)) == (facts.mean, facts.std)
    if config == composed(tmp_path, f"data={data}").data:  # the transform that the data come with
        default = get_class(config._target_)()
        for name in ("train_transform", "eval_transform"):
            assert getattr(module, name) == getattr(default, name)


# The paper's networks have no padding: a layer of theirs can leave nothing of a small image.
TOO_SMALL = {("digits", "convnet7"), *((data, "convnet11") for data in options("data") if data != "imagenet")}
# A network of 200 million parameters, and networks that keep the size of a large image.
TOO_LARGE = {("imagenet", model) for model in ("convnet7", "resnet18_small", "resnet50_small")}


@pytest.mark.parametrize(
    ("data", "model"),
    [pair for pair in itertools.product(options("data"), options("model")) if pair not in TOO_SMALL | TOO_LARGE],
)
def test_a_model_is_built_for_the_data(tmp_path, data, model):
    config = composed(tmp_path, f"data={data}", f"model={model}")
    module = instantiate(config.data)
    with torch.device("meta"):  # shapes alone, without numbers
        built = build_model(config)
        assert built.num_classes == built.network.num_classes == module.num_classes
        built.check_data(module)
        built.eval()
        assert built(torch.zeros(1, *module.image_shape)).shape == (1, module.num_classes)


@pytest.mark.parametrize(("data", "model"), sorted(TOO_SMALL))
def test_a_model_for_larger_images_is_refused(tmp_path, data, model):
    with pytest.raises(InstantiationException, match=r"image_shape=.*the convolutions leave nothing of such images"):
        build_model(composed(tmp_path, f"data={data}", f"model={model}"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.num_classes=100"], r"Classifier\(num_classes=100\): CIFAR10DataModule has num_classes=10"),
        (["model.network.num_classes=7"], r"Classifier\(num_classes=10\): the network has 7 classes"),
        (["data.num_classes=100"], r"CIFAR10DataModule\(num_classes=100\): these data have 10 classes"),
        (
            ["model.network.image_shape=[3,32,32]"],
            r"Classifier\(image_shape=\(3, 32, 32\)\): .* image_shape=\(3, 28, 28\)",
        ),
        (["data.image_shape=[3,32,32]"], r"CIFAR10DataModule\(image_shape=\[3, 32, 32\]\): the batches have"),
        (["data.eval_transform.size=32"], r"CIFAR10DataModule\(eval_transform=.*give both the same size"),
    ],
)
@pytest.mark.filterwarnings("ignore:verify=False:UserWarning")
def test_a_mismatch_of_data_and_model_is_a_clear_error(tmp_path, overrides, says):
    write_cifar10(tmp_path)
    config = composed(
        tmp_path / "run", "strategy=single", "data=cifar10", "model=convnet7", f"paths.data={tmp_path}",
        "data.verify=false", *overrides, *QUICK,
    )  # fmt: skip
    with pytest.raises((ValueError, InstantiationException), match=says) as caught:
        train(config)
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)


def test_missing_data_are_one_sentence_of_the_command(tmp_path):
    config = composed(
        tmp_path, "strategy=single", "data=cifar10", "model=strided_net", f"paths.data={tmp_path}/nowhere", *QUICK
    )
    with pytest.raises(DataError) as caught:
        train(config)
    assert "set download=true" in str(caught.value)
    assert explain("easgd-train", caught.value) == str(caught.value)


def test_strategy_arguments_arrive(tmp_path):
    strategy = build_strategy(composed(tmp_path, "strategy=eamsgd", "strategy.tau=3", "strategy.alpha=0.1").strategy)
    assert (strategy.tau, strategy.momentum, strategy._timeout) == (3, 0.9, timedelta(minutes=30))


@pytest.mark.parametrize("name", ["easgd", "ddp", "local"])
@pytest.mark.parametrize(("override", "seconds"), [("timeout=5", 5), ("timeout=0.5", 0.5), ("timeout.seconds=7", 7)])
def test_timeout_on_the_command_line_is_in_seconds(tmp_path, name, override, seconds):
    strategy = build_strategy(composed(tmp_path, f"strategy={name}", f"strategy.{override}").strategy)
    assert strategy._timeout == timedelta(seconds=seconds)


@pytest.mark.parametrize("name", ["ddp", "local", "single"])
def test_tau_of_a_strategy_without_one_is_left_out(tmp_path, name):
    build_strategy(composed(tmp_path, f"strategy={name}", "strategy.tau=16").strategy)


@pytest.mark.parametrize(
    "override",
    [
        *(f"optimizer={name}" for name in options("optimizer")),
        *(f"scheduler={name}" for name in options("scheduler")),
        *(f"logger={name}" for name in LOGGERS),
        *(f"callbacks={name}" for name in options("callbacks")),
    ],
)
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.filterwarnings("ignore:TensorBoard.*:DeprecationWarning")
def test_every_option_of_one_process_runs(tmp_path, override):
    length = ["trainer.max_steps=2"] if override == "scheduler=cosine_steps" else []
    config = composed(tmp_path, "strategy=single", override, *QUICK, *length)
    accuracy = train(config)
    assert (accuracy is None) == (override in ("callbacks=none", "callbacks=compare"))
    assert (tmp_path / "metrics.csv").exists() == (override != "logger=none")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A folder with a small data set in every format."""
    root = tmp_path_factory.mktemp("official")
    write_cifar10(root)
    write_cifar100(root, count=1000)
    write_mnist(root, "MNIST", count=100, compressed=True)
    write_mnist(root, "FashionMNIST", count=100)
    write_imagenet(root / "imagenet")
    return root


def with_loaders(name, data):
    """Images of ImageNet are loaded in processes."""
    return pytest.param(name, marks=pytest.mark.processes) if data == "imagenet" else name


def run_on(run, official, data, model, transform):
    """One epoch of two batches of two images."""
    overrides = [f"data={data}", f"model={model}", f"paths.data={official}", "data.batch_size=2", "optimizer.lr=0.001"]
    if transform:
        overrides.append(f"data/transform={transform}")
    if data == "imagenet":
        overrides += [f"data.num_classes={len(WNIDS)}", "data.num_workers=1"]
    elif data != "digits":
        overrides.append("data.verify=false")
    limits = ["trainer.limit_val_batches=1", "callbacks.worker_evaluation.max_batches=1"]
    config = composed(run, "strategy=single", *overrides, *limits, "trainer.enable_checkpointing=false", *QUICK)
    assert train(config) is not None


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.filterwarnings("ignore:verify=False:UserWarning")
@pytest.mark.parametrize("data", [with_loaders(name, name) for name in options("data")])
def test_every_data_set_runs(tmp_path, official, data):
    run_on(tmp_path, official, data, MODEL_OF.get(data, "strided_net"), None)


@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.filterwarnings("ignore:verify=False:UserWarning")
@pytest.mark.parametrize("model", [with_loaders(name, DATA_OF[name][0]) for name in options("model")])
def test_every_model_runs(tmp_path, official, model):
    data, transform = DATA_OF[model]
    run_on(tmp_path, official, data, model, transform)


@pytest.mark.parametrize("strategy", options("strategy"))
def test_every_strategy_runs(tmp_path, strategy, monkeypatch):
    devices = {"single": [], "easgd_elastic": ["trainer.devices=1"]}.get(strategy, ["trainer.devices=2"])
    with Job(tmp_path) if strategy == "easgd_elastic" else nullcontext() as job:
        if job is not None:
            monkeypatch.setenv("TORCHFT_LIGHTHOUSE", job.address)
            monkeypatch.setenv("REPLICA_GROUP_ID", "0")
        done = command("train", f"strategy={strategy}", *devices, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (only_run(tmp_path) / "accuracy.csv").exists()


@pytest.mark.parametrize("experiment", SINGLE_RUNS)
def test_every_experiment_runs(tmp_path, experiment):
    done = command("train", f"experiment={experiment}", "trainer.devices=2", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_trainers_switches_turn_callbacks_off(tmp_path):
    config = composed(tmp_path, "trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false")
    names = {type(callback).__name__ for callback in build_trainer(config).callbacks}
    assert names == {
        "CurvatureMonitor", "ElasticMonitor", "RecalibrateBatchNorm", "TimeSplit", "WorkerEvaluation",
    }  # fmt: skip


def test_gpu_trainer_differs_from_cpu_only_in_its_devices(tmp_path):
    cpu, gpu = (composed(tmp_path, f"trainer={name}").trainer for name in ("cpu", "gpu"))
    assert {key for key in cpu if cpu[key] != gpu[key]} == {"accelerator", "devices"}


def test_evaluate_yaml_runs_on_a_checkpoint_without_a_saved_config(tmp_path):
    train(composed(tmp_path / "run", "strategy=single", *QUICK))
    lone = tmp_path / "elsewhere" / "deep" / "lone.ckpt"
    lone.parent.mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").rename(lone)
    metrics = evaluate(composed(tmp_path / "evaluation", f"ckpt_path={lone}", name="evaluate"))
    assert set(metrics) == {"test/loss", "test/accuracy"}


@pytest.mark.filterwarnings("ignore:verify=False:UserWarning")
def test_a_model_of_the_command_line_is_evaluated_on_the_saved_data(tmp_path, official):
    train(
        composed(
            tmp_path / "run", "strategy=single", "data=fashion_mnist", "data.verify=false", f"paths.data={official}",
            "callbacks.worker_evaluation.test=false", *QUICK,
        )
    )  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    config = composed(tmp_path / "evaluation", f"ckpt_path={checkpoint}", "model=digits_net", name="evaluate")
    assert set(evaluate(config, keep={"model"})) == {"test/loss", "test/accuracy"}
    assert config.model.network.image_shape == [1, 28, 28]
