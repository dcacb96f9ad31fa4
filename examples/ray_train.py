"""Elastic averaging under Ray Train: four of its workers, of which two and two are one worker of EASGD.

    pip install 'lightning_easgd[ray]'
    python examples/ray_train.py

Ray starts the processes and makes their process group; ``RayLightningEnvironment`` tells Lightning its ranks. The
Trainer gets the devices of a node and the number of nodes, as everywhere, and any of this package's strategies.
"""

import tempfile
from pathlib import Path

import lightning as L
import ray
import torch
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.lightning import RayLightningEnvironment
from ray.train.torch import TorchTrainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easgd import EASGDStrategy


class Digits(L.LightningModule):
    """A two-layer perceptron on 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """The share of right answers at the center."""
        images, labels = batch
        right = (self.net(images).argmax(dim=1) == labels).float().mean()
        self.log("val/accuracy", right, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of each worker."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(config: dict[str, str]) -> None:
    """Be one of Ray's workers; the first writes down what has become of it."""
    L.seed_everything(0, verbose=False)
    digits = load_digits()
    data = TensorDataset(torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target))
    training, validation = torch.utils.data.random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    devices = get_context().get_local_world_size()
    trainer = L.Trainer(
        strategy=EASGDStrategy(devices_per_worker=2, tau=8),
        plugins=[RayLightningEnvironment()],
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=devices,
        num_nodes=get_context().get_world_size() // devices,
        max_epochs=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), DataLoader(training, batch_size=16, shuffle=True), DataLoader(validation, batch_size=128))
    if trainer.is_global_zero:
        accuracy = trainer.callback_metrics["val/accuracy"]
        text = f"accuracy at the center of {trainer.strategy.workers} workers: {accuracy:.1%}"
        Path(config["folder"], "result.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Run on this machine; on a cluster leave out the logical CPUs, and set the workers' GPUs."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        scaling = ScalingConfig(num_workers=4, use_gpu=False)
        run = RunConfig(storage_path=folder)
        TorchTrainer(train, train_loop_config={"folder": folder}, scaling_config=scaling, run_config=run).fit()
        print(Path(folder, "result.txt").read_text(encoding="utf-8"))
    ray.shutdown()


if __name__ == "__main__":
    main()
