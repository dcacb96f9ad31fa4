"""Workers that are killed, frozen, started again and added at random, beside the same job left in peace.

    EASGD_DATA=~/data python examples/benchmarks/run.py membership      # about ten minutes a run

Three workers learn CIFAR-10 (or the digits). In the disturbed run one of them is killed (kill -9) and started again,
frozen for some seconds, or a fourth one comes and is killed, every so many seconds, until a twentieth of the steps is
left. Then the same seed is left in peace, for as many steps of all workers as the disturbed run made. The test error at
the last worker's center, and the most steps that a killed worker had made since its last exchange, go into the table;
throughput, the number of workers and the test error over time into the figure. ``--more`` seeds are left in peace and
have no pauses, which changes no number but the time: they show what the seed does to the error.
"""

import argparse
import csv
import itertools
import json
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
from torch import Tensor, nn

from lightning_easgd import EASGDStrategy, FaultTolerance
from lightning_easgd.lab.data import CIFAR10DataModule, DataError
from lightning_easgd.lab.figure_style import METHODS, LineStyle, blank_figure, legend_below, percent, plot, save
from lightning_easgd.lab.models import StridedNet

WORKERS, DATA = 3, "data.pt"
UNDISTURBED, DISTURBED = "undisturbed", "disturbed"
Rows = list[dict[str, Any]]
_BIN = 10  # seconds
_MARKERS = {"x": "killed", "^": "started", "s": "frozen", "o": "added", "v": "removed"}
_COLUMNS = ("time", "step", "version", "workers", "error")
_LIGHTHOUSE = (
    "import sys, time; from torchft.coordination import LighthouseServer;"
    "server = LighthouseServer(bind='[::]:' + sys.argv[1], min_replicas=1, join_timeout_ms=5000);"
    "time.sleep(1e6)"
)


def read(data: str, root: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on and to test with."""
    if data == "digits":
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        images, labels = torch.from_numpy(digits.data).float()[order] / 16, torch.from_numpy(digits.target)[order]
        return images[:1437], labels[:1437], images[1437:], labels[1437:]
    source = CIFAR10DataModule(root=root).source
    images, labels, *test = (torch.from_numpy(part) for split in ("train", "test") for part in source.read(split))
    return images, labels, test[0], test[1]


def network(data: str) -> tuple[nn.Module, float]:
    """A network, and its learning rate."""
    if data == "digits":
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), 0.05
    return StridedNet((3, 32, 32)), 0.1


class Learner(L.LightningModule):
    """A network whose worker writes down each of its steps, and every so many the test error at the center."""

    def __init__(self, file: Path, number: int, options: argparse.Namespace) -> None:
        super().__init__()
        self.net, self.lr = network(options.data)
        self.images, self.labels, *self.test = torch.load(file.parent.parent / DATA, mmap=True)
        self.file, self.pace = file, options.pace
        self.seed = options.seed * 10**8 + number * 10**7

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """A batch of this worker's own."""
        time.sleep(self.pace)
        generator = torch.Generator().manual_seed(self.seed + self.global_step)
        chosen = torch.randint(len(self.labels), (32,), generator=generator)
        return nn.functional.cross_entropy(self(self.images[chosen]), self.labels[chosen])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of each worker."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        """As many batches as are asked for."""
        return torch.utils.data.DataLoader(torch.zeros(10**6), batch_size=1)

    def on_train_batch_end(self, *_: Any) -> None:
        """Write a row, of the first living worker with an error on some of the test images."""
        strategy: Any = self.trainer.strategy
        is_its_turn = self.global_step % 250 == 0 and strategy.elastic.is_saver
        self._write(self._error(2000) if is_its_turn else "")

    def on_train_end(self) -> None:
        """Write a row with the error on all of them."""
        self._write(self._error(len(self.test[1])))

    def _write(self, error: str) -> None:
        strategy: Any = self.trainer.strategy
        (averager,) = strategy._averagers
        living = strategy.elastic.membership.living
        row = (f"{time.time():.3f}", self.global_step, averager.center.version, len(living), error)
        with self.file.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)

    @torch.no_grad()
    def _error(self, most: int) -> str:
        strategy: Any = self.trainer.strategy
        images, labels = (each[:most] for each in self.test)
        outputs = torch.func.functional_call(self, dict(strategy.known_center), images, strict=True)
        return f"{(outputs.argmax(dim=1) != labels).float().mean().item():.4f}"

    def forward(self, images: Tensor) -> Tensor:
        """The network's outputs."""
        return self.net(images.float() / 64 - 2 if images.dtype == torch.uint8 else images)


def work(folder: str, number: str, options: argparse.Namespace) -> None:
    """One worker, as a process of its own."""
    L.seed_everything(options.seed, verbose=False)
    strategy = EASGDStrategy(tau=10, fault_tolerance=FaultTolerance(replica_id=int(number)))
    module = Learner(Path(folder, f"{number}.csv"), int(number), options)
    trainer = L.Trainer(
        strategy=strategy, accelerator="cpu", devices=1, max_epochs=-1, max_steps=options.steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module)


class Job:
    """A lighthouse and its workers.

    Attributes:
        events: When what was done to which worker.
        lost: Steps that killed workers had made since their last exchange.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
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
        given = json.dumps({name: vars(self._options)[name] for name in ("data", "seed", "steps", "pace")})
        command = [sys.executable, __file__, "--worker", str(self._folder), str(number), given]
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
        """Do something to a worker, and put it right some seconds later; with the last one the center would go."""
        training = [number for number in range(WORKERS) if self._trains(number)]
        things = (self._stop_and_start, self._freeze, self._add) if len(training) > 1 else (self._add,)
        chance.choice(things)(chance.choice(training or [WORKERS]), seconds)

    def _stop_and_start(self, number: int, seconds: float) -> None:
        self._note("killed", number)
        self._kill(number)
        time.sleep(seconds)
        self._note("started", number)
        self._start(number)

    def _freeze(self, number: int, seconds: float) -> None:
        self._note("frozen", number)
        self._workers[number].send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self._workers[number].send_signal(signal.SIGCONT)

    def _add(self, _: int, seconds: float) -> None:
        self._note("added", WORKERS)
        self._start(WORKERS)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not self._trains(WORKERS):
            time.sleep(0.2)
        time.sleep(3 * seconds)
        self._note("removed", WORKERS)
        self._kill(WORKERS)

    def _trains(self, number: int) -> bool:
        rows = self.rows(number)
        return self._workers[number].poll() is None and bool(rows) and time.time() - rows[-1][0] < 5

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

    @property
    def step(self) -> float:
        """How far the job is."""
        return max((row[1] for number in range(WORKERS) for row in self.rows(number)[-1:]), default=0)

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


def run(options: argparse.Namespace, name: str) -> tuple[Rows, Rows, Rows]:
    """One run: its row of the table, its curve, and what was done to it."""
    print(f"{name}, seed {options.seed}, {options.steps} steps", flush=True)
    chance, started, of_run = random.Random(options.seed), time.time(), {"run": name, "seed": options.seed}
    job = Job(options.output / "workers" / f"{name}_{options.seed}", options)
    try:
        while not job.is_over:
            time.sleep(chance.expovariate(1 / options.every) if name == DISTURBED else 0.5)
            if name == DISTURBED and 0 < job.step < 0.95 * options.steps:
                job.disturb(chance, seconds=chance.uniform(1, options.every / 2))
        job.end()
    finally:
        job.kill()
    rows = sorted(itertools.chain.from_iterable(map(job.rows, range(WORKERS + 1))))
    row = {
        **of_run, "seconds": round(time.time() - started), "steps_of_all": len(rows),
        "killed": sum(what == "killed" for _, what, _ in job.events),
        "frozen": sum(what == "frozen" for _, what, _ in job.events),
        "added": sum(what == "added" for _, what, _ in job.events),
        "most_steps_lost": max(job.lost, default=0), "test_error": rows[-1][4],
    }  # fmt: skip
    rows = [[*each, number] for number, each in enumerate(rows, 1)]
    curve = [
        {**of_run, "second": second, "steps": own[-1][5], "steps_per_second": len(own) / _BIN,
         "workers": sum(each[3] for each in own) / len(own),
         "test_error": next((each[4] for each in reversed(own) if each[4] == each[4]), "")}
        for second, own in ((key * _BIN, list(group)) for key, group in itertools.groupby(rows, _bin_since(rows[0][0])))
    ]  # fmt: skip
    events = [
        {**of_run, "second": round(when - rows[0][0], 1), "what": what, "worker": who}
        for when, what, who in job.events
    ]  # fmt: skip
    return [row], curve, events


def _bin_since(start: float) -> Callable[[Sequence[float]], int]:
    return lambda row: int((row[0] - start) / _BIN)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = parser(__doc__)
    options.add_argument("--data", choices=("cifar10", "digits"), default="cifar10")
    options.add_argument("--root", default=os.environ.get("EASGD_DATA", "data"), help="of CIFAR-10 (%(default)s)")
    options.add_argument("--steps", type=int, default=8000, help="of each worker (%(default)s)")
    options.add_argument("--pace", type=float, default=0.025, help="seconds of a step beside its work (%(default)s)")
    options.add_argument("--every", type=float, default=15.0, help="mean seconds between events (%(default)s)")
    options.add_argument("--seeds", type=int, default=1, help="how many (%(default)s)")
    options.add_argument("--more", type=int, default=0, help="seeds that are only left in peace (%(default)s)")
    options.add_argument("--output", type=Path, default=Path("outputs", "benchmarks", "membership"))
    chosen = options.parse_args(arguments)
    if chosen.data == "cifar10":
        try:
            CIFAR10DataModule(root=chosen.root).prepare_data()
        except DataError as error:
            print(f"skipped: {error}")
            return
    (chosen.output / "workers").mkdir(parents=True, exist_ok=True)
    torch.save([part.clone() for part in read(chosen.data, chosen.root)], chosen.output / "workers" / DATA)
    tables: dict[str, Rows] = {"membership": [], "curves": [], "events": []}
    for seed in range(chosen.seeds + chosen.more):
        setting = argparse.Namespace(**{**vars(chosen), "seed": seed})
        for name in (DISTURBED, UNDISTURBED) if seed < chosen.seeds else (UNDISTURBED,):
            if name == UNDISTURBED:
                disturbed = [row["steps_of_all"] for row in tables["membership"] if row["run"] == DISTURBED]
                setting.steps = round(disturbed[min(seed, chosen.seeds - 1)] / WORKERS)
                setting.pace = chosen.pace if seed < chosen.seeds else 0.0
            for table, rows in zip(tables, run(setting, name), strict=True):
                tables[table] += rows
            # Written after every run: what is measured is not lost.
            write_results(chosen.output, tables, vars(chosen))
    print_table(tables["membership"])
    draw(chosen.output)


def draw(directory: Path) -> None:
    """Draw throughput, number of workers and test error over time, from the tables alone."""
    curves, events = (
        [row for row in _rows(directory / f"{name}.csv") if row["seed"] == "0"] for name in ("curves", "events")
    )
    styles = {
        UNDISTURBED: LineStyle("left in peace", METHODS["easgd"].color, "o"),
        DISTURBED: LineStyle("disturbed", METHODS["eamsgd"].color, "s"),
    }
    panels = [
        ("second", "steps_per_second", "steps of all workers", "time, s", "in a second, steps"),
        ("second", "workers", "workers in an exchange", "time, s", "those that take part, p"),
        ("second", "test_error", "test error by time", "time, s", "at the center, %"),
        ("steps", "test_error", "test error by work", "steps of all workers", "at the center, %"),
    ]
    figure, axes = blank_figure(len(panels), "Workers that are killed, frozen, started again and added at random")
    for panel, (x, y, title, x_label, y_label) in zip(axes, panels, strict=True):
        for name, style in styles.items():
            own = [row for row in curves if row["run"] == name and row[y]]
            if y == "steps_per_second":
                own.pop()  # of a part of the time
            values = [float(row[y]) for row in own]
            plot(panel, [float(row[x]) for row in own], percent(values) if y == "test_error" else values, style)
        panel.set(title=title, xlabel=x_label, ylabel=y_label)
    for place, (marker, what) in enumerate(_MARKERS.items(), 1):
        seconds = [float(row["second"]) for row in events if row["what"] == what]
        heights = [0.16 * place] * len(seconds)
        axes[1].plot(seconds, heights, marker, color="0.3", fillstyle="none", markersize=4.5, label=what)
    axes[1].set_ylim(0, WORKERS + 1.4)
    legend_below(figure)
    save(figure, directory / "figure.png")


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:4], argparse.Namespace(**json.loads(sys.argv[4])))
    else:
        main()
