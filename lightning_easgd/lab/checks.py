"""What is wrong with a training's settings, before any process starts."""

import math

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_easgd.lab.command_errors import (
    UsageError,
    naming_the_key,
)
from lightning_easgd.lab.data.images import SplitDataModule
from lightning_easgd.lab.models import Classifier
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy

__all__ = ["check_data", "check_launch", "check_numbers", "check_optimizer", "check_settings"]

_COMMAND = "easgd-train"
_ON_DIVERGENCE = ("fail", "report")
_WHOLE_NUMBERS = {"max_epochs": -1, "min_epochs": 0, "max_steps": -1, "min_steps": 0, "accumulate_grad_batches": 1,
                  "log_every_n_steps": 0, "num_sanity_val_steps": -1,
                  "reload_dataloaders_every_n_epochs": 0}  # fmt: skip
_SWITCHES = ("overwrite", "report", "plot")
_TRAINERS_SWITCHES = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "benchmark",
                      "inference_mode", "use_distributed_sampler", "detect_anomaly", "barebones",
                      "sync_batchnorm")  # fmt: skip


def check_launch(config: DictConfig, trainer: L.Trainer) -> None:
    """Refuses, before any process starts, what would train something else than was asked for."""
    settings = HydraConfig.get()
    if config.strategy._target_ == "builtins.str" and trainer.world_size > 1:
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


def check_settings(config: DictConfig) -> None:
    """Refuse values of this command's own keys, switches and places that are none."""
    for key, value in (("seed", config.seed), ("data.seed", config.data.get("seed", 0))):
        if not _is_whole(value, 0, 2**32 - 1):
            raise UsageError(f"{_COMMAND}({key}={value}): give a whole number from 0 to {2**32 - 1}")
    for key in ("paths.run", "ckpt_path"):
        value = OmegaConf.select(config, key)
        if not isinstance(value, str) and (key, value) != ("ckpt_path", None):
            raise UsageError(f"{_COMMAND}({key}={'null' if value is None else value}): give a path, as ./NAME")
    for key in (*_SWITCHES, *(f"trainer.{key}" for key in _TRAINERS_SWITCHES)):
        value = OmegaConf.select(config, key)
        if not isinstance(value, bool) and (key in _SWITCHES or value is not None):
            raise UsageError(f"{_COMMAND}({key}={value}): give true or false")
    if config.on_divergence not in _ON_DIVERGENCE:
        raise UsageError(
            f"{_COMMAND}(on_divergence={config.on_divergence}): unknown; choose one of: {', '.join(_ON_DIVERGENCE)}"
        )
    for group in ("callbacks", "logger"):
        for name, value in config[group].items():
            if value is not None and not isinstance(value, DictConfig):
                raise UsageError(
                    f"{_COMMAND}({group}.{name}={value}): give null to leave it out, or set one of its keys, as"
                    f" {group}.{name}.KEY"
                )


def check_numbers(config: DictConfig) -> None:
    """Refuse values of the trainer and the strategy that would fail late, without saying what they are of."""
    for key, least in _WHOLE_NUMBERS.items():
        value = config.trainer[key]
        if value is not None and not _is_whole(value, least):
            raise UsageError(f"{_COMMAND}(trainer.{key}={value}): give a whole number from {least} on, or leave it out")
    interval = config.trainer.val_check_interval
    if isinstance(interval, int | float) and not interval > 0:
        raise UsageError(
            f"{_COMMAND}(trainer.val_check_interval={interval}): give a number of batches from 1 on, or a share of the"
            " epoch up to 1.0"
        )
    backend = config.strategy.get("process_group_backend")
    known = torch.distributed.Backend.backend_list if torch.distributed.is_available() else []
    if backend is not None and not {each.rpartition(":")[2] for each in str(backend).split(",")} <= set(known):
        raise UsageError(
            f"{_COMMAND}(strategy.process_group_backend={backend}): there is no such backend; choose one of:"
            f" {', '.join(each for each in known if each != 'undefined')}, or leave it out"
        )


def _is_whole(value: object, least: int, most: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_optimizer(config: DictConfig, strategy: object) -> torch.optim.Optimizer:
    """Build the optimizer on a stand-in for the model: what is wrong with it shows before any process starts."""
    try:
        optimizer: torch.optim.Optimizer = instantiate(config.optimizer)([torch.nn.Parameter(torch.zeros(1))])
        if isinstance(strategy, TrainerStrategy) and strategy.has_center:
            strategy.prepare_optimizer(optimizer)
    except InstantiationException:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(_of_the_optimizer(config, error)) from error
    if config.get("scheduler"):
        steps = config.scheduler.get("T_max", 1)  # it follows trainer.max_epochs or max_steps, of which -1 is no limit
        if isinstance(steps, int) and steps < 1:
            raise UsageError(
                f"{_COMMAND}(scheduler.T_max={steps}): a schedule needs its length; set trainer.max_epochs or"
                " trainer.max_steps, which it follows, or correct this value"
            )
        try:
            scheduler = instantiate(config.scheduler)(optimizer)
            optimizer.step()
            scheduler.step()
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UsageError(naming_the_key(_COMMAND, "scheduler", error)) from error
    return optimizer


def _of_the_optimizer(config: DictConfig, error: Exception) -> str:
    if "Strategy(" in str(error):  # what the strategy says of the optimizer
        return f"{_COMMAND}(optimizer={config.optimizer._target_}): {error}"
    return naming_the_key(_COMMAND, "optimizer", error)


def check_data(model: L.LightningModule, datamodule: object) -> None:
    """Compare the model with the data, and look for the data's files, before any process starts."""
    if isinstance(model, Classifier):
        try:
            model.check_data(datamodule)
        except ValueError as error:
            raise UsageError(f"{_COMMAND}: {error}") from error
    if isinstance(datamodule, SplitDataModule):
        datamodule.check_files()
