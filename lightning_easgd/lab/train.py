"""`easgd-train`: one training run, described by the configuration `lightning_easgd.conf`."""

import inspect
import logging
import os
import platform
import secrets
import warnings
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_easgd.lab import plots, report
from lightning_easgd.lab.command_errors import UsageError, run_command, usage_errors
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.models import Classifier
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy

_COMMAND = "easgd-train"
CONFIG_FILE = report.CONFIG_FILE
VERSIONS_FILE = "versions.txt"
_PACKAGES = ("lightning_easgd", "lightning", "torch", "torchmetrics", "hydra-core", "numpy")


def main() -> None:
    """Run the command."""
    run_command(_COMMAND, _hydra_main)


def launch_name() -> str:
    """Name a launch of a command, so that two of them in the same second have different run directories.

    Ranks that torchrun or SLURM has started compose their configurations each on their own; what they have in common
    is the process that started them.
    """
    launched_with_others = not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}.isdisjoint(os.environ)
    return str(os.getppid()) if launched_with_others else secrets.token_hex(2)


# Cached: Hydra asks several times for the directory of one run.
OmegaConf.register_new_resolver("easgd_launch", launch_name, use_cache=True, replace=True)


@hydra.main(config_path="pkg://lightning_easgd.conf", config_name="train", version_base="1.3")
def _hydra_main(config: DictConfig) -> float | None:
    with usage_errors():
        return train(config)


def train(config: DictConfig) -> float | None:
    """Train as the configuration says.

    Returns:
        The last validation accuracy at the center, for Hydra's sweepers; None on other ranks than 0 and when
        the run did not measure it.
    """
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    trainer = build_trainer(config)
    _check_launch(config, trainer)
    _check_optimizer(config, trainer.strategy)
    datamodule = instantiate(config.data)
    model = build_model(config)
    _check_data(model, datamodule)
    run = Path(config.paths.run)
    if trainer.is_global_zero:
        _record(config, run)
    trainer.fit(model, datamodule=datamodule, ckpt_path=config.ckpt_path)
    if not trainer.is_global_zero:
        return None
    _conclude(config, run)
    return report.last_accuracy(run, "val").get(report.CENTER)


def build_model(config: DictConfig) -> L.LightningModule:
    """Build the model with the optimizer and scheduler of their own groups."""
    scheduler = instantiate(config.scheduler) if config.get("scheduler") else None
    model: L.LightningModule = instantiate(config.model, optimizer=instantiate(config.optimizer), scheduler=scheduler)
    return model


def build_trainer(config: DictConfig) -> L.Trainer:
    """Build the trainer with strategy, callbacks and loggers."""
    loggers = [_build_logger(config.logger, name) for name in config.logger]
    trainer: L.Trainer = instantiate(
        config.trainer,
        strategy=build_strategy(config.strategy),
        callbacks=_build_callbacks(config),
        logger=loggers or False,
    )
    return trainer


def build_strategy(config: DictConfig) -> Any:
    """Build the strategy.

    `tau` is left out where it means nothing, so that a sweep may set it for all. A `timeout` that is a number, as it
    is written on a command line, means seconds.
    """
    initializer = inspect.getattr_static(get_class(config._target_), "__init__")
    left_out = set() if "tau" in inspect.signature(initializer).parameters else {"tau"}
    return instantiate(
        OmegaConf.masked_copy(config, [str(key) for key in config if key not in left_out]), **_timeout(config)
    )


def _timeout(config: DictConfig) -> dict[str, timedelta]:
    value = config.get("timeout")
    if value is None or isinstance(value, DictConfig):
        return {}
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UsageError(f"{_COMMAND}(strategy.timeout={value}): give a positive number of seconds")
    return {"timeout": timedelta(seconds=value)}


def _build_callbacks(config: DictConfig) -> list[Any]:
    # The trainer's switches turn the group's callbacks off; Lightning would call the two a contradiction.
    switched_off = tuple(
        prefix
        for prefix, switch in (("progress_bar", "enable_progress_bar"), ("checkpoint", "enable_checkpointing"))
        if config.trainer[switch] is False
    )
    return [
        instantiate(callback)
        for name, callback in config.callbacks.items()
        if callback and not str(name).startswith(switched_off)
    ]


def _build_logger(config: DictConfig, name: str) -> Any:
    try:
        return instantiate(config[name])
    except hydra.errors.InstantiationException as error:
        if isinstance(error.__cause__, ModuleNotFoundError):
            raise UsageError(
                f"{_COMMAND}(logger={name}): the package {name} is not installed; run pip install "
                f"'lightning_easgd[{name}]' or choose logger=csv"
            ) from error
        raise


def _check_launch(config: DictConfig, trainer: L.Trainer) -> None:
    """Refuses, before any process starts, what would train something else than was asked for."""
    settings = HydraConfig.get()
    if settings.runtime.choices["strategy"] == "single" and trainer.world_size > 1:
        raise UsageError(
            f"{_COMMAND}(strategy=single, trainer.devices={config.trainer.devices}): one process uses one "
            f"device; set trainer.devices=1 or choose another strategy"
        )
    popen = config.strategy.get("start_method", "popen") == "popen"
    environment = getattr(trainer.strategy, "cluster_environment", None)
    external = environment is not None and environment.creates_processes_externally
    if settings.mode == RunMode.MULTIRUN and popen and trainer.num_devices > 1 and not external:
        raise UsageError(
            f"{_COMMAND}(--multirun, strategy.start_method=popen, trainer.devices={config.trainer.devices}): "
            f"each rank would repeat the whole sweep and train other settings; set "
            f"strategy.start_method=spawn"
        )


def _check_optimizer(config: DictConfig, strategy: object) -> None:
    """Build the optimizer on a stand-in for the model: what is wrong with it shows before any process starts."""
    try:
        optimizer = instantiate(config.optimizer)([torch.nn.Parameter(torch.zeros(1))])
        if isinstance(strategy, TrainerStrategy) and strategy.has_center:
            strategy.prepare_optimizer(optimizer)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{_COMMAND}(optimizer={config.optimizer._target_}): {error}") from error


def _check_data(model: L.LightningModule, datamodule: object) -> None:
    """Compare the model with the data before any process starts."""
    if isinstance(model, Classifier):
        try:
            model.check_data(datamodule)
        except ValueError as error:
            raise UsageError(f"{_COMMAND}: {error}") from error


def _record(config: DictConfig, run: Path) -> None:
    """Write what the run was made from: the resolved configuration and the versions."""
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG_FILE).write_text(OmegaConf.to_yaml(_portable(config), resolve=True), encoding="utf-8")
    lines = machine()
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from a clone that is not installed
            lines.append(f"{package} unknown")
    (run / VERSIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _portable(config: DictConfig) -> DictConfig:
    """A copy in which the data's place, if it comes from the environment, resolves to what the environment is asked.

    Where the data lie is a fact of this machine and not of the run.
    """
    copy: DictConfig = config.copy()
    place = OmegaConf.to_container(config.paths, resolve=False)["data"]  # type: ignore[call-overload, index]
    if isinstance(place, str) and place.startswith("${oc.env:"):
        with open_dict(copy):
            copy.paths.data = "\\" + place  # an escaped interpolation is text
    return copy


def machine() -> list[str]:
    """Say what this machine is, one fact a line: Python, system, processor, usable cores, GPUs."""
    information = Path("/proc/cpuinfo")
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return [
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        f"processor {models[0] if models else platform.machine()}",
        f"cores {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        *(f"gpu {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())),
    ]


def _conclude(config: DictConfig, run: Path) -> None:
    """Print the table and draws the figure; neither can spoil a run that is done."""
    if config.report:
        print(report.render(run))
    if config.plot:
        try:
            print(f"  figure: {plots.draw(run)}")
        except MissingExtraError as error:
            print(f"  no figure: {error}")
    print(f"  run directory: {run}")


def quiet() -> None:
    """Silence what Lightning says about every run of this command and no user can act upon."""
    # Filters are compared when they are added: calling this again adds nothing.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in (
        # The shipped data sets are in memory, where loader processes only cost time.
        r".*does not have many workers which may be a bottleneck.*",
        # Hydra has just made the run's directory, and the CSV logger finds Hydra's files in it.
        r"Experiment logs directory .* exists and is not empty.*",
        r"Checkpoint directory .* exists and is not empty.*",
        # Each run has a directory of its own, also one that resumes another.
        r"The dirpath has changed from .*",
        # A checkpoint that is only tested does not need the callbacks of its training.
        r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided.*",
        # Lightning and the tested torch; nothing of ours.
        r"`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


if __name__ == "__main__":
    main()
