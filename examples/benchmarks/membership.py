"""Workers that are killed, frozen, started again and added at random, beside the same job left in peace.

    python examples/benchmarks/run.py membership --steps 20000 --pace 0.025 --every 15      # about ten minutes a run

Three workers learn the digits. In the disturbed run one of them is killed (kill -9) and started again, frozen for some
seconds, or a fourth one comes and is killed, every so many seconds. Each job ends when its workers have made their
steps, and each seed is made in both ways: the test errors at the center, and what killed workers had made since their
last exchange, go into the table; throughput, the number of workers and the test error over time into the figure.
"""

import argparse
import csv
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from harness.command import parser
from harness.results import print_table, write_results
from sklearn.datasets import load_digits
from torch import nn

from lightning_easgd import EASGDStrategy, FaultTolerance
from lightning_easgd.lab.figure_style import blank_figure, save

WORKERS = 3
_COLUMNS = ("time", "step", "version", "workers", "error")
_LIGHTHOUSE = (
    "import sys, time; from torchft.coordination import LighthouseServer;"
    "server = LighthouseServer(bind='[::]:' + sys.argv[1], min_replicas=1, join_timeout_ms=5000);"
    "time.sleep(1e6)"
)


class Digits(L.LightningModule):
    """A perceptron that writes down each of its steps, and every hundred steps the test error at the center."""

    def __init__(self, file: Path, seed: int, pace: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.file, self.seed, self.pace = file, seed, pace
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        self.images = (torch.from_numpy(digits.data).float() / 16)[order]
        self.labels = torch.from_numpy(digits.target)[order]

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        """A batch of this worker's own, of four fifths of the images."""
        time.sleep(self.pace)
        chosen = torch.randint(1437, (32,), generator=torch.Generator().manual_seed(self.seed + self.global_step))
        return nn.functional.cross_entropy(self.net(self.images[chosen]), self.labels[chosen])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of each worker."""
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def train_dataloader(self) -> Any:
        """As many batches as are asked for."""
        return torch.utils.data.DataLoader(torch.zeros(10**6), batch_size=1)

    def on_train_batch_end(self, *_: Any) -> None:
        """Write a row."""
        strategy: Any = self.trainer.strategy
        center, members = strategy.known_center, strategy.elastic.membership
        error = ""
        if self.global_step % 100 == 0:
            with torch.no_grad():
                outputs = torch.func.functional_call(self, dict(center), self.images[1437:], strict=True)
            error = f"{(outputs.argmax(dim=1) != self.labels[1437:]).float().mean().item():.4f}"
        (averager,) = strategy._averagers
        row = (f"{time.time():.3f}", self.global_step, averager.center.version, len(members.living), error)
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The network's outputs."""
        return self.net(images)


def work(folder: str, number: str, seed: str, steps: str, pace: str) -> None:
    """One worker, as a process of its own."""
    L.seed_everything(int(seed), verbose=False)
    strategy = EASGDStrategy(tau=10, fault_tolerance=FaultTolerance(replica_id=int(number)))
    module = Digits(Path(folder, f"{number}.csv"), int(seed) * 10**8 + int(number) * 10**7, float(pace))
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=-1, max_steps=int(steps), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)


class Job:
    """A lighthouse and its workers.

    Attributes:
        events: When what was done to which worker.
        lost: Steps that killed workers had made since their last exchange.
    """

    def __init__(self, folder: Path, seed: int, options: argparse.Namespace) -> None:
        self._folder, self._arguments = folder, (str(seed), str(options.steps), str(options.pace))
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.csv"):
            old.unlink()
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        self._environment = {**os.environ, "TORCHFT_LIGHTHOUSE": f"http://localhost:{port}", "RUST_LOG": "error"}
        self._lighthouse = subprocess.Popen([sys.executable, "-c", _LIGHTHOUSE, port], env=self._environment)
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self.events: list[tuple[float, str, int]] = []
        self.lost: list[int] = []
        for number in range(WORKERS):
            self._start(number)

    def _start(self, number: int) -> None:
        command = [sys.executable, __file__, "--worker", str(self._folder), str(number), *self._arguments]
        with (self._folder / f"{number}.log").open("a", encoding="utf-8") as log:
            self._workers[number] = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def rows(self, number: int) -> list[list[float]]:
        """What a worker has written."""
        path = self._folder / f"{number}.csv"
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return [[float(value or "nan") for value in row] for row in csv.reader(file) if len(row) == len(_COLUMNS)]

    def disturb(self, chance: random.Random, *, seconds: float) -> None:
        """Do something to a worker that trains, and put it right some seconds later."""
        number = chance.choice([number for number in range(WORKERS) if self._workers[number].poll() is None])
        what = chance.choice(("killed", "frozen", "added"))
        if what == "added":
            number = WORKERS
            self._start(number)
        self._note(what, number)
        if what == "frozen":
            self._workers[number].send_signal(signal.SIGSTOP)
        if what == "killed":
            self._kill(number)
        time.sleep(seconds)
        if what == "frozen":
            self._workers[number].send_signal(signal.SIGCONT)
        if what == "killed":
            self._start(number)
        if what == "added":
            self._kill(number)

    def _note(self, what: str, number: int) -> None:
        self.events.append((time.time(), what, number))
        print(f"  {what} {number}", flush=True)

    def _kill(self, number: int) -> None:
        process = self._workers[number]
        if process.poll() is not None:
            return
        process.kill()
        process.wait()
        rows = self.rows(number)
        if rows:
            self.lost.append(sum(row[2] == rows[-1][2] for row in rows[-200:]))

    @property
    def is_over(self) -> bool:
        """Whether a worker has made all steps."""
        return any(self._workers[number].poll() == 0 for number in range(WORKERS))

    def end(self) -> None:
        """Wait for the workers, and end the lighthouse."""
        for number in range(WORKERS):
            code = self._workers[number].wait(600)
            if code:
                raise RuntimeError(f"worker {number} has ended with {code}; see {self._folder / f'{number}.log'}")
        self.kill()

    def kill(self) -> None:
        """End all processes, whatever they do."""
        for process in (*self._workers.values(), self._lighthouse):
            process.kill()
            process.wait()


def run(options: argparse.Namespace, seed: int, *, disturbed: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One run: its row of the table, and its curve in seconds."""
    name = "disturbed" if disturbed else "undisturbed"
    print(f"{name}, seed {seed}", flush=True)
    chance, started = random.Random(seed), time.time()
    job = Job(options.output / f"{name}_{seed}", seed, options)
    try:
        while not job.is_over:
            time.sleep(chance.expovariate(1 / options.every) if disturbed else 0.5)
            if disturbed and not job.is_over:
                job.disturb(chance, seconds=chance.uniform(1, options.every / 2))
        job.end()
    finally:
        job.kill()
    rows = sorted(itertools.chain.from_iterable(map(job.rows, range(WORKERS + 1))))
    errors = [row[4] for row in rows if row[4] == row[4]]
    row = {
        "run": name, "seed": seed, "seconds": round(time.time() - started), "steps_of_all": len(rows),
        "killed": len(job.lost), "events": len(job.events), "most_steps_lost": max(job.lost, default=0),
        "test_error": errors[-1],
    }  # fmt: skip
    curve = [
        {"run": name, "seed": seed, "second": second, "steps_per_second": len(own) / _BIN,
         "workers": max(each[3] for each in own),
         "test_error": next((each[4] for each in reversed(own) if each[4] == each[4]), "")}
        for second, own in ((key * _BIN, list(group)) for key, group in itertools.groupby(rows, _bin_since(rows[0][0])))
    ]  # fmt: skip
    return row, curve


_BIN = 5  # seconds


def _bin_since(start: float) -> Callable[[Sequence[float]], int]:
    return lambda row: int((row[0] - start) / _BIN)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=20000, help="of each worker (%(default)s)")
    options.add_argument("--pace", type=float, default=0.025, help="seconds of a step beside its work (%(default)s)")
    options.add_argument("--every", type=float, default=15.0, help="mean seconds between events (%(default)s)")
    options.add_argument("--seeds", type=int, default=2, help="how many (%(default)s)")
    options.add_argument("--output", type=Path, default=Path("outputs", "benchmarks", "membership"))
    chosen = options.parse_args(arguments)
    table, curves = [], []
    for seed, disturbed in itertools.product(range(chosen.seeds), (False, True)):
        row, curve = run(chosen, seed, disturbed=disturbed)
        table.append(row)
        curves += curve
        # Written after every run: what is measured is not lost.
        write_results(chosen.output, {"membership": table, "curves": curves}, vars(chosen))
    print_table(table)
    draw(chosen.output)


def draw(directory: Path) -> None:
    """Draw throughput, number of workers and test error over time, from the tables alone."""
    with (directory / "curves.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == "0"]
    labels = {"steps_per_second": "steps per second", "workers": "workers", "test_error": "test error"}
    figure, axes = blank_figure(len(labels), "three workers, seed 0")
    for panel, (column, label) in zip(axes, labels.items(), strict=True):
        for name in ("undisturbed", "disturbed"):
            own = [row for row in rows if row["run"] == name and row[column]]
            panel.plot([float(row["second"]) for row in own], [float(row[column]) for row in own], label=name)
        panel.set_xlabel("seconds")
        panel.set_ylabel(label)
    axes[-1].set_yscale("log")
    axes[0].legend()
    save(figure, directory / "figure.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    else:
        main()
