"""chemprop: a message passing network learns the number of heavy atoms of small molecules."""

import client
import lightning.pytorch as pl
import numpy as np
import torch
from chemprop import data, featurizers, models
from chemprop import nn as parts


def molecules() -> data.MoleculeDataset:
    """Alcohols and ethers as chemprop's examples build a data set: SMILES and targets."""
    smiles = ["C" * left + "O" + "C" * right for left in range(1, 13) for right in range(8)]
    targets = np.array([[len(each) / 10 - 1] for each in smiles])
    points = [data.MoleculeDatapoint.from_smi(each, target) for each, target in zip(smiles, targets, strict=True)]
    return data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())


@torch.no_grad()
def loss(model: models.MPNN, loader: torch.utils.data.DataLoader) -> float:
    """The mean squared error over all molecules."""
    model.eval()
    losses = [(model(each.bmg, each.V_d, each.X_d) - each.Y).square().mean() for each in loader]
    model.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    """Train, and report."""
    strategy, folder = client.arguments()
    pl.seed_everything(0, verbose=False)
    dataset = molecules()
    loader = data.build_dataloader(dataset, batch_size=8, num_workers=0)
    whole = data.build_dataloader(dataset, batch_size=len(dataset), num_workers=0, shuffle=False)
    metrics = [parts.metrics.RMSE()]
    model = models.MPNN(
        parts.BondMessagePassing(d_h=32),
        parts.MeanAggregation(),
        parts.RegressionFFN(input_dim=32, hidden_dim=32),
        batch_norm=True,
        metrics=metrics,
        warmup_epochs=1,
    )
    before = loss(model, whole)
    pl.Trainer(**client.trainer_arguments(strategy)).fit(model, loader, whole)

    def save(path) -> None:
        models.save_model(path / "model.pt", model)
        assert client.digest(models.load_model(path / "model.pt")) == client.digest(model)

    client.report(folder, before, loss(model, whole), model, save)


if __name__ == "__main__":
    main()
