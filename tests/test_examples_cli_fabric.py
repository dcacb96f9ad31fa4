"""The examples with LightningCLI and Fabric, run as a user runs them."""

import os
import re
import subprocess

import pytest
from application import ROOT
from preloaded import python

pytestmark = pytest.mark.timeout(300)


def example(name: str, *arguments: str, cwd) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    done = subprocess.run(
        [python(), ROOT / "examples" / name, *arguments],
        cwd=cwd, env=clean | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=140, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_cli(tmp_path):
    strategy = ("--trainer.strategy.class_path", "lightning_easgd.EASGDStrategy")
    (tmp_path / "run.yaml").write_text(example("cli.py", "fit", *strategy, "--print_config", cwd=tmp_path))
    changes = ("--trainer.max_epochs", "2", "--trainer.strategy.init_args.tau", "16")
    example("cli.py", "fit", "--config", "run.yaml", *changes, cwd=tmp_path)
    (saved,) = tmp_path.glob("lightning_logs/version_0/config.yaml")
    assert "tau: 16" in saved.read_text()
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


def test_fabric_loop(tmp_path):
    out = example("fabric_loop.py", cwd=tmp_path)
    accuracies = [float(number) for number in re.findall(r"([\d.]+)%", out)]
    assert len(accuracies) == 5
    assert accuracies[-1] > 90
    assert accuracies[-1] == accuracies[-2]  # the module is left holding the center
    assert out.count("exchanges") == 1
