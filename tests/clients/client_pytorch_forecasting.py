"""pytorch-forecasting: a temporal fusion transformer on the autoregressive series that it generates."""

import client
import lightning.pytorch as pl
import torch
from pytorch_forecasting import QuantileLoss, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.examples import generate_ar_data


@torch.no_grad()
def loss(model: TemporalFusionTransformer, loader: torch.utils.data.DataLoader) -> float:
    """The quantile loss over some batches."""
    model.eval()
    losses = [model.loss(model(x)["prediction"], y) for (x, y), _ in zip(loader, range(8), strict=False)]
    model.train()
    return torch.stack(losses).mean().item()


def main() -> None:
    """Train, and report."""
    strategy, folder = client.arguments()
    pl.seed_everything(0, verbose=False)
    dataset = TimeSeriesDataSet(
        generate_ar_data(seasonality=10.0, timesteps=60, n_series=16, seed=1),
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        max_encoder_length=20,
        max_prediction_length=5,
        time_varying_known_reals=["time_idx"],
        time_varying_unknown_reals=["value"],
    )
    loader = dataset.to_dataloader(train=True, batch_size=32, num_workers=0)
    whole = dataset.to_dataloader(train=False, batch_size=64, num_workers=0)
    model = TemporalFusionTransformer.from_dataset(
        dataset, learning_rate=0.01, hidden_size=8, attention_head_size=1, hidden_continuous_size=4,
        output_size=7, loss=QuantileLoss(), log_interval=0, optimizer="adam",
    )  # fmt: skip
    before = loss(model, whole)
    trainer = pl.Trainer(**client.trainer_arguments(strategy), gradient_clip_val=0.1, limit_val_batches=2)
    trainer.fit(model, loader, whole)

    def save(path) -> None:
        torch.save(model.state_dict(), path / "model.pt")
        dataset.save(path / "dataset.pt")
        model.load_state_dict(torch.load(path / "model.pt"))

    client.report(folder, before, loss(model, whole), model, save)


if __name__ == "__main__":
    main()
