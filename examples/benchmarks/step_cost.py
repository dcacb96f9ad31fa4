"""What a training step costs: local training without communication, EASGD, and DDP, through the Lightning Trainer.

    python examples/benchmarks/step_cost.py --output results/step_cost

The methods take turns in the same processes, round after round, and each is compared with the local training of its
own round: load from outside hits all of them. Printed is the median over the rounds of the ratio to local, with the
smallest and the largest, for wall-clock and for processor time (all threads of the rank), and the bytes that a rank
sends per step. The first number of steps of each turn is not counted. The controls are in the table: "local again"
is local training a second time, and shows what the noise of the machine alone does.
"""

import argparse
import csv
import itertools
import json
import logging
import multiprocessing
import os
import platform
import socket
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_easgd import EASGDStrategy, LocalStrategy

FEATURES, CLASSES, HIDDEN_LAYERS = 128, 10, 3


def mlp(parameters: int) -> nn.Module:
    """A multi-layer perceptron of about this many parameters."""
    width = 1
    while FEATURES * width + (HIDDEN_LAYERS - 1) * width**2 + CLASSES * width < parameters:
        width += 1
    layers: list[nn.Module] = [nn.Linear(FEATURES, width), nn.ReLU()]
    for _ in range(HIDDEN_LAYERS - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


class Model(L.LightningModule):
    """Trains on one batch that is made once, so that no loader is in the measurement."""

    def __init__(self, parameters: int, batch_size: int, steps: int) -> None:
        super().__init__()
        self.net = mlp(parameters)
        self.batch = torch.randn(batch_size, FEATURES), torch.randint(CLASSES, (batch_size,))
        self.steps = steps

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Cross-entropy of the batch."""
        return nn.functional.cross_entropy(self.net(self.batch[0]), self.batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with Nesterov's momentum, which EAMSGD needs: all methods have the same local step."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def train_dataloader(self) -> list[int]:
        """One empty batch for each step."""
        return [0] * self.steps


class Stopwatch(Callback):
    """Seconds per step of the counted steps: wall-clock and processor time."""

    def __init__(self, skip: int, count: int) -> None:
        self.skip, self.count = skip, count

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        """Start together when the first steps are over."""
        if index == self.skip:
            dist.barrier()
            self.started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Stop."""
        if index == self.skip + self.count - 1:
            self.wall = (time.perf_counter() - self.started[0]) / self.count
            self.cpu = (time.process_time() - self.started[1]) / self.count


def methods(tau: int) -> dict[str, Any]:
    """Name → new strategy."""
    return {
        "local": LocalStrategy,
        "local again": LocalStrategy,
        f"easgd tau={tau}": lambda: EASGDStrategy(tau=tau),
        f"eamsgd tau={tau}": lambda: EASGDStrategy(tau=tau, momentum=0.9),
        f"easgd_async tau={tau}": lambda: EASGDStrategy(mode="async", tau=tau),
        "ddp": DDPStrategy,
    }


def measure(rank: int, port: int, options: argparse.Namespace, results: Any) -> None:
    """Be one rank: train with each method in turn, several rounds; rank 0 reports."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(options.ranks),
        "LOCAL_WORLD_SIZE": str(options.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "step_cost",
    }
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = []
    for batch_size, parameters in itertools.product(options.batch_size, options.parameters):
        for turn in range(options.rounds):
            for name, strategy in methods(options.tau).items():
                watch = Stopwatch(options.tau + 1, options.steps)
                model = Model(parameters, batch_size, options.tau + 1 + options.steps)
                trainer = L.Trainer(
                    strategy=strategy(),
                    accelerator="cpu",
                    devices=options.ranks,
                    max_epochs=1,
                    callbacks=[watch],
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                )
                trainer.fit(model)
                size = sum(parameter.nbytes for parameter in model.parameters())
                counted = getattr(trainer.strategy, "communication", None)
                ring = 2 * (options.ranks - 1) / options.ranks
                sent = ring * size if name == "ddp" else counted.bytes_sent / model.steps if counted else 0.0
                times = torch.tensor([watch.wall, watch.cpu], dtype=torch.float64)
                dist.all_reduce(times)
                wall, cpu = (times / options.ranks).tolist()
                rows.append((batch_size, parameters, turn, name, wall, cpu, sent))
                if rank == 0:
                    print(
                        f"{batch_size:>5} {parameters:>10}  round {turn}  {name:<14} {wall * 1e3:9.3f} ms", flush=True
                    )
    if rank == 0:
        results.put(rows)
    dist.barrier()


def summary(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Median, smallest and largest ratio to the local training of the same round."""
    cells = {row[:4]: row[4:] for row in rows}
    lines = []
    for batch_size, parameters in dict.fromkeys(row[:2] for row in rows):
        for name in dict.fromkeys(row[3] for row in rows):
            turns = [key for key in cells if (*key[:2], key[3]) == (batch_size, parameters, name)]
            ratios = [[cells[key][n] / cells[(*key[:3], "local")][n] for key in turns] for n in (0, 1)]
            wall = statistics.median(cells[key][0] for key in turns)
            spread = [round(f(ratios[0]), 3) for f in (statistics.median, min, max)]
            cpu = round(statistics.median(ratios[1]), 3)
            lines.append((batch_size, parameters, name, round(wall * 1e3, 3), *spread, cpu, round(cells[turns[0]][2])))
    return lines


def main() -> None:
    """Run, print the table, and write the results directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, nargs="+", default=[350_000, 1_000_000, 10_000_000])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tau", type=int, default=10)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128], help="128 is the EASGD paper's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40, help="counted steps of a turn, a multiple of tau")
    parser.add_argument("--output", type=Path, help="folder for step_cost.csv, rounds.csv and setting.json")
    options = parser.parse_args()
    if options.steps % options.tau:
        parser.error(f"--steps {options.steps} is not a multiple of --tau {options.tau}")

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=measure, args=(rank, port, options, results)) for rank in range(options.ranks)]
    for process in ranks:
        process.start()
    rows = results.get(timeout=3600)
    for process in ranks:
        process.join()

    header = (
        "batch_size",
        "parameters",
        "method",
        "ms_per_step",
        "ratio",
        "ratio_min",
        "ratio_max",
        "cpu_ratio",
        "bytes_per_step",
    )
    lines = summary(rows)
    print("\n" + " ".join(f"{title:>14}" for title in header))
    for line in lines:
        print(" ".join(f"{cell:>14}" for cell in line))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        for name, titles, table in (
            ("step_cost.csv", header, lines),
            (
                "rounds.csv",
                ("batch_size", "parameters", "round", "method", "seconds", "cpu_seconds", "bytes_per_step"),
                rows,
            ),
        ):
            with (options.output / name).open("w", newline="") as file:
                csv.writer(file).writerows([titles, *table])
        setting = {name: value for name, value in vars(options).items() if name != "output"}
        setting |= {"torch": torch.__version__, "lightning": L.__version__, "python": platform.python_version()}
        setting |= {"machine": platform.machine(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        (options.output / "setting.json").write_text(json.dumps(setting, indent=2) + "\n")


if __name__ == "__main__":
    main()
