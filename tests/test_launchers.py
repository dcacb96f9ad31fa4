"""Every way to start the ranks, from a script as a user writes it.

Real interpreters with Lightning's Popen, with torchrun, at a prompt, and once where ranks are spawned; else the script
is forked, with everything imported.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from preloaded import python
from ranks import free_port

pytestmark = pytest.mark.timeout(150)
SCRIPT = Path(__file__).with_name("launched.py")


def launch(command: list[str], **environment: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    subprocess.run(command, check=True, timeout=120, env=clean | {"OMP_NUM_THREADS": "1"} | environment)


def launch_all(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    """Run one command on each node, or for each task; all must end well within the timeout."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    processes = [
        subprocess.Popen(command, env=clean | {"OMP_NUM_THREADS": "1"} | environment, start_new_session=True)
        for command, environment in zip(commands, environments, strict=True)
    ]
    deadline = time.monotonic() + 100
    try:
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:  # with what they have started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert codes == [0] * len(commands)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file, weights_only=True)["state"] for file in sorted(folder.iterdir())]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The center that two ranks come to; the launcher cannot matter."""
    folder = tmp_path_factory.mktemp("fork")
    launch([python(), str(SCRIPT), "easgd_fork", str(folder)])
    (state,) = states(folder)
    return state


@pytest.mark.parametrize("name", ["easgd_spawn", "easgd_notebook", "easgd_async_spawn"])
def test_the_parent_of_spawned_ranks_holds_the_center(name, reference, tmp_path):
    launch([sys.executable if name == "easgd_spawn" else python(), str(SCRIPT), name, str(tmp_path)])
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


@pytest.mark.parametrize("name", ["easgd", "easgd_async"])
def test_torchrun_starts_ranks_again(name, reference, tmp_path):
    """Its store is there still, with all that the ranks of before have written."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    launch([python(), *torchrun, str(SCRIPT), name, str(tmp_path)], FAILS_FIRST="1")
    first, second = states(tmp_path)
    assert same(first, second)
    assert same(first, reference) == (name == "easgd")


@pytest.mark.parametrize("name", ["easgd", "easgd_async"])
def test_slurm(name, reference, tmp_path):
    """Two tasks as srun starts them, each with its place in SLURM's variables."""
    shared = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environments = [shared | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    launch_all([[python(), str(SCRIPT), name, str(tmp_path)]] * 2, environments)
    first, second = states(tmp_path)
    assert same(first, second)
    assert same(first, reference) == (name == "easgd")


def test_slurm_with_workers_that_are_nodes(tmp_path):
    """Four tasks on two nodes of two."""
    shared = {
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_ID": "12345",
        "SLURM_JOB_NAME": "train",
        "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environments = [
        shared | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task // 2), "SLURM_LOCALID": str(task % 2)}
        for task in range(4)
    ]
    launch_all([[python(), str(SCRIPT), "easgd_nodes", str(tmp_path), "2", "2"]] * 4, environments)
    first, *others = states(tmp_path)
    assert len(others) == 3
    assert all(same(first, other) for other in others)
    assert {torch.load(file, weights_only=True)["workers"] for file in tmp_path.iterdir()} == {2}


@pytest.mark.parametrize("name", ["easgd", "easgd_async"])
def test_two_nodes(name, reference, tmp_path):
    """Two torchrun agents, which see each other over the loopback interface only."""
    torchrun = [python(), "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    place = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    script = [str(SCRIPT), name, str(tmp_path), "1", "2"]
    launch_all([[*torchrun, *place, f"--node-rank={node}", *script] for node in range(2)], [{}, {}])
    first, second = states(tmp_path)
    assert same(first, second)
    assert same(first, reference) == (name == "easgd")


@pytest.mark.parametrize("name", ["easgd", "easgd_async", "easgd_spawn", "downpour"])
def test_one_device(name, tmp_path):
    launch([python(), str(SCRIPT), name, str(tmp_path), "1", "1"])
    (state,) = states(tmp_path)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_an_interactive_interpreter(reference, tmp_path):
    """As in a notebook: Lightning takes an interpreter with a prompt for interactive. One trains after the other."""
    folders = {name: tmp_path / name for name in ("easgd_notebook", "easgd_fork")}
    lines = f"""
import sys
assert hasattr(sys, "ps1")
sys.path.insert(0, {str(SCRIPT.parent)!r})
"""
    for name, folder in folders.items():
        folder.mkdir()
        lines += f"sys.argv = ['', {name!r}, {str(folder)!r}]\nexec(open({str(SCRIPT)!r}).read())\n"
    command = [sys.executable, "-i", "-q"]
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    done = subprocess.run(
        command, input=lines, text=True, check=True, timeout=100, env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    for folder in folders.values():
        (state,) = states(folder)
        assert same(state, reference)


@pytest.mark.parametrize("method", ["popen", "spawn"])
def test_hydra(method, tmp_path):
    command = [python(), "-m", "lightning_easgd.lab.train", f"strategy.start_method={method}"]
    quick = ["trainer.devices=2", "trainer.max_epochs=1", "trainer.limit_train_batches=12", "plot=false"]
    run = tmp_path / "run"
    launch([*command, *quick, f"hydra.run.dir={run}", "callbacks.progress_bar.refresh_rate=0"])
    assert len(list(tmp_path.rglob("accuracy.csv"))) == 1
