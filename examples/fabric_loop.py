"""Elastic averaging in a training loop of one's own, with Fabric: two workers on the CPU learn handwritten digits.

    python examples/fabric_loop.py

Three lines of it belong to this package: the import, ``center_weights()`` around the evaluation, and ``finalize()``.
"""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_easgd  # noqa: F401  registers the name "easgd"


def loaders() -> tuple[DataLoader, DataLoader]:
    """Batches for training and validation; Fabric's sampler gives each worker its own part."""
    digits = load_digits()
    data = TensorDataset(torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target))
    training, validation = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    return DataLoader(training, batch_size=32, shuffle=True), DataLoader(validation, batch_size=256)


@torch.no_grad()
def accuracy(fabric: Fabric, model: nn.Module, batches: DataLoader) -> float:
    """The share of right answers over all ranks."""
    right = torch.zeros(2, device=fabric.device)
    for images, labels in batches:
        right += torch.tensor([(model(images).argmax(dim=1) == labels).sum(), len(labels)], device=fabric.device)
    total = fabric.all_reduce(right, reduce_op="sum")
    return float(total[0] / total[1])


def main() -> None:
    """Train, evaluating the center after every fifth epoch."""
    fabric = Fabric(strategy="easgd", accelerator="cpu", devices=2)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    training, validation = fabric.setup_dataloaders(*loaders())

    for epoch in range(1, 21):
        for images, labels in training:
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()  # the worker's step, and an exchange with the center if one is due
        if epoch % 5 == 0:
            with fabric.strategy.center_weights(model):  # all ranks enter it together
                fabric.print(f"epoch {epoch}: accuracy at the center {accuracy(fabric, model, validation):.1%}")

    fabric.strategy.finalize()  # all ranks meet, and are left with the center
    fabric.print(f"{fabric.strategy.communication.exchanges} exchanges")
    fabric.print(f"accuracy at the end: {accuracy(fabric, model, validation):.1%}")


if __name__ == "__main__":
    main()
