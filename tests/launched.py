"""A user's script: train with one of the names, and write down what each process holds in the end.

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
    trainer = quiet_trainer(strategy=name, devices=devices, num_nodes=nodes)
    trainer.fit(module)
    state = {"state": module.state_dict(), "version": lightning_easgd.__version__}
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "parent")))
    torch.save(state, Path(folder, f"{rank}.pt"))
