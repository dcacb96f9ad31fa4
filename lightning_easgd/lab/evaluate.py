"""`easgd-evaluate ckpt_path=...`: test metrics of a checkpoint, on one device."""

from pathlib import Path

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_easgd.lab.command_errors import UsageError, run_command, usage_errors
from lightning_easgd.lab.train import CONFIG_FILE, quiet

_COMMAND = "easgd-evaluate"


def main() -> None:
    """Run the command."""
    run_command(_COMMAND, _hydra_main)


@hydra.main(config_path="pkg://lightning_easgd.conf", config_name="evaluate", version_base="1.3")
def _hydra_main(config: DictConfig) -> None:
    overridden = {override.split("=")[0].split(".")[0] for override in HydraConfig.get().overrides.task}
    with usage_errors():
        metrics = evaluate(config, keep=overridden)
    width = max(len(name) for name in metrics)
    for name, value in metrics.items():
        print(f"  {name:<{width}}  {value:.4f}")


def evaluate(config: DictConfig, keep: set[str] | None = None) -> dict[str, float]:
    """Return the test metrics of a checkpoint, with the data and model of its run but for what of the two to `keep`."""
    checkpoint = _checkpoint(config)
    saved = saved_config(checkpoint)
    for name in ("data", "model"):
        if saved is not None and name not in (keep or set()):
            config[name] = saved[name]  # in place: a model of the command line is built for the saved data
    quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    # A checkpoint is tested, not trained: the optimizer is never built.
    model = instantiate(config.model, optimizer=torch.optim.SGD)
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
    results = trainer.test(model, datamodule=instantiate(config.data), ckpt_path=str(checkpoint), verbose=False)
    return {name: float(value) for name, value in results[0].items()}


def saved_config(checkpoint: Path) -> DictConfig | None:
    """Find the configuration of the run that wrote a checkpoint: in its folder or the one above."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / CONFIG_FILE).exists():
            config = OmegaConf.load(folder / CONFIG_FILE)
            if isinstance(config, DictConfig) and {"data", "model"} <= set(config):
                return config
    return None


def _checkpoint(config: DictConfig) -> Path:
    if config.ckpt_path is None:
        raise UsageError(
            f"{_COMMAND}(ckpt_path=null): there is nothing to evaluate; give ckpt_path=RUN/checkpoints/best.ckpt"
        )
    path = Path(config.ckpt_path).absolute()
    if not path.is_file():
        raise UsageError(f"{_COMMAND}(ckpt_path={config.ckpt_path}): there is no such file; check the path")
    return path


if __name__ == "__main__":
    main()
