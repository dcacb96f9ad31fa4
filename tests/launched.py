"""A user's script: train with one of the names, or with workers that are nodes; write down what each process holds.

python launched.py NAME FOLDER [DEVICES] [NODES]
"""

import os
import sys
from pathlib import Path

import torch
from toys import Regression, quiet_trainer

import lightning_easgd

if __name__ == "__main__":
    torch.manual_seed(0)
    name, folder, *sizes = sys.argv[1:]
    devices, nodes = map(int, sizes or (2, 1))
    module = Regression(batches=35)  # three exchanges
    strategy = lightning_easgd.EASGDStrategy(devices_per_worker="node") if name == "easgd_nodes" else name
    trainer = quiet_trainer(strategy=strategy, devices=devices, num_nodes=nodes)
    trainer.fit(module)
    workers = getattr(trainer.strategy, "workers", None)
    state = {"state": module.state_dict(), "workers": workers, "version": lightning_easgd.__version__}
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "parent")))
    torch.save(state, Path(folder, f"{rank}.pt"))
