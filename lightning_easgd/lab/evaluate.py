"""`easgd-evaluate ckpt_path=...`: test metrics of a checkpoint, at the center and at each worker, on one device."""

from collections.abc import Mapping
from dataclasses import dataclass
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
from lightning_easgd.lab.worker_weights import kept_workers, loaded_workers
from lightning_easgd.strategies.worker_state.keeper import KEY

_COMMAND = "easgd-evaluate"


def main() -> None:
    """Run the command."""
    run_command(_COMMAND, _hydra_main)


@hydra.main(config_path=SEARCH_PATH, config_name="evaluate", version_base="1.3")
def _hydra_main(config: DictConfig) -> None:
    overridden = {override.split("=")[0].split(".")[0] for override in HydraConfig.get().overrides.task}
    with usage_errors(_COMMAND):
        test = _prepare(config, keep=overridden)
        print(_table({"center" if KEY in test.checkpoint else "model": test.center(), **test.workers()}))
        if not kept_workers(test.checkpoint):
            print(
                "  No worker's own weights: the checkpoint keeps none. It was saved by a strategy without a center,"
                " with strategy.worker_state=none, or on an error."
            )


def evaluate(config: DictConfig, keep: set[str] | None = None) -> dict[str, float]:
    """Return the test metrics of a checkpoint, with the data and model of its run but for what of the two to `keep`."""
    return _prepare(config, keep).center()


@dataclass(frozen=True)
class _Test:
    path: Path
    checkpoint: dict[str, Any]
    model: L.LightningModule
    datamodule: L.LightningDataModule
    trainer: L.Trainer

    def center(self) -> dict[str, float]:
        """Test what the checkpoint's `state_dict` holds."""
        return self._metrics(str(self.path))

    def workers(self) -> dict[str, dict[str, float] | None]:
        """Test each worker's own weights; None of one whose weights cannot be read."""
        return {
            f"worker {worker}": self._metrics(None) if found else None
            for worker, found in loaded_workers(self.path, self.checkpoint, self.model)
        }

    def _metrics(self, path: str | None) -> dict[str, float]:
        (results,) = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, verbose=False)
        return {name: float(value) for name, value in results.items()}


def _table(scores: Mapping[str, dict[str, float] | None]) -> str:
    """A row for each weights, a column for each metric."""
    names = list(next(row for row in scores.values() if row is not None))
    width = max(map(len, scores))
    lines = [f"  {'weights':<{width}}  {'  '.join(names)}"]
    for weights, row in scores.items():
        cells = [f"{row[name]:>{len(name)}.4f}" for name in names] if row else ["cannot be read; see the warning"]
        lines.append(f"  {weights:<{width}}  {'  '.join(cells)}")
    return "\n".join(lines)


def _prepare(config: DictConfig, keep: set[str] | None = None) -> _Test:
    quiet()
    with before_training(_COMMAND):
        if not isinstance(config.progress_bar, bool):
            raise UsageError(f"{_COMMAND}(progress_bar={config.progress_bar}): give true or false")
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
    return _Test(path, checkpoint, model, datamodule, trainer)


def _checkpoint(config: DictConfig) -> tuple[Path, dict[str, Any]]:
    if config.ckpt_path is None:
        raise UsageError(
            f"{_COMMAND}(ckpt_path=null): there is nothing to evaluate; give ckpt_path=RUN/checkpoints/best.ckpt"
        )
    if not isinstance(config.ckpt_path, str):
        raise UsageError(f"{_COMMAND}(ckpt_path={config.ckpt_path}): give a path, as ./NAME")
    path = Path(config.ckpt_path)
    return path.absolute(), read_checkpoint(_COMMAND, path)


if __name__ == "__main__":
    main()
