"""The examples run as their docstrings say, and do what they claim."""

import os
import re
import subprocess

import pytest
from application import ROOT, run_process
from membership_job import Job, clean_environment
from preloaded import python
from ranks import free_port

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


def test_workers_on_preemptible_nodes(tmp_path):
    pytest.importorskip("torchft")
    with Job(tmp_path) as job:
        command = [python(), str(ROOT / "examples" / "preemptible.py"), str(tmp_path / "checkpoints"), "40"]
        for number in "01":
            place = {"TORCHFT_LIGHTHOUSE": job.address, "REPLICA_GROUP_ID": number, "OMP_NUM_THREADS": "1"}
            with (tmp_path / f"{number}.txt").open("w") as said:
                process = subprocess.Popen(command, env=clean_environment() | place, stdout=said, stderr=said)
            job.processes.append(process)
        codes = [worker.wait(100) for worker in job.processes[1:]]
        assert codes == [0, 0], job.said(0) + job.said(1)
    for number in (0, 1):
        line = rf"worker {number}: accuracy at the center (\d\d\.\d)%\nworkers in the last exchange: [12]"
        found = re.search(line, job.said(number))
        assert found is not None, job.said(number)
        assert float(found[1]) > 85
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_sharded_workers_on_two_nodes():
    """Two torchrun agents, as on two nodes of two devices."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    place = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    script = str(ROOT / "examples" / "sharded_transformer.py")
    nodes = [
        subprocess.Popen(
            [python(), "-m", "torch.distributed.run", *place, f"--node-rank={node}", script],
            env=clean | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=100)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    found = re.search(
        r"center of 2 workers: (\d+\.\d)%\n(\d+) exchanges in (\d+) steps\nrank 0 holds (\d+) of the center's (\d+)",
        outputs[0],
    )
    assert found is not None, outputs[0]
    accuracy, exchanges, steps, held, total = map(float, found.groups())
    assert accuracy > 80
    assert exchanges == (steps - 1) // 8
    assert held == pytest.approx(total / 2, rel=0.01)


@pytest.mark.timeout(300)
def test_ray():
    pytest.importorskip("ray")
    clean = {name: value for name, value in os.environ.items() if name not in ("MASTER_PORT", "LOCAL_RANK", "RANK")}
    settings = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    command = [python(), str(ROOT / "examples" / "ray_train.py")]
    done = subprocess.run(command, env=clean | settings, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"accuracy at the center of 2 workers: (\d+\.\d)%", done.stdout)
    assert found is not None
    assert float(found[1]) > 80
