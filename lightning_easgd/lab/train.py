"""`easgd-train`: one training run, described by the configuration `lightning_easgd.conf`."""

import logging
import math
import os
import platform
import secrets
import sys
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

import lightning_easgd
from lightning_easgd.lab import plots, rank_errors, report, resume
from lightning_easgd.lab.building import build_model, build_trainer
from lightning_easgd.lab.checks import check_data, check_launch, check_numbers, check_optimizer, check_settings
from lightning_easgd.lab.command_errors import (
    ReportedError,
    UsageError,
    before_training,
    run_command,
    shows_tracebacks,
    usage_errors,
)
from lightning_easgd.lab.configuration import SEARCH_PATH
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.run_directory import VERSIONS_FILE, check_free, check_places, clear, saved_run, take_over

_COMMAND = "easgd-train"
_CONFIGURATION = "train"
CONFIG_FILE = report.CONFIG_FILE
_PACKAGES = ("lightning", "torch", "torchmetrics", "hydra-core", "numpy")
_diverged: list[str] = []  # runs of this process, and how


def main() -> None:
    """Run the command."""
    _diverged.clear()
    run_command(_COMMAND, _run)
    if _diverged:
        sys.exit(f"{_COMMAND}: diverged: {'; '.join(_diverged)}; lower optimizer.lr, or set on_divergence=report")


def _run() -> None:
    name = resume.configuration(sys.argv[1:], _CONFIGURATION)
    hydra.main(config_path=SEARCH_PATH, config_name=name, version_base="1.3")(_hydra_main)()


def launch_name() -> str:
    """Name a launch of a command, so that two of them in the same second have different run directories.

    Ranks that torchrun or SLURM has started compose their configurations each on their own; what they have in common
    is the process that started them.
    """
    launched_with_others = not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"}.isdisjoint(os.environ)
    return str(os.getppid()) if launched_with_others else secrets.token_hex(2)


_LOSSES = ("val/loss", "train/loss")


# Cached: Hydra asks several times for the directory of one run.
OmegaConf.register_new_resolver("easgd_launch", launch_name, use_cache=True, replace=True)


def _hydra_main(config: DictConfig) -> float | None:
    with usage_errors(_COMMAND):
        try:
            return train(config)
        except ReportedError:
            if HydraConfig.get().mode == RunMode.MULTIRUN or shows_tracebacks():
                raise
            sys.exit(1)


def train(config: DictConfig) -> float | None:
    """Train as the configuration says.

    Returns:
        The last validation accuracy at the center, for Hydra's sweepers; None on other ranks than 0 and when
        the run did not measure it.

    Raises:
        ReportedError: If the training has failed.
    """
    quiet()
    with before_training(_COMMAND):
        check_settings(config)
        check_numbers(config)
        run = Path(config.paths.run)
        checkpoint = None if config.ckpt_path is None else Path(config.ckpt_path)
        L.seed_everything(config.seed, workers=True, verbose=False)
        trainer = build_trainer(config)
        is_first = trainer.is_global_zero
        if is_first:
            in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
            check_free(_COMMAND, run, overwrite=config.overwrite, resumed=checkpoint, in_sweep=in_sweep)
            check_places(_COMMAND, config, checkpoint)
        check_launch(config, trainer)
        optimizer = check_optimizer(config, trainer.strategy)
        datamodule = instantiate(config.data)
        model = build_model(config)
        check_data(model, datamodule)
        state: dict[str, Any] = {}
        if checkpoint is not None and is_first:
            state = resume.read_checkpoint(_COMMAND, checkpoint)
            resume.check_resume(_COMMAND, checkpoint, state, config, trainer, model, optimizer)
        trainer.callbacks.append(_LogSettings(config))  # type: ignore[attr-defined]
        if checkpoint is not None:
            trainer.callbacks.insert(0, _changed_settings(config, checkpoint))  # type: ignore[attr-defined]
    if is_first:
        try:
            _begin(config, run, checkpoint, state.get("global_step", 0))
        except OSError as error:
            raise UsageError(
                f"{_COMMAND}(paths.run={run}): nothing can be written there ({error.strerror}); choose another"
                " directory"
            ) from error
    del state
    try:
        rank_errors.fit(trainer, run, _COMMAND, quiet, model=model, datamodule=datamodule, ckpt_path=config.ckpt_path)
    except ReportedError:
        if not rank_errors.is_divergence(run):
            raise
        if trainer.is_global_zero:
            print(report.render(run, "the weights are not finite"))
        if config.on_divergence == "fail":
            raise
        return None
    return _conclude(config, run, trainer, model) if trainer.is_global_zero else None


def _changed_settings(config: DictConfig, checkpoint: Path) -> resume.ChangedSettings:
    words = HydraConfig.get().overrides.task
    optimizer, scheduler, strategy = (
        resume.changed_settings(group, config, checkpoint, words) for group in ("optimizer", "scheduler", "strategy")
    )
    if config.strategy._target_.endswith("EASGDStrategy") and "momentum" in strategy:
        own = {key: config.optimizer[key] for key in ("momentum", "nesterov")}
        optimizer |= own if strategy["momentum"] is None else {"momentum": strategy["momentum"], "nesterov": True}
    return resume.ChangedSettings(optimizer, scheduler)


class _LogSettings(L.Callback):
    """Gives the run's settings to the loggers, in the process that writes them."""

    def __init__(self, config: DictConfig) -> None:
        places = (str(config.paths.run), str(config.paths.data))  # of this machine, and not of the run
        self._settings = {key: value for key, value in _flat(config).items() if not str(value).startswith(places)}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        for logger in trainer.loggers:
            logger.log_hyperparams(self._settings)


def _flat(config: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that are values, by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | DictConfig):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _begin(config: DictConfig, run: Path, checkpoint: Path | None, step: int) -> None:
    """Take the run's directory, and write what the run is made from: configuration and versions."""
    saved = None if checkpoint is None else saved_run(checkpoint.absolute())
    if saved is None:
        clear(run)
    else:
        take_over(saved[0], run, step)
    # Another run may have begun here since the directory was found to be free.
    with (run / CONFIG_FILE).open("x", encoding="utf-8") as file:
        file.write(OmegaConf.to_yaml(_record(config)))
    lines = [*machine(), f"lightning_easgd {lightning_easgd.__version__}"]
    lines += [f"{package} {version(package)}" for package in _PACKAGES]
    (run / VERSIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _record(config: DictConfig) -> DictConfig:
    """What `--config-dir RUN --config-name config` runs again: where a run writes, and that it may, are not of it."""
    record: DictConfig = config.copy()
    with open_dict(record):
        record.paths.run = "${hydra:runtime.output_dir}"
        record.overwrite = False
    return OmegaConf.merge({"defaults": [{"optional hydra": _CONFIGURATION}, "_self_"]}, record)  # type: ignore[return-value]


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


def _conclude(config: DictConfig, run: Path, trainer: L.Trainer, model: L.LightningModule) -> float | None:
    """Print the table and draw the figure; neither can spoil a run that is done."""
    accuracy = report.last_accuracy(run, "val").get(report.CENTER)
    losses = [float(trainer.callback_metrics[key]) for key in _LOSSES if key in trainer.callback_metrics]
    loss = next((each for each in losses if not math.isfinite(each)), losses[0] if losses else None)
    diverged = report.divergence(loss, accuracy, getattr(model, "num_classes", None))
    if diverged and config.on_divergence == "fail":
        _diverged.append(f"{run}: {diverged}")
    if config.report:
        print(report.render(run, diverged))
    if config.plot:
        try:
            print(f"  figure: {plots.draw(run) or 'there is nothing to draw'}")
        except MissingExtraError as error:
            print(f"  no figure: {error}")
    print(f"  run directory: {run}")
    return accuracy


def quiet() -> None:
    """Silence what Lightning says about every run of this command and no user can act upon."""
    # Devices, ranks, and advertisements; of the class trees, the one that was imported last speaks for all.
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # whoever sets one wants its report
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it says it raises, too
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the other ranks
    for message in (
        # The shipped data sets are in memory, where loader processes only cost time.
        r".*does not have many workers which may be a bottleneck.*",
        r"The number of training batches .* is smaller than the logging interval.*",
        # The table says so.
        r"Encountered `nan` values in tensor.*",
        # Hydra has just made the run's directory, and the CSV logger finds Hydra's files in it.
        r"Experiment logs directory .* exists and is not empty.*",
        r"Checkpoint directory .* exists and is not empty.*",
        # Each run has a directory of its own, also one that resumes another.
        r"The dirpath has changed from .*",
        # A checkpoint that is only tested does not need the callbacks of its training.
        r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided.*",
        # Of debug=overfit, which asks for the same batches again and again.
        r"You requested to overfit but enabled train dataloader shuffling.*",
        # Lightning and the tested torch; nothing of ours.
        r"`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    main()
