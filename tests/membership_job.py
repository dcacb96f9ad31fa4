"""A lighthouse and workers that come and go, each a process of its own."""

import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from preloaded import python

WORKER = Path(__file__).with_name("membership_worker.py")
HEARTBEAT = 1.0  # seconds after which the lighthouse takes a worker for dead
PATIENCE = 0.5  # seconds that a worker stands still for the others
TRANSFER = 2.0  # seconds of a transfer
SLACK = 1.0


def clean_environment():
    """The environment without what Lightning has written into it for a fit in this process."""
    written = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")
    return {name: value for name, value in os.environ.items() if name not in written}


class Job:
    """A lighthouse and workers; whatever happens, they end with it."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self._read = {}  # of each worker's lines: how far, and what they say
        self.port = "0"  # any that is free; once it is lit again, the one that it had
        self.light()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()  # a stopped one, too
        for process in self.processes:
            process.wait(20)
        for path in self.folder.glob("*.jsonl"):  # what torchrun has started outlives it
            for line in self.lines(path.stem):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(line.get("pid", 2**30), signal.SIGKILL)

    def light(self, least=1):
        self._until_dark()
        self.lighthouse = subprocess.Popen([python(), __file__, self.port, str(least)], stdout=subprocess.PIPE)
        self.processes.append(self.lighthouse)
        with self.lighthouse.stdout as said:
            self.port = said.readline().decode().strip().rpartition(":")[2]
        self.address = f"http://localhost:{self.port}"

    def _until_dark(self):
        """Returns when a lighthouse that has been killed is gone: what stands for its interpreter is gone before."""
        with contextlib.suppress(ConnectionRefusedError):
            while self.port != "0":
                socket.create_connection(("localhost", int(self.port)), timeout=5).close()
                time.sleep(0.01)

    def start(self, number, *launcher, **settings):
        tolerance = {"quorum_timeout": PATIENCE, "process_group_timeout": TRANSFER}
        settings = {"tolerance": tolerance, **settings}
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        with (self.folder / f"{number}.txt").open("w") as said:
            process = subprocess.Popen(
                [python(), *launcher, str(WORKER), str(self.folder), str(number), *given],
                env={**clean_environment(), "TORCHFT_LIGHTHOUSE": self.address},
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
        where, lines = self._read.get(path, (0, []))
        if path.exists():
            with path.open("rb") as file:
                file.seek(where)
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            lines += map(json.loads, whole.splitlines())
            self._read[path] = where + len(whole), lines
        return [*lines]

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

    def started_again(self, number, seconds=60):
        """When a worker has come to the others for the second time."""
        deadline = time.monotonic() + seconds
        while len(starts := [line["time"] for line in self.lines(number) if "pid" in line]) < 2:
            assert time.monotonic() < deadline, self.said(number)
            time.sleep(0.02)
        return starts[1]

    def waits_at_the_lighthouse(self, number, seconds=60):
        """Returns when a worker has asked for the others, who have not come."""
        deadline = time.monotonic() + seconds
        page = ""
        while f"{number:06d}" not in page:
            assert time.monotonic() < deadline, self.said(number)
            with urllib.request.urlopen(f"{self.address}/status", timeout=5) as answer:
                page = answer.read().decode()
            time.sleep(0.1)
        time.sleep(1)

    def signal(self, number, what):
        pid = [line["pid"] for line in self.lines(number) if "pid" in line][-1]
        os.kill(pid, what)
        return time.time()

    def check_centers(self, *numbers, since=0.0):
        """At every move of the center that two of them have both made it is bitwise the same."""
        seen = {}
        for number in numbers:
            for line in (each for each in self.steps(number) if each["time"] > since):
                seen.setdefault(line["version"], {}).setdefault(number, line["center"])
        common = [list(centers.values()) for centers in seen.values() if len(centers) > 1]
        assert len(common) >= 5
        assert all(len(set(centers)) == 1 for centers in common)

    def check_moves(self, *numbers, tau, beta, tolerance):
        """One element of the center has made the paper's move wherever all of them took part in time."""
        checked = 0
        lines = [self.steps(number) for number in numbers]
        first = [{}, {}]
        for of_worker, found in zip(lines, first, strict=True):
            for line in of_worker:
                found.setdefault(line["version"], line)
        for version in first[0].keys() & first[1].keys():
            after = [found[version] for found in first]
            begun = [line["clock"] - (tau - 1) for line in after]  # it is completed one step before the next one
            if any(clock % tau or line["living"] != [0, 1] for clock, line in zip(begun, after, strict=True)):
                continue
            before = [[e for e in each if e["clock"] == clock] for each, clock in zip(lines, begun, strict=True)]
            if any(len(found) != 1 or found[0]["version"] != version - 1 for found in before):
                continue  # a worker that was started again has two steps of one clock
            start = [each[each.index(found[0]) - 1] for each, found in zip(lines, before, strict=True)]
            if any(line["missed"] != late["missed"] for line, late in zip(start, after, strict=True)):
                continue  # it has begun some steps late
            old = before[0][0]["center_weight"]
            moved = old + beta / 2 * sum(found[0]["weight"] - old for found in before)
            assert abs(after[0]["center_weight"] - moved) <= tolerance
            checked += abs(moved - old) > 10 * tolerance
        assert checked >= 5

    def stood_still(self, number, since, until):
        """The longest time between two of its steps, beyond what a slow machine takes."""
        times = [line["time"] for line in self.steps(number) if since - 0.2 <= line["time"] <= until]
        return max(b - a for a, b in itertools.pairwise(times)) - self.slowness(number)

    def slowness(self, number):
        """The time of ten ordinary steps of a worker: an eighth of a second where nothing else runs."""
        times = [line["time"] for line in self.steps(number)]
        return 10 * statistics.median(b - a for a, b in itertools.pairwise(times))


def are(*numbers):
    """Whether these are who took part in a worker's last exchange."""
    return lambda line: line["living"] == list(numbers)


if __name__ == "__main__":  # the lighthouse
    from torchft.coordination import LighthouseServer

    port, least = sys.argv[1:]
    server = LighthouseServer(
        bind=f"[::]:{port}",
        min_replicas=int(least),
        join_timeout_ms=2000,
        heartbeat_timeout_ms=int(HEARTBEAT * 1000),
    )
    print(server.address(), flush=True)
    time.sleep(600)
