"""To go on with a run: its settings from beside its checkpoint, and what of them a checkpoint does not let change."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.lab.command_errors import UsageError
from lightning_easgd.lab.configuration import GROUPS, option_file
from lightning_easgd.lab.recorders import IterateAverage
from lightning_easgd.lab.run_directory import saved_run
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy
from lightning_easgd.strategies.worker_state.keeper import KEY

__all__ = [
    "ChangedSettings", "changed_settings", "check_resume", "check_weights", "configuration", "read_checkpoint",
]  # fmt: skip

_RESUMED = "resumed_run"
_CHOOSES_CONFIGURATION = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")
_OVERRIDES = "override /"
_OF_A_RUN = ("method", "experiment")  # groups of which a saved configuration has no part of its own


# Settings


def configuration(words: Sequence[str], default: str) -> str:
    """Name the configuration of a command line: a saved one where it goes on from a checkpoint, else the default.

    The saved settings are the command's defaults then: overrides of values change them, and a group that is chosen
    anew takes the place of what was saved of it.

    Args:
        words: The command line, without the command.
        default: Name of the command's configuration.
    """
    overrides = _overrides(words)
    if sweep := [word for word in words if word.lstrip("+").startswith("ckpt_path=") and "ckpt_path" not in overrides]:
        raise UsageError(f"{sweep[0]}: runs that go on have settings of their own; give one checkpoint")
    path = overrides.get("ckpt_path")
    if not isinstance(path, str) or any(word.partition("=")[0] in _CHOOSES_CONFIGURATION for word in words):
        return default
    saved = saved_run(Path(path).absolute())
    own = option_file("", default)
    if saved is None or own is None:
        return default
    chosen = {key: option for key, option in overrides.items() if key in GROUPS and key != "hydra"}
    replaced = [*chosen, *(group for key, option in chosen.items() for group in _overridden_by(key, option))]
    defaults = {key: value for entry in own.defaults if isinstance(entry, DictConfig) for key, value in entry.items()}
    groups = [group for group in dict.fromkeys(replaced) if group not in _OF_A_RUN]
    values = {key: value for key, value in OmegaConf.to_container(own).items() if key != "defaults"}  # type: ignore[union-attr]
    values |= {
        key: value
        for key, value in OmegaConf.to_container(saved[1], resolve=False).items()  # type: ignore[union-attr]
        if key not in ("defaults", *groups)
    }
    values["defaults"] = [
        {"hydra": defaults["hydra"]},
        "_self_",
        *({group: defaults[group]} for group in groups),
        *({group: None} for group in _OF_A_RUN),
    ]
    ConfigStore.instance().store(name=_RESUMED, node=values)
    return _RESUMED


def _overrides(words: Sequence[str]) -> dict[str, Any]:
    """The values of a command line by key, without those of a sweep and those that cannot be read."""
    found: dict[str, Any] = {}
    for word in words:
        try:
            (each,) = OverridesParser.create().parse_overrides([word])
        except HydraException:
            continue
        if not each.is_sweep_override():
            found[each.key_or_group] = each.value()
    return found


def _overridden_by(group: str, option: Any) -> list[str]:
    """The groups that an option of another group chooses, as a method chooses its strategy."""
    file = option_file(group, str(option))
    entries = [] if file is None else [each for each in file.get("defaults", ()) if isinstance(each, DictConfig)]
    chosen = [str(key) for entry in entries for key in entry]
    return [key.removeprefix(_OVERRIDES) for key in chosen if key.startswith(_OVERRIDES)]


# The checkpoint


def read_checkpoint(command: str, path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        UsageError: If there is none, or it is not one of Lightning's.
    """
    if not path.is_file():
        raise UsageError(f"{command}(ckpt_path={path}): there is no such file; check the path")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # torch has one for every way in which a file can be wrong
        raise UsageError(
            f"{command}(ckpt_path={path}): this file cannot be read as a checkpoint ({type(error).__name__}); give"
            " another one"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UsageError(f"{command}(ckpt_path={path}): this is no checkpoint of Lightning's; give another one")
    return checkpoint


def check_weights(
    command: str, path: Path, checkpoint: Mapping[str, Any], model: L.LightningModule, changed: Sequence[str] = ()
) -> None:
    """Compare a checkpoint's weights with the model that they are for.

    Args:
        command: The command's name, for errors.
        path: The checkpoint.
        checkpoint: What it holds.
        model: The model.
        changed: Settings of the model that are known to be others than those of the checkpoint's run.

    Raises:
        UsageError: If names or shapes differ.
    """
    own, saved = model.state_dict(), checkpoint["state_dict"]
    for name in [*saved, *own]:
        there, here = (tuple(each[name].shape) if name in each else None for each in (saved, own))
        if there != here:
            shapes = [str(list(shape)) if shape is not None else "absent" for shape in (there, here)]
            what = ", ".join(changed) or f"ckpt_path={path}"
            raise UsageError(
                f"{command}({what}): the weights in {path} are of another model: {name} is {shapes[0]} there and"
                f" {shapes[1]} here; leave model and data as they were in its run"
            )


def check_resume(
    command: str,
    path: Path,
    checkpoint: Mapping[str, Any],
    config: DictConfig,
    trainer: L.Trainer,
    model: L.LightningModule,
    optimizer: Optimizer,
) -> None:
    """Refuse, before any process starts, what a checkpoint cannot go on with.

    Args:
        command: The command's name, for errors.
        path: The checkpoint.
        checkpoint: What it holds.
        config: The settings to go on with.
        trainer: The trainer.
        model: The model.
        optimizer: One like that of the run.

    Raises:
        UsageError: If the run cannot go on like that.
    """
    place = f"{command}(ckpt_path={path})"
    if "optimizer_states" not in checkpoint or "loops" not in checkpoint:
        raise UsageError(f"{place}: it holds weights only, and no state of a training; give a checkpoint that has one")
    saved = saved_run(path.absolute())
    for key in ("model._target_", "model.network._target_", "optimizer._target_", "scheduler._target_"):
        there, here = (OmegaConf.select(each, key) for each in (saved[1] if saved else config, config))
        if there != here:
            raise UsageError(
                f"{command}({key.partition('.')[0]}={here}): the run of {path} has {there}, and its state is of no use"
                f" to another; leave {key.partition('.')[0]} out"
            )
    before = saved[1].model if saved else config.model
    changed = [f"model.{key}={here}" for key, here in _leaves(config.model) if OmegaConf.select(before, key) != here]
    check_weights(command, path, checkpoint, model, changed)
    kind, group = type(optimizer).__name__, optimizer.param_groups[0]
    for state in checkpoint["optimizer_states"]:
        if different := sorted((state["param_groups"][0].keys() ^ group.keys()) - {"initial_lr", "params"}):
            raise UsageError(
                f"{command}(optimizer={kind}): the optimizer in {path} is another kind, its settings differ in"
                f" {', '.join(different)}; choose the optimizer of its run"
            )
    _check_method(command, path, checkpoint, trainer)
    _check_end(place, checkpoint, trainer)


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in map(str, node):
        value = node[key]
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_method(command: str, path: Path, checkpoint: Mapping[str, Any], trainer: L.Trainer) -> None:
    strategy, saved = trainer.strategy, checkpoint.get(KEY)
    if isinstance(strategy, TrainerStrategy) and saved is not None and saved["method"] != strategy.method:
        raise UsageError(
            f"{command}(strategy={type(strategy).__name__}): the workers of {path} trained by {saved['method']}, these"
            f" by {strategy.method}; choose the strategy of its run"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, IterateAverage) and callback.state_key not in checkpoint.get("callbacks", {}):
            raise UsageError(
                f"{command}(callbacks.iterate_average): {path} holds no average of the iterates; choose the method of"
                " its run"
            )


def _check_end(place: str, checkpoint: Mapping[str, Any], trainer: L.Trainer) -> None:
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    steps = checkpoint["global_step"]
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        raise UsageError(
            f"{place}: its run has done {epochs} epochs, and trainer.max_epochs={trainer.max_epochs}; give more, as"
            f" trainer.max_epochs={2 * epochs}"
        )
    if 0 <= trainer.max_steps <= steps:
        raise UsageError(
            f"{place}: its run has done {steps} steps, and trainer.max_steps={trainer.max_steps}; give more, as"
            f" trainer.max_steps={2 * steps}"
        )


# Settings that checkpoints hold, too


def changed_settings(group: str, config: DictConfig, path: Path, words: Sequence[str]) -> dict[str, Any]:
    """What of a group is other than in the run of a checkpoint; without a saved configuration, what is overridden.

    Args:
        group: The configuration group.
        config: The settings to go on with.
        path: The checkpoint.
        words: The overrides of the command line.
    """
    saved = saved_run(path.absolute())
    now = _plain(config, group)
    if saved is None:
        named = _overrides(words)
        return {key: value for key, value in now.items() if f"{group}.{key}" in named}
    before = _plain(saved[1], group)
    return {key: value for key, value in now.items() if not key.startswith("_") and before.get(key) != value}


def _plain(config: DictConfig, group: str) -> dict[str, Any]:
    node = OmegaConf.select(config, group)
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else {}
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


class ChangedSettings(L.Callback):
    """Lets settings of optimizers and schedulers count that a checkpoint has just overwritten.

    Args:
        optimizer: Settings of the optimizers, by name. A learning rate that a scheduler has changed keeps its ratio to
            the initial one.
        scheduler: Attributes of the schedulers.
    """

    def __init__(self, optimizer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
        self._optimizer, self._scheduler = dict(optimizer), dict(scheduler)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set them; optimizers and schedulers have their states by now."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for key, value in self._optimizer.items():
                    if key == "lr" and "initial_lr" in group:
                        group["lr"] *= value / group["initial_lr"]
                        group["initial_lr"] = value
                    elif key in group:
                        group[key] = value
        for each in trainer.lr_scheduler_configs:
            for key, value in self._scheduler.items():
                setattr(each.scheduler, key, value)
            if hasattr(each.scheduler, "base_lrs"):
                each.scheduler.base_lrs = [group["initial_lr"] for group in each.scheduler.optimizer.param_groups]
