"""`easgd-evaluate ckpt_path=...`: test metrics of a checkpoint, on one device."""

from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_easgd.lab.command_errors import UsageError, before_training, run_command, usage_errors
from lightning_easgd.lab.configuration import SEARCH_PATH
from lightning_easgd.lab.data.images import SplitDataModule
from lightning_easgd.lab.resume import check_weights, read_checkpoint
from lightning_easgd.lab.run_directory import saved_run
from lightning_easgd.lab.train import quiet

_COMMAND = "easgd-evaluate"


def main() -> None:
    """Run the command."""
    run_command(_COMMAND, _hydra_main)


@hydra.main(config_path=SEARCH_PATH, config_name="evaluate", version_base="1.3")
def _hydra_main(config: DictConfig) -> None:
    overridden = {override.split("=")[0].split(".")[0] for override in HydraConfig.get().overrides.task}
    with usage_errors(_COMMAND):
        metrics = evaluate(config, keep=overridden)
    width = max(len(name) for name in metrics)
    for name, value in metrics.items():
        print(f"  {name:<{width}}  {value:.4f}")


def evaluate(config: DictConfig, keep: set[str] | None = None) -> dict[str, float]:
    """Return the test metrics of a checkpoint, with the data and model of its run but for what of the two to `keep`."""
    quiet()
    with before_training(_COMMAND):
        path, checkpoint = _checkpoint(config)
        saved = saved_run(path)
        for name in ("data", "model"):
            if saved is not None and name not in (keep or set()):
                # In place: a model of the command line is built for the saved data.
                config[name] = OmegaConf.to_container(saved[1][name], resolve=True)
        L.seed_everything(config.seed, workers=True, verbose=False)
        # A checkpoint is tested, not trained: the optimizer is never built.
        model = instantiate(config.model, optimizer=torch.optim.SGD)
        check_weights(_COMMAND, path, checkpoint, model)
        datamodule = instantiate(config.data)
        if isinstance(datamodule, SplitDataModule):
            datamodule.check_files()
        trainer = L.Trainer(
            accelerator=config.accelerator,
            devices=1,
            precision=config.precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=config.progress_bar,
            default_root_dir=config.paths.run,
        )
    results = trainer.test(model, datamodule=datamodule, ckpt_path=str(path), verbose=False)
    return {name: float(value) for name, value in results[0].items()}


def _checkpoint(config: DictConfig) -> tuple[Path, dict[str, Any]]:
    if config.ckpt_path is None:
        raise UsageError(
            f"{_COMMAND}(ckpt_path=null): there is nothing to evaluate; give ckpt_path=RUN/checkpoints/best.ckpt"
        )
    path = Path(config.ckpt_path)
    return path.absolute(), read_checkpoint(_COMMAND, path)


if __name__ == "__main__":
    main()
