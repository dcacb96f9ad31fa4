"""The benchmark of data loading runs and prints its ratios."""

import subprocess

import pytest
from application import ROOT
from preloaded import python


@pytest.mark.timeout(120)
def test_it_prints_a_ratio_for_every_way():
    script = ROOT / "examples" / "benchmarks" / "data_loading.py"
    arguments = ["--images", "300", "--files", "4", "--rounds", "1"]
    done = subprocess.run([python(), script, *arguments], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images/s") == 2 * 4 + 2 * 3
    assert done.stdout.count("(1.00 to 1.00)") >= 4  # the first way of each table is what the others are compared to
