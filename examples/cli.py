"""LightningCLI: the strategy and its arguments come from the command line or from a YAML file.

    python examples/cli.py fit --trainer.strategy lightning_easgd.EASGDStrategy --trainer.strategy.tau 16
    python examples/cli.py fit --trainer.strategy.class_path lightning_easgd.EASGDStrategy --print_config > run.yaml
    python examples/cli.py fit --config run.yaml
    python examples/cli.py fit --trainer.strategy.help lightning_easgd.EASGDStrategy

It needs ``pip install 'jsonargparse[signatures]<5'``. No line of it belongs to this package, but for the import: that
makes the short names work too (``--trainer.strategy easgd``), which take no arguments. A class without arguments is
given as ``class_path``, as LightningCLI takes ``--trainer.strategy`` alone for a name.
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_easgd  # noqa: F401  registers the name "easgd"


class Perceptron(L.LightningModule):
    """A two-layer perceptron on 8x8 images.

    Args:
        width: Number of hidden units.
        lr: Learning rate.
    """

    def __init__(self, width: int = 64, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of one batch."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        """The share of right answers, at the center."""
        images, labels = batch
        right = (self.net(images).argmax(dim=1) == labels).float().mean()
        self.log("val/accuracy", right, batch_size=len(labels), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of each worker."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Digits(L.LightningDataModule):
    """Scikit-learn's handwritten digits.

    Args:
        batch_size: Images in each worker's mini-batch.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        data = TensorDataset(torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target))
        self.training, self.validation = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        """Batches in random order."""
        return DataLoader(self.training, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """The rest of the images."""
        return DataLoader(self.validation, batch_size=256)


if __name__ == "__main__":
    LightningCLI(
        Perceptron,
        Digits,
        seed_everything_default=0,
        trainer_defaults={"accelerator": "cpu", "devices": 2, "max_epochs": 10},
    )
