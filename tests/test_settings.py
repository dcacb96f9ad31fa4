"""Settings that projects with Hydra and Lightning have: loggers, callbacks, debugging, searches, containers."""

import csv
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import lightning as L
import pytest
import torch
from application import CONF, ROOT, composed, options
from hydra.utils import get_class
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, RichProgressBar
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.profilers import SimpleProfiler
from omegaconf import OmegaConf
from test_train import refusal

from lightning_easgd.lab import building, evaluate, train
from lightning_easgd.lab.worker_weights import kept_workers, loaded_workers

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
]
SERVICES = ("wandb", "mlflow", "comet")
QUICK = ("strategy=single", "trainer.max_epochs=1", "trainer.limit_train_batches=4", "plot=false", "report=false",
         "trainer.log_every_n_steps=1", "on_divergence=report")  # fmt: skip


@pytest.fixture(autouse=True)
def environment():
    """Lightning writes LOCAL_RANK and its like into the environment of a process that trains."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def available(monkeypatch, name, answer):
    flag = {"wandb": "wandb._WANDB_AVAILABLE", "mlflow": "mlflow._MLFLOW_AVAILABLE", "comet": "comet._COMET_AVAILABLE"}
    monkeypatch.setattr(f"lightning.pytorch.loggers.{flag[name]}", answer)


# Loggers


@pytest.mark.parametrize("choice", [*SERVICES, "many_loggers"])
def test_a_service_that_is_not_installed_is_one_sentence(monkeypatch, tmp_path, choice):
    pytest.importorskip("tensorboard")
    for name in SERVICES:
        available(monkeypatch, name, False)
    sentence = refusal(monkeypatch, tmp_path, train.main, f"logger={choice}", "strategy=single")
    name = "wandb" if choice == "many_loggers" else choice
    assert sentence == (
        f"easgd-train(logger={name}): the package {name} is not installed; run pip install 'lightning_easgd[{name}]' or"
        " choose logger=csv"
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_services_keys_are_those_of_its_class(tmp_path, name):
    settings = OmegaConf.to_container(composed(tmp_path, f"logger={name}").logger[name], resolve=True)
    initializer = inspect.signature(get_class(settings.pop("_target_")).__init__)
    initializer.bind(None, **settings)
    named = {each.name for each in initializer.parameters.values() if each.kind != inspect.Parameter.VAR_KEYWORD}
    assert set(settings) <= named


def test_nothing_of_a_service_is_imported_unless_it_is_chosen(tmp_path):
    building.build_trainer(composed(tmp_path, "strategy=single"))
    assert not {"wandb", "mlflow", "comet_ml"} & set(sys.modules)


class Experiment:
    """Remembers what is called; of a MagicMock names like __internal_api__log_metrics__ cannot be."""

    def __init__(self):
        self.called = {}

    def __getattr__(self, name):
        return self.__dict__["called"].setdefault(name, MagicMock())


def stubs(monkeypatch):
    """Services that only remember what they are told."""
    wandb, mlflow, comet = MagicMock(name="wandb"), MagicMock(name="mlflow"), MagicMock(name="comet_ml")
    wandb.run, wandb.RunDisabled, wandb.Run = None, type("RunDisabled", (), {}), type("Run", (), {})
    mlflow.tracking.MlflowClient.return_value.get_experiment_by_name.return_value.experiment_id = "1"
    comet.start.return_value = Experiment()
    for name, stub in (("wandb", wandb), ("mlflow", mlflow), ("comet_ml", comet)):
        monkeypatch.setitem(sys.modules, name, stub)
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"):
        monkeypatch.setitem(sys.modules, name, wandb)
    for name in ("mlflow.tracking", "mlflow.entities", "mlflow.utils", "mlflow.utils.mlflow_tags"):
        monkeypatch.setitem(sys.modules, name, getattr(mlflow, name.partition(".")[2].replace(".", "_"), mlflow))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", mlflow.tracking)
    for name in SERVICES:
        available(monkeypatch, name, True)
    return wandb.init.return_value, mlflow.tracking.MlflowClient.return_value, comet.start.return_value


def test_chosen_services_are_told_metrics_and_settings(monkeypatch, tmp_path):
    run, client, experiment = stubs(monkeypatch)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._get_resolve_tags", lambda: lambda tags: tags)
    pytest.importorskip("tensorboard")
    config = composed(tmp_path, "logger=[many_loggers,comet]", *QUICK)
    trainer = building.build_trainer(config)
    assert [type(logger).__name__ for logger in trainer.loggers] == [
        "CSVLogger", "TensorBoardLogger", "WandbLogger", "MLFlowLogger", "CometLogger",
    ]  # fmt: skip
    assert train.train(config) is not None
    logged = {key for call in run.log.call_args_list for key in call.args[0]}
    assert {"train/loss", "val/accuracy"} <= logged
    assert client.log_batch.called
    assert {"__internal_api__log_metrics__", "__internal_api__log_parameters__"} <= set(experiment.called)
    assert run.config.update.called, "the settings"
    assert (tmp_path / "metrics.csv").exists()


# Callbacks


def test_callbacks_add_to_the_default_and_to_each_other(tmp_path):
    default = set(composed(tmp_path).callbacks)
    for order in (
        ["rich_progress_bar", "early_stopping", "learning_rate_monitor"],
        ["learning_rate_monitor", "early_stopping", "rich_progress_bar"],
    ):
        config = composed(tmp_path, f"callbacks=[{','.join(order)}]", "strategy=single")
        assert default < set(config.callbacks)
        found = {type(callback) for callback in building.build_trainer(config).callbacks}
        assert {RichProgressBar, EarlyStopping, LearningRateMonitor} <= found
        bars = [
            callback for callback in building.build_trainer(config).callbacks if "Progress" in type(callback).__name__
        ]
        assert len(bars) == 1


def test_the_bar_of_rich_obeys_the_trainers_switch(tmp_path):
    config = composed(tmp_path, "callbacks=rich_progress_bar", "trainer.enable_progress_bar=false")
    assert not [each for each in building.build_trainer(config).callbacks if "Progress" in type(each).__name__]


def test_the_learning_rate_is_recorded_and_training_stops_early(tmp_path):
    config = composed(
        tmp_path, "callbacks=[early_stopping,learning_rate_monitor]", *QUICK, "trainer.max_epochs=9",
        "optimizer.lr=0.0",
        "callbacks.early_stopping.patience=1", "trainer.limit_val_batches=1", "callbacks.worker_evaluation=null",
    )  # fmt: skip
    train.train(config)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["lr-SGD"] for row in rows if row["lr-SGD"]} == {"0.0"}
    assert max(int(row["epoch"]) for row in rows if row["epoch"]) == 1, "the second epoch is no better than the first"


def test_a_learning_rate_without_a_logger_is_one_sentence(monkeypatch, tmp_path):
    sentence = refusal(monkeypatch, tmp_path, train.main, "callbacks=learning_rate_monitor", "logger=none")
    assert sentence == "easgd-train(logger=none): LearningRateMonitor writes to a logger; choose one, as logger=csv"


# Debugging


@pytest.mark.parametrize("option", options("debug"))
def test_every_way_of_debugging_runs_in_this_process(tmp_path, option, caplog):
    more = ["trainer.max_epochs=2"] if option == "overfit" else []
    config = composed(tmp_path, f"debug={option}", "model.network.width=4", *more)
    trainer = building.build_trainer(config)
    assert (trainer.world_size, trainer.num_nodes) == (1, 1)
    facts = {
        "default": (trainer.max_epochs, trainer._detect_anomaly) == (1, True),
        "fdr": trainer.fast_dev_run,
        "limit": trainer.limit_train_batches == 20,
        "overfit": trainer.overfit_batches == 3,
        "profiler": isinstance(trainer.profiler, SimpleProfiler),
    }
    assert facts[option]
    train.train(config)
    assert ("Profiler Report" in caplog.text) == (option == "profiler")


# Searches


def search(monkeypatch, tmp_path, *words):
    """The settings of the jobs of a sweep, which are not trained."""
    jobs = []

    def job(config):
        jobs.append(config)
        run = Path(config.paths.run)
        run.mkdir(parents=True, exist_ok=True)
        score = 0.5 + 0.01 * len(jobs)
        lines = [f"val,{step},center,{score - 0.1 / step}\n" for step in (1, 2)]
        (run / "accuracy.csv").write_text("stage,step,weights,accuracy\n" + "".join(lines))
        return score

    monkeypatch.setattr(train, "train", job)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["easgd-train", *words])
    train.main()
    return jobs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_search_maximizes_the_accuracy_and_ends_with_its_table_and_figure(monkeypatch, tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    jobs = search(monkeypatch, tmp_path, "hparams_search=optuna", "hydra.sweeper.n_trials=4", "hydra.sweep.dir=search")
    assert len({job.optimizer.lr for job in jobs}) == 4
    assert all(0.01 <= job.optimizer.lr <= 1 and job.strategy.tau in (4, 10, 16, 64) for job in jobs)
    assert {job.strategy.start_method for job in jobs} == {"spawn"}
    best = OmegaConf.load(tmp_path / "search" / "optimization_results.yaml")
    assert (best.best_value, best.best_params["optimizer.lr"]) == (0.54, jobs[-1].optimizer.lr)
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert ["optimizer.lr", "strategy.tau", "strategy.beta", "val", "accuracy"] in table
    assert (tmp_path / "search" / "sweep.png").exists()


def test_a_search_of_one_process_is_built(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert building.build_trainer(composed(tmp_path, "hparams_search=optuna", "strategy=single")).world_size == 1


def test_a_search_without_its_package_is_one_sentence(monkeypatch, tmp_path):
    from hydra._internal.config_repository import ConfigRepository

    load = ConfigRepository.load_config
    monkeypatch.setattr(
        ConfigRepository,
        "load_config",
        lambda self, config_path: None if config_path == "hydra/sweeper/optuna" else load(self, config_path),
    )
    assert refusal(monkeypatch, tmp_path, train.main, "hparams_search=optuna") == (
        "easgd-train(hparams_search=optuna): the package hydra-optuna-sweeper is not installed; run pip install"
        " 'lightning_easgd[search]'"
    )


def test_a_sweep_over_methods_names_them(monkeypatch, tmp_path, capsys):
    search(monkeypatch, tmp_path, "-m", "strategy=easgd,ddp", "hydra.sweep.dir=sweep", "seed=3")
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["strategy"] for row in rows] == ["easgd", "ddp"]
    assert "seed" not in rows[0], "what does not vary"
    assert "ddp       49.00%" in capsys.readouterr().out or rows[1]["val accuracy"]


# Launchers


def test_what_torchrun_has_started_is_found(monkeypatch, tmp_path):
    started = {"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1",
               "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"}  # fmt: skip
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    trainer = building.build_trainer(composed(tmp_path, "trainer=torchrun", "trainer.accelerator=cpu"))
    assert (trainer.num_devices, trainer.num_nodes, trainer.world_size) == (4, 2, 8)
    assert isinstance(trainer.strategy.cluster_environment, TorchElasticEnvironment)


def test_the_tasks_of_a_job_of_slurm_are_found(monkeypatch, tmp_path):
    tasks = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "5",
             "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "x",
             "SLURM_NODELIST": "a[1-2]"}  # fmt: skip
    for name, value in tasks.items():
        monkeypatch.setenv(name, value)
    trainer = building.build_trainer(composed(tmp_path, "trainer=slurm", "trainer.accelerator=cpu"))
    assert (trainer.num_devices, trainer.num_nodes, trainer.world_size) == (4, 2, 8)
    assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)


def test_nodes_without_a_launcher(tmp_path):
    config = composed(tmp_path, "trainer=nodes", "trainer.accelerator=cpu", "trainer.devices=3", "trainer.num_nodes=2")
    assert building.build_trainer(config).world_size == 6


@pytest.mark.processes
def test_the_batch_file_starts_every_task_with_settings_that_exist(tmp_path):
    """With a srun that writes down what it is told; then as the job that SLURM has queued again."""
    file = ROOT / "examples" / "slurm.sbatch"
    lines = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", file.read_text(), re.MULTILINE))
    assert {"nodes", "ntasks-per-node", "requeue", "signal"} <= set(lines)
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > said\n')
    srun.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    subprocess.run(["bash", file, "seed=3"], env=environment, check=True, timeout=20)
    command, *overrides = (tmp_path / "said").read_text().split()
    assert command == ".venv/bin/easgd-train"
    assert overrides == ["trainer=slurm", "hydra.run.dir=outputs/slurm-17-0", "seed=3"]
    composed(tmp_path, overrides[0], overrides[2])
    checkpoint = tmp_path / "outputs" / "slurm-17-0" / "hpc_ckpt_1.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    subprocess.run(["bash", file], env=environment | {"SLURM_RESTART_COUNT": "1"}, check=True, timeout=20)
    assert (tmp_path / "said").read_text().split()[2:] == [
        "hydra.run.dir=outputs/slurm-17-1", "ckpt_path=outputs/slurm-17-0/hpc_ckpt_1.ckpt",
    ]  # fmt: skip


# Workers' own weights


class Toy(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)


def checkpoint_of(workers):
    states = [
        {"tensors": {"layer.weight": torch.full((1, 1), float(worker)), "count": torch.tensor(float(worker))}}
        for worker in range(workers)
    ]
    return {
        "state_dict": {"layer.weight": torch.full((1, 1), 9.0)},
        "easgd": {"world_size": workers, "workers": states},
    }


def test_each_workers_weights_are_loaded_in_turn():
    module, checkpoint = Toy(), checkpoint_of(3)
    assert kept_workers(checkpoint) == 3
    found = [
        (worker, here, module.layer.weight.item(), module.count.item())
        for worker, here in loaded_workers(Path("x"), checkpoint, module)
    ]
    assert found == [(0, True, 0.0, 0.0), (1, True, 1.0, 1.0), (2, True, 2.0, 2.0)]


def test_what_no_worker_has_of_its_own_is_the_centers():
    module, checkpoint = Toy(), checkpoint_of(2)
    del checkpoint["easgd"]["workers"][1]["tensors"]["layer.weight"]
    assert [module.layer.weight.item() for _ in loaded_workers(Path("x"), checkpoint, module)] == [0.0, 9.0]


def test_weights_beside_the_checkpoint_and_one_that_is_torn(tmp_path):
    checkpoint = checkpoint_of(2)
    states = checkpoint["easgd"].pop("workers")
    checkpoint["easgd"]["generation"] = "7"
    folder = tmp_path / "a.ckpt.easgd" / "7"
    folder.mkdir(parents=True)
    torch.save(states[0], folder / "rank_0.pt")
    (folder / "rank_1.pt").write_bytes(b"torn")
    module = Toy()
    with pytest.warns(UserWarning, match="state of worker 1 cannot be read"):
        found = [(each, module.layer.weight.item()) for each in loaded_workers(tmp_path / "a.ckpt", checkpoint, module)]
    assert found == [((0, True), 0.0), ((1, False), 9.0)]


@pytest.mark.parametrize("saved", [{}, {"easgd": {"world_size": 2, "clocks": [1]}}])
def test_a_checkpoint_without_workers(saved):
    assert kept_workers({"state_dict": {}} | saved) == 0
    assert list(loaded_workers(Path("x"), {"state_dict": {}} | saved, Toy())) == []


def test_evaluate_says_that_there_are_no_workers(monkeypatch, tmp_path, capsys):
    train.train(composed(tmp_path / "run", *QUICK))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["easgd-evaluate", "ckpt_path=run/checkpoints/last.ckpt"])
    evaluate.main()
    header, row, sentence = capsys.readouterr().out.rstrip().splitlines()[-3:]
    assert header.split() == ["weights", "test/loss", "test/accuracy"]
    assert row.split()[0] == "model"
    assert sentence.startswith("  No worker's own weights: the checkpoint keeps none.")


# Containers


def instructions():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip() and not line.startswith("#")]


def make_targets():
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) [:?]?= (.*)$", text, re.MULTILINE))
    targets = [word for line in re.findall(r"^([^\s#:=][^:=]*):(?!=)", text, re.MULTILINE) for word in line.split()]
    for _ in range(3):
        targets = [
            re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), target) for target in targets
        ]
    return targets


def test_the_dockerfile_copies_what_exists_and_trains():
    found = instructions()
    assert {name for name, _ in found} <= {"FROM", "RUN", "USER", "WORKDIR", "COPY", "CMD"}
    assert re.fullmatch(r"python:3\.1[123]-slim", found[0][1])
    ignored = {line.rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    for rest in (rest for name, rest in found if name == "COPY"):
        sources = [word for word in shlex.split(rest) if not word.startswith("--")][:-1]
        assert all((ROOT / source).exists() and source not in ignored for source in sources), sources
    made = [words for name, rest in found for words in [shlex.split(rest)] if name == "RUN" and words[0] == "make"]
    assert made == [["make", ".venv/.installed"]]
    assert json.loads(found[-1][1]) == ["make", "train"]
    assert {".venv/.installed", "train"} <= set(make_targets())
    assert {".git", ".venv*", "outputs"} <= ignored, "neither history nor what was built here"


def test_what_is_installed_needs_only_what_was_copied_before():
    found = instructions()
    before = found[: next(number for number, (_, rest) in enumerate(found) if rest.startswith("make"))]
    copied = {word for name, rest in before if name == "COPY" for word in shlex.split(rest)}
    for name in ("README.md", "LICENSE", "lightning_easgd", "conf", "constraints.txt", "pyproject.toml", "Makefile"):
        assert name in copied


def test_the_devcontainer_trains():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    folder = ROOT / ".devcontainer"
    assert (folder / settings["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (folder / settings["build"]["context"]).resolve() == ROOT
    assert settings["postCreateCommand"] == "make train"
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == [settings["remoteUser"]]


# Every option of the new groups is one that lightning-hydra-template's users look for


def test_the_groups_have_the_options():
    assert set(options("logger")) >= {"csv", "tensorboard", "wandb", "mlflow", "comet", "many_loggers"}
    assert set(options("debug")) == {"default", "fdr", "limit", "overfit", "profiler"}
    assert set(options("callbacks")) >= {
        "default",
        "early_stopping",
        "learning_rate_monitor",
        "rich_progress_bar",
        "none",
    }
    assert (CONF / "hparams_search" / "optuna.yaml").exists()
