"""Workers that are killed, frozen, started again and late: real processes, and a real lighthouse."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preloaded import python

pytestmark = pytest.mark.timeout(170)
pytest.importorskip("torchft")

WORKER = Path(__file__).with_name("membership_worker.py")
HEARTBEAT = 1.0  # seconds after which the lighthouse takes a worker for dead
PATIENCE = 0.5  # seconds that a worker stands still for the others
TRANSFER = 2.0  # seconds of a transfer
SLACK = 1.0
_LIGHTHOUSE = f"""
import sys, time
from torchft.coordination import LighthouseServer
server = LighthouseServer(
    bind="[::]:" + sys.argv[1], min_replicas=1, join_timeout_ms=2000, heartbeat_timeout_ms={HEARTBEAT * 1000:.0f}
)
print("up", flush=True)
time.sleep(600)
"""


class Job:
    """A lighthouse and workers; whatever happens, they end with it."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        with socket.socket() as free:
            free.bind(("", 0))
            self.port = free.getsockname()[1]
        self.light()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()  # a stopped one, too
        for process in self.processes:
            process.wait(20)

    def light(self):
        self.lighthouse = subprocess.Popen(
            [sys.executable, "-c", _LIGHTHOUSE, str(self.port)],
            stdout=subprocess.PIPE,
            env={**os.environ, "RUST_LOG": "error"},
        )
        self.processes.append(self.lighthouse)
        with self.lighthouse.stdout as said:
            assert said.readline() == b"up\n"

    def start(self, number, *launcher, **settings):
        tolerance = {"quorum_timeout": PATIENCE, "process_group_timeout": TRANSFER}
        settings = {"tolerance": tolerance, **settings}
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        with (self.folder / f"{number}.txt").open("w") as said:
            process = subprocess.Popen(
                [python(), *launcher, str(WORKER), str(self.folder), str(number), *given],
                env={**os.environ, "TORCHFT_LIGHTHOUSE": f"http://localhost:{self.port}"},
                stdout=said,
                stderr=said,
            )
        self.processes.append(process)
        return process

    def said(self, number):
        """What the last worker of this number has printed."""
        return (self.folder / f"{number}.txt").read_text()

    def lines(self, number):
        """All that a worker has written, also one that was there before under this number."""
        path = self.folder / f"{number}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def steps(self, number):
        return [line for line in self.lines(number) if "step" in line and "event" not in line]

    def until(self, number, holds, since=0.0, seconds=60):
        """The first step of a worker, after a point of time, of which something holds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.steps(number):
                if line["time"] > since and holds(line):
                    return line
            time.sleep(0.02)
        raise AssertionError(f"worker {number} has not come there: {self.lines(number)[-3:]}\n{self.said(number)}")

    def signal(self, number, what):
        pid = [line["pid"] for line in self.lines(number) if "pid" in line][-1]
        os.kill(pid, what)
        return time.time()

    def check_centers(self, *numbers):
        """At every move of the center that two of them have both made it is bitwise the same."""
        seen = {}
        for number in numbers:
            for line in self.steps(number):
                seen.setdefault(line["version"], {}).setdefault(number, line["center"])
        common = [list(centers.values()) for centers in seen.values() if len(centers) > 1]
        assert len(common) >= 5
        assert all(len(set(centers)) == 1 for centers in common)

    def stood_still(self, number, since, until):
        times = [line["time"] for line in self.steps(number) if since - 0.2 <= line["time"] <= until]
        return max(b - a for a, b in itertools.pairwise(times))


@pytest.fixture
def job(tmp_path):
    with Job(tmp_path) as job:
        yield job


def are(*numbers):
    return lambda line: line["living"] == list(numbers)


@pytest.mark.serial
def test_killed_started_again_late_and_frozen(job):
    job.start(0)
    one = job.start(1)
    job.until(0, are(0, 1))

    killed = job.signal(1, signal.SIGKILL)  # between exchanges, or in one
    one.wait(20)
    alone = job.until(0, are(0), since=killed)
    assert job.stood_still(0, killed, alone["time"]) <= HEARTBEAT + SLACK

    second = job.start(0)  # of the same number
    assert second.wait(60) != 0
    assert "a worker with replica_id=0 is alive already" in job.said(0)

    job.start(1)
    back = job.until(1, are(0, 1), since=alone["time"])
    others = job.until(0, lambda line: line["time"] >= back["time"])
    assert abs(back["clock"] - others["clock"]) <= 10
    assert back["epoch"] == back["clock"] // 40 or back["epoch"] == others["epoch"]
    assert back["lr"] == pytest.approx(0.05 * 0.99 ** (back["step"] // 10))
    came = [line for line in job.lines(1) if line.get("event") == "starts"][-1]["time"]
    assert back["time"] - came <= 2.0

    job.start(2)
    late = job.until(2, are(0, 1, 2))
    job.until(0, are(0, 1, 2))

    frozen = job.signal(1, signal.SIGSTOP)
    without = job.until(0, are(0, 2), since=frozen)
    assert job.stood_still(0, frozen, without["time"]) <= TRANSFER + SLACK
    assert job.stood_still(2, frozen, without["time"]) <= TRANSFER + SLACK
    thawed = job.signal(1, signal.SIGCONT)
    again = job.until(1, are(0, 1, 2), since=thawed)
    kept = [line for line in job.steps(1) if line["time"] < frozen + 0.1][-1]
    assert abs(again["weight"] - kept["weight"]) < 0.5  # it has kept where it is
    assert again["clock"] < kept["clock"] + 400

    job.until(0, lambda line: line["version"] > again["version"] + 3, since=again["time"])
    job.check_centers(0, 1, 2)
    for number in (0, late["living"][-1]):  # whoever lives makes each of its steps once
        clocks = [line["clock"] for line in job.steps(number)]
        assert clocks == list(range(clocks[0], clocks[0] + len(clocks)))


def test_killed_inside_of_an_exchange(job):
    job.start(0, steps=300)
    one = job.start(1, dies_in_exchange=8)
    assert one.wait(60) == -signal.SIGKILL
    lost = job.until(0, lambda line: line["failed"] == 1)
    alone = job.until(0, are(0), since=lost["time"])
    assert (lost["version"], alone["failed"]) == (8, 1)
    job.check_centers(0, 1)
    clocks = [line["clock"] for line in job.steps(0)]
    assert clocks == list(range(clocks[0], clocks[0] + len(clocks)))
    assert job.processes[1].wait(60) == 0
    assert job.lines(0)[-1]["step"] == 300


def test_a_lighthouse_that_is_away(job):
    workers = [job.start(0), job.start(1)]
    before = job.until(0, are(0, 1))
    job.lighthouse.kill()
    away = time.time()
    job.lighthouse.wait(20)
    meanwhile = job.until(0, lambda line: line["missed"] == 1, since=before["time"])
    on = job.until(0, lambda line: line["clock"] == meanwhile["clock"] + 30)
    assert on["version"] == meanwhile["version"]
    assert job.stood_still(0, away, on["time"]) <= PATIENCE + SLACK
    job.light()
    again = job.until(0, lambda line: line["version"] > on["version"] and line["living"] == [0, 1], since=on["time"])
    job.until(1, lambda line: line["version"] > again["version"] + 5, since=on["time"])
    job.check_centers(0, 1)
    assert all(worker.poll() is None for worker in workers)

    job.lighthouse.kill()  # a request that nobody answers does not hold up a worker's end
    asked = job.until(0, lambda line: line["missed"] > again["missed"], since=again["time"])
    assert asked["living"] == [0, 1]
    job.signal(0, signal.SIGTERM)
    assert workers[0].wait(30) == 0


def test_torchrun_starts_a_worker_again(job):
    job.start(0)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d")
    launcher = (*launcher, "--rdzv-endpoint=localhost:0", "--monitor-interval=0.1")
    job.start(1, *launcher, raises_at=25)
    first = job.until(1, are(0, 1))
    deadline = time.monotonic() + 60
    while len(starts := [line["time"] for line in job.lines(1) if "pid" in line]) < 2:
        assert time.monotonic() < deadline, job.said(1)
        time.sleep(0.02)
    again = job.until(1, are(0, 1), since=starts[1])
    assert again["clock"] > first["clock"]
    job.until(0, lambda line: line["version"] > again["version"], since=starts[1])
    job.check_centers(0, 1)


def test_the_first_saves_and_all_go_on(job):
    workers = [job.start(number, saves_at=60, steps=80) for number in (0, 1)]
    assert [worker.wait(100) for worker in workers] == [0, 0]
    assert [path.name for path in job.folder.glob("*.ckpt")] == ["of_0.ckpt"]
    end = time.time()
    path = str(job.folder / "of_0.ckpt")
    workers = [job.start(number, resumes=path, steps=100) for number in (0, 1, 2)]
    assert [worker.wait(100) for worker in workers] == [0, 0, 0]
    for number in (0, 1, 2):
        clocks = [line["clock"] for line in job.steps(number) if line["time"] > end]
        assert clocks[0] in range(61, 101)
        assert clocks[-1] == 100
    assert "saved by workers that come and go, of which this is number 0" in job.said(1)
