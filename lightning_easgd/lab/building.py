"""What a training is made of, from its configuration."""

import inspect
from datetime import timedelta
from typing import Any

import hydra
import lightning as L
from hydra.utils import get_class, instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf

from lightning_easgd.lab.command_errors import (
    UsageError,
    naming_the_key,
)

__all__ = ["build_model", "build_strategy", "build_trainer"]

_COMMAND = "easgd-train"


def build_model(config: DictConfig) -> L.LightningModule:
    """Build the model with the optimizer and scheduler of their own groups."""
    scheduler = instantiate(config.scheduler) if config.get("scheduler") else None
    model: L.LightningModule = instantiate(config.model, optimizer=instantiate(config.optimizer), scheduler=scheduler)
    return model


def build_trainer(config: DictConfig) -> L.Trainer:
    """Build the trainer with strategy, callbacks and loggers."""
    loggers = [_build_logger(config.logger, name) for name in config.logger]
    callbacks = _build_callbacks(config)
    if not loggers and any(isinstance(callback, LearningRateMonitor) for callback in callbacks):
        raise UsageError(f"{_COMMAND}(logger=none): LearningRateMonitor writes to a logger; choose one, as logger=csv")
    trainer: L.Trainer = instantiate(
        config.trainer,
        strategy=build_strategy(config.strategy),
        callbacks=callbacks,
        logger=loggers or False,
    )
    return trainer


def build_strategy(config: DictConfig) -> Any:
    """Build the strategy.

    `tau` and `start_method` are left out where they mean nothing, so that a sweep may set them for all. A `timeout`
    that is a number, as it is written on a command line, means seconds.
    """
    try:
        initializer = inspect.getattr_static(get_class(config._target_), "__init__")
    except (ImportError, ValueError) as error:
        raise UsageError(naming_the_key(_COMMAND, "strategy", error)) from error
    left_out = {"tau", "start_method"} - set(inspect.signature(initializer).parameters)
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
    chosen = {
        str(name): callback
        for name, callback in config.callbacks.items()
        if callback and not str(name).startswith(switched_off)
    }
    if any(name.startswith("progress_bar_") for name in chosen):  # it takes the default's place
        del chosen["progress_bar"]
    return [instantiate(callback) for callback in chosen.values()]


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
