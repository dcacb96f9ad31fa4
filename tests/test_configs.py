"""Every shipped configuration composes, instantiates and runs; every argument has its key."""

import inspect
import itertools
from datetime import timedelta

import lightning as L
import pytest
from application import CONF, command, composed, only_run, options
from hydra.utils import get_class
from omegaconf import OmegaConf

from lightning_easgd import DownpourStrategy, EASGDStrategy, LocalStrategy
from lightning_easgd.evaluate import evaluate
from lightning_easgd.train import build_model, build_strategy, build_trainer, train

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("_"))
# What the Trainer gives to a strategy itself.
FROM_TRAINER = {"accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"}
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


@pytest.mark.parametrize(
    ("strategy", "optimizer", "scheduler"),
    list(itertools.product(options("strategy"), options("optimizer"), options("scheduler"))),
)
@pytest.mark.parametrize("logger", options("logger"))
def test_every_combination_instantiates(tmp_path, strategy, optimizer, scheduler, logger):
    config = composed(
        tmp_path, f"strategy={strategy}", f"optimizer={optimizer}", f"scheduler={scheduler}", f"logger={logger}"
    )
    trainer = build_trainer(config)
    assert trainer.world_size == (1 if strategy == "single" else 4)
    assert len(trainer.loggers) == {"none": 0, "csv": 1, "tensorboard": 2}[logger]
    configured = build_model(config).configure_optimizers()
    made = configured["optimizer"] if isinstance(configured, dict) else configured
    assert type(made).__name__.lower() == optimizer
    assert isinstance(configured, dict) == (scheduler != "none")


@pytest.mark.parametrize(
    ("group", "option"),
    [
        *((group, option) for group in GROUPS if group != "experiment" for option in options(group)),
        *(pytest.param("experiment", *experiment.values, marks=experiment.marks) for experiment in EXPERIMENTS),
    ],
)
def test_every_option_composes_without_missing_values(tmp_path, group, option):
    overrides = [] if group == "hydra" else [f"{group}={option}"]
    config = composed(tmp_path, *overrides)
    assert not OmegaConf.missing_keys(config)
    OmegaConf.to_container(config, resolve=True)


def test_strategy_yaml_has_every_argument():
    for name in ("easgd", "eamsgd"):
        assert set(OmegaConf.load(CONF / "strategy" / "easgd.yaml")) - {"_target_"} == (
            keyword_arguments(EASGDStrategy.__init__) - FROM_TRAINER
        ), name
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


@pytest.mark.parametrize("path", ["data", "model", "model.network"])
def test_data_and_model_yaml_have_every_argument(tmp_path, path):
    node = OmegaConf.select(composed(tmp_path), path)
    elsewhere = {"optimizer", "scheduler"}
    assert set(node) - {"_target_"} - elsewhere == keyword_arguments(get_class(node._target_).__init__) - elsewhere


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
        *(f"logger={name}" for name in options("logger")),
        *(f"callbacks={name}" for name in options("callbacks")),
        *(f"data={name}" for name in options("data")),
        *(f"model={name}" for name in options("model")),
    ],
)
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists")
@pytest.mark.filterwarnings("ignore:TensorBoard.*:DeprecationWarning")
def test_every_option_of_one_process_runs(tmp_path, override):
    config = composed(tmp_path, "strategy=single", override, *QUICK)
    accuracy = train(config)
    assert (accuracy is None) == (override in ("callbacks=none", "callbacks=compare"))
    assert (tmp_path / "metrics.csv").exists() == (override != "logger=none")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", options("strategy"))
def test_every_strategy_runs(tmp_path, strategy):
    devices = [] if strategy == "single" else ["trainer.devices=2"]
    done = command("train", f"strategy={strategy}", *devices, *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (only_run(tmp_path) / "accuracy.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("experiment", SINGLE_RUNS)
def test_every_experiment_runs(tmp_path, experiment):
    done = command("train", f"experiment={experiment}", "trainer.devices=2", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_trainers_switches_turn_callbacks_off(tmp_path):
    config = composed(tmp_path, "trainer.enable_progress_bar=false", "trainer.enable_checkpointing=false")
    names = {type(callback).__name__ for callback in build_trainer(config).callbacks}
    assert names == {"ElasticMonitor", "WorkerEvaluation", "TimeSplit"}


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
