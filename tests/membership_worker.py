"""One worker of those that come and go, as a user starts it: python membership_worker.py FOLDER NUMBER [key=value ...]

It writes a line of JSON for each of its steps into FOLDER/NUMBER.jsonl, and at the end "end" into it.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import lightning as L
import torch
from toys import quiet_trainer

from lightning_easgd import EASGDStrategy, FaultTolerance


class Paced(L.LightningModule):
    """A line fitted to noise, in steps of a given length; every worker has its own data."""

    def __init__(self, settings, path):
        super().__init__()
        self.settings, self.path = settings, path
        self.net = torch.nn.Linear(50, 2)

    def training_step(self, batch, index):
        time.sleep(self.settings["pace"])
        generator = torch.Generator().manual_seed(self.global_step * 97 + self.settings["number"])
        x = torch.randn(8, 50, generator=generator)
        return (self.net(x) - x[:, :2]).square().mean()

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(sgd, 100, gamma=0.9)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(self.settings["epoch"]), batch_size=1)

    def write(self, **row):
        with self.path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **row}) + "\n")

    def on_train_start(self):
        self.write(event="up", pid=os.getpid())

    def on_train_batch_end(self, *_):
        (averager,) = self.trainer.strategy._session.averagers
        members = self.trainer.strategy.elastic.membership
        self.write(
            step=self.global_step,
            clock=averager.clock,
            epoch=self.current_epoch,
            lr=self.optimizers().param_groups[0]["lr"],
            version=averager.center.version,
            center=hashlib.blake2b(averager.center.flat.numpy().tobytes(), digest_size=8).hexdigest(),
            norm=float(torch.cat([p.flatten() for p in self.parameters()]).norm()),
            living=members.living,
            missed=members.missed,
            failed=members.failed,
        )


if __name__ == "__main__":
    folder, number, *given = sys.argv[1:]
    settings = {
        "steps": 200,
        "pace": 0.01,
        "tau": 5,
        "epoch": 1000,
        "attempt": os.environ.get("TORCHELASTIC_RESTART_COUNT"),
    }
    settings |= {key: json.loads(value) for key, value in (each.split("=", 1) for each in given)}
    settings["number"] = int(number)
    torch.manual_seed(int(number))
    module = Paced(settings, Path(folder, f"{number}.jsonl"))
    strategy = EASGDStrategy(
        tau=settings["tau"],
        fault_tolerance=FaultTolerance(replica_id=int(number), **settings.get("tolerance", {})),
    )
    trainer = quiet_trainer(strategy=strategy, devices=1, max_epochs=-1, max_steps=settings["steps"])
    trainer.fit(module)
    module.write(event="end", step=trainer.global_step)
