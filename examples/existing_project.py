"""An ordinary Lightning project, and the one line that changes: which strategy its Trainer gets.

    python examples/existing_project.py --strategy ddp
    python examples/existing_project.py --strategy easgd

The LightningModule, the LightningDataModule and the callbacks know nothing of elastic averaging.
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_easgd  # noqa: F401  registers "easgd" and the other names


class DigitsData(L.LightningDataModule):
    """scikit-learn's 8x8 digits."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Split once, the same on every rank."""
        digits = load_digits()
        data = TensorDataset(torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target))
        self.training, self.held_out = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        """Batches for training."""
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Batches for validation."""
        return DataLoader(self.held_out, batch_size=256)

    test_dataloader = val_dataloader


class Classifier(L.LightningModule):
    """A small convolutional network with BatchNorm, Adam and a learning rate that falls on plateaus."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def evaluation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """Loss and accuracy of one batch."""
        images, labels = batch
        outputs = self.net(images)
        self.log("loss", nn.functional.cross_entropy(outputs, labels), sync_dist=True)
        self.log("accuracy", (outputs.argmax(dim=1) == labels).float().mean(), sync_dist=True)

    validation_step = test_step = evaluation_step

    def configure_optimizers(self) -> dict:
        """Adam, and a scheduler that watches the validation loss."""
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


def main() -> None:
    """Train with the strategy named on the command line, and test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", default="easgd", help="ddp, easgd, easgd_async, ...")
    arguments = parser.parse_args()

    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        strategy=arguments.strategy,  # the line that changes
        accelerator="cpu",
        devices=2,
        max_epochs=10,
        gradient_clip_val=1.0,
        callbacks=[EarlyStopping("loss", patience=4)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model, data = Classifier(), DigitsData()
    trainer.fit(model, datamodule=data)
    (result,) = trainer.test(model, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        print(f"{arguments.strategy}: test accuracy {result['accuracy']:.1%} after {trainer.current_epoch} epochs")


if __name__ == "__main__":
    main()
