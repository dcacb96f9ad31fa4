"""Every way to start the ranks, from a script as a user writes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.timeout(150)
SCRIPT = Path(__file__).with_name("launched.py")


def launch(command: list[str], **environment: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    subprocess.run(command, check=True, timeout=120, env=clean | {"OMP_NUM_THREADS": "1"} | environment)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file, weights_only=True)["state"] for file in sorted(folder.iterdir())]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The center that two ranks come to; the launcher cannot matter."""
    folder = tmp_path_factory.mktemp("fork")
    launch([sys.executable, str(SCRIPT), "easgd_fork", str(folder)])
    (state,) = states(folder)
    return state


@pytest.mark.parametrize("name", ["easgd_spawn", "easgd_notebook", "easgd_async_spawn"])
def test_the_parent_of_spawned_ranks_holds_the_center(name, reference, tmp_path):
    launch([sys.executable, str(SCRIPT), name, str(tmp_path)])
    (state,) = states(tmp_path)
    assert same(state, reference) == ("async" not in name)


def test_popen(reference, tmp_path):
    launch([sys.executable, str(SCRIPT), "easgd", str(tmp_path)])
    first, second = states(tmp_path)
    assert same(first, second)
    assert same(first, reference)


def test_torchrun(reference, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch([*torchrun, str(SCRIPT), "easgd", str(tmp_path)])
    first, second = states(tmp_path)
    assert same(first, second)
    assert same(first, reference)
