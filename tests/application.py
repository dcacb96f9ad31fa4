"""What the tests of the application share: a tiny model, a silent trainer, composed configurations, commands."""

import functools
import os
import platform
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import composing  # noqa: F401
import lightning as L
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from preloaded import python
from torch import nn

from lightning_easgd.lab.models import Classifier

platform.platform()  # starts a process, the first time: not within a test that is to start none
ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def tiny_classifier(**arguments) -> Classifier:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return Classifier(network, functools.partial(torch.optim.SGD, lr=0.1), **arguments)


def quiet_trainer(**arguments) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(defaults | arguments))


def composed(run: Path, *overrides: str, name: str = "train") -> DictConfig:
    """The configuration as the command sees it; a run in this process may follow."""
    with initialize_config_module("lightning_easgd.conf", version_base="1.3"):
        config = compose(name, [f"paths.run={run}", *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config["hydra"]
    return config


def command(module: str, *arguments: str, cwd: Path, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    """Runs a command of the package as a user does, in its own process, with `python()`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return run_process(
        [python(), "-m", f"lightning_easgd.{module}", *arguments], cwd=cwd, env=environment, timeout=timeout
    )


def run_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end.

    About one in a hundred runs with Lightning's own DDP on gloo aborts after it has done its work ("terminate called
    without an active exception", as a process exits); such a run counts as what it was until then. What gloo prints of
    its connections in torch 2.8 is left out.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if "[Gloo]" in done.stdout:  # in pieces, which those of another rank may come between
        theirs = re.compile(r".*(Gloo|is connected to|peer ranks).*|[\d ]*")
        done.stdout = "".join(line for line in done.stdout.splitlines(True) if not theirs.fullmatch(line.rstrip("\n")))
    if done.returncode == -signal.SIGABRT and "ddp" in " ".join(command):
        assert done.stderr.rstrip().endswith("terminate called without an active exception"), done.stderr
        done.returncode = 0
    return done


def only_run(cwd: Path) -> Path:
    (run,) = (cwd / "outputs").glob("*/*")
    return run
