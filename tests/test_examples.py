"""The examples run as their docstrings say, and do what they claim."""

import os
import re

import pytest
from application import ROOT, run_process
from preloaded import python

pytestmark = pytest.mark.timeout(120)


def output(script, *arguments):
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    command = [python(), str(ROOT / "examples" / script), *arguments]
    environment = clean | {"OMP_NUM_THREADS": "1"}
    done = run_process(command, env=environment, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gan():
    found = re.search(r"from the ring: (\d\.\d\d) before, (\d\.\d\d) after training\n(\d+) exchanges", output("gan.py"))
    assert found is not None
    before, after, exchanges = map(float, found.groups())
    assert after < 0.3 < before
    assert exchanges == 79 + 39  # 800 steps of the discriminator, 400 of the generator, tau = 10


def test_an_existing_project_switches_by_one_line():
    """With ddp and easgd it is among the documentation's commands."""
    found = re.search(
        r"easgd_async: test accuracy (\d\d\.\d)%", output("existing_project.py", "--strategy", "easgd_async")
    )
    assert found is not None
    assert float(found[1]) > 90
