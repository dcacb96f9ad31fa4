"""Elastic averaging in an ordinary Lightning script: two workers on the CPU learn handwritten digits.

    python examples/quickstart.py

Two lines of it belong to this package: the import, and ``strategy="easgd"``.
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_easgd  # noqa: F401  registers the name "easgd"


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
        """The share of right answers; during ``fit`` the module holds the center here."""
        images, labels = batch
        right = (self.net(images).argmax(dim=1) == labels).float().mean()
        self.log("val/accuracy", right, batch_size=len(labels), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of each worker."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loaders() -> tuple[DataLoader, DataLoader]:
    """Batches for training and validation; Lightning's sampler gives each worker its own part."""
    digits = load_digits()
    images = torch.from_numpy(digits.data / 16).float()
    data = TensorDataset(images, torch.from_numpy(digits.target))
    training, validation = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(training, batch_size=32, shuffle=True), DataLoader(validation, batch_size=256)


def main() -> None:
    """Train, then look at what training has left."""
    L.seed_everything(0, verbose=False)
    model = Digits()
    trainer = L.Trainer(
        strategy="easgd", accelerator="cpu", devices=2, max_epochs=20, logger=False, enable_checkpointing=False
    )
    trainer.fit(model, *loaders())

    # The model now holds the center, on every rank.
    if trainer.is_global_zero:
        communication = trainer.strategy.communication
        print(f"accuracy at the center: {trainer.callback_metrics['val/accuracy']:.1%}")
        print(f"{communication.exchanges} exchanges in {trainer.global_step} steps")
        print(f"{communication.bytes_sent / 1e6:.2f} MB sent, {communication.seconds_waited:.2f} s waited")


if __name__ == "__main__":
    main()
