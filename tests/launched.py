"""A user's script: train with one of the names, or with workers that are nodes; write down what each process holds.

python launched.py NAME FOLDER [DEVICES] [NODES]

With FAILS_FIRST a rank of this number fails in torchrun's first attempt, when the ranks have exchanged.
"""

import os
import sys
from pathlib import Path

import torch
from toys import Regression, quiet_trainer

import lightning_easgd


class FailsFirst(Regression):
    """It is started again, and does not fail again."""

    def on_train_batch_start(self, batch, index):
        if index == 25 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            raise RuntimeError("as the test has it")


if __name__ == "__main__":
    torch.manual_seed(0)
    name, folder, *sizes = sys.argv[1:]
    devices, nodes = map(int, sizes or (2, 1))
    cls = FailsFirst if os.environ.get("FAILS_FIRST") == os.environ.get("RANK", "none") else Regression
    module = cls(batches=35)  # three exchanges
    strategy = lightning_easgd.EASGDStrategy(devices_per_worker="node") if name == "easgd_nodes" else name
    trainer = quiet_trainer(strategy=strategy, devices=devices, num_nodes=nodes)
    trainer.fit(module)
    workers = getattr(trainer.strategy, "workers", None)
    state = {"state": module.state_dict(), "workers": workers, "version": lightning_easgd.__version__}
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "parent")))
    torch.save(state, Path(folder, f"{rank}.pt"))
