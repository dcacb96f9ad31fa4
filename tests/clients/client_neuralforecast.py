"""neuralforecast: NHITS on the air passengers that it brings along, with its own loop and its own save.

It is of the class tree ``pytorch_lightning``. Its ``predict`` gives each rank of a distributed run a part of the
series, whatever the strategy, and is left out.
"""

import client
import numpy as np
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from neuralforecast.utils import AirPassengersPanel


def main() -> None:
    """Train, and report the library's own training losses, first and last."""
    strategy, folder = client.arguments()
    given = client.trainer_arguments(strategy)
    del given["max_epochs"]  # refused
    model = NHITS(
        h=12, input_size=24, learning_rate=1e-3, scaler_type="standard", random_seed=1, mlp_units=[[32, 32]] * 3,
        **given,
    )  # fmt: skip
    forecast = NeuralForecast(models=[model], freq="ME")
    forecast.fit(df=AirPassengersPanel[["unique_id", "ds", "y"]])
    model = forecast.models[0]
    losses = [loss for _, loss in model.train_trajectories]

    def save(path) -> None:
        forecast.save(str(path / "saved"), overwrite=True)
        loaded = NeuralForecast.load(str(path / "saved"))
        assert client.digest(loaded.models[0]) == client.digest(model)

    client.report(folder, float(np.mean(losses[:3])), float(np.mean(losses[-3:])), model, save)


if __name__ == "__main__":
    main()
