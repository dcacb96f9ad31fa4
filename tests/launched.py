"""A user's script: train with one of the names, and write down what each process holds in the end.

python launched.py NAME FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from toys import Regression, quiet_trainer

import lightning_easgd

if __name__ == "__main__":
    torch.manual_seed(0)
    name, folder = sys.argv[1:]
    module = Regression(batches=35)  # three exchanges
    trainer = quiet_trainer(strategy=name, devices=2)
    trainer.fit(module)
    state = {"state": module.state_dict(), "version": lightning_easgd.__version__}
    torch.save(state, Path(folder, f"{os.environ.get('LOCAL_RANK', 'parent')}.pt"))
