"""What a step costs where workers may come and go, beside local training; nobody does meanwhile.

    python examples/benchmarks/run.py membership_cost --parameters 350000 1000000 10000000

Two launches of one process each, and torchft's lighthouse on the same host, take turns as in step_cost: a turn of
local training, and of each kind of worker with fault_tolerance, round after round. The first two periods of a turn,
in which the workers come to each other, are not counted.
"""

import argparse
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from harness.command import add_options, parser
from harness.methods import LOCAL
from harness.model import Task
from harness.ranks import one_host
from harness.ratios import every_turn, ratios
from harness.results import print_table, write_results
from harness.turns import Turn, quiet_trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

from lightning_easgd import EASGDStrategy, FaultTolerance, LocalStrategy

WORKERS = 2
_LIGHTHOUSE = f"""
import time
from torchft.coordination import LighthouseServer
server = LighthouseServer(bind="[::]:0", min_replicas={WORKERS}, join_timeout_ms=60000)
print(server.address().rpartition(":")[2], flush=True)
time.sleep(1e6)
"""


def _strategies(tau: int, lighthouse: str, number: int) -> dict[str, Callable[[], Strategy]]:
    tolerance = FaultTolerance(lighthouse, number, quorum_timeout=30.0)
    elastic = partial(EASGDStrategy, tau=tau, fault_tolerance=tolerance)
    return {
        LOCAL: LocalStrategy,
        "local again": LocalStrategy,
        "easgd fault_tolerance": elastic,
        "easgd fault_tolerance int8": partial(elastic, wire_dtype="int8"),
    }


class _Stopwatch(Callback):
    """Seconds per step of the counted steps, wall-clock and processor time; all workers start together."""

    def __init__(self, skip: int, count: int, meet: Callable[[], int]) -> None:
        self.skip, self.count, self._meet = skip, count, meet

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Start."""
        if arguments[-1] == self.skip:
            self._meet()
            self._started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Stop."""
        if arguments[-1] == self.skip + self.count - 1:
            self.wall = (time.perf_counter() - self._started[0]) / self.count
            self.cpu = (time.process_time() - self._started[1]) / self.count


def _work(
    number: int, meet: Callable[[], int], lighthouse: str, task: Task, options: argparse.Namespace, results: Any
) -> None:
    """One worker: all turns, each a fit."""
    os.environ["RUST_LOG"] = "error"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    (place,) = one_host(1)
    strategies = _strategies(options.tau, lighthouse, number)
    for turn in range(options.rounds):
        first = turn % len(strategies)
        for name in [*strategies][first:] + [*strategies][:first]:
            watch = _Stopwatch(2 * options.tau + 1, -(-options.steps // options.tau) * options.tau, meet)
            os.environ["WORLD_SIZE"] = "1"  # the end of a fit removes it
            trainer = quiet_trainer(place, strategy=strategies[name](), callbacks=[watch])
            trainer.fit(task.model(watch.skip + watch.count))
            results.put((turn, name, number, watch.wall, watch.cpu))
    meet()


def _turns(task: Task, lighthouse: str, options: argparse.Namespace) -> list[Turn]:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    meet = context.Barrier(WORKERS, timeout=options.timeout).wait
    workers = [
        context.Process(target=_work, args=(number, meet, lighthouse, task, options, results), daemon=True)
        for number in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    found: dict[tuple[int, str], dict[int, tuple[float, float]]] = {}
    try:
        for _ in range(WORKERS * options.rounds * len(_strategies(options.tau, lighthouse, 0))):
            while results.empty():
                if any(worker.exitcode for worker in workers):
                    raise RuntimeError("a worker has failed; look for its error")
                time.sleep(0.1)
            turn, name, number, *seconds = results.get()
            found.setdefault((turn, name), {})[number] = tuple(seconds)
            if number == 0:
                print(f"{task.parameters:>10}  round {turn}  {name:<28} {1e3 * seconds[0]:9.3f} ms", flush=True)
    finally:
        for worker in workers:
            worker.kill()
    unknown = [float("nan")] * WORKERS
    return [
        Turn(name, turn, *map(list, zip(*by_worker.values(), strict=True)), unknown, unknown)
        for (turn, name), by_worker in found.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    given = parser(__doc__)
    given.add_argument("--parameters", type=int, nargs="+", default=[350_000, 1_000_000, 10_000_000])
    given.add_argument("--tau", type=int, default=10, help="steps between two exchanges (%(default)s)")
    given.add_argument("--steps", type=int, default=40, help="counted steps of a turn, at least (%(default)s)")
    add_options(given, "membership_cost", rounds=5)
    options = given.parse_args(arguments)
    rows, rounds = [], []
    command, quiet = [sys.executable, "-c", _LIGHTHOUSE], {**os.environ, "RUST_LOG": "error"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as lighthouse:
        assert lighthouse.stdout is not None
        try:
            address = f"http://127.0.0.1:{lighthouse.stdout.readline().strip()}"
            for parameters in options.parameters:
                setting = {"workers": WORKERS, "tau": options.tau, "parameters": parameters}
                turns = _turns(Task(parameters), address, options)
                rows += ratios(setting, turns)
                rounds += every_turn(setting, turns)
                write_results(options.output, {"membership_cost": rows, "rounds": rounds}, vars(options))
        finally:
            lighthouse.kill()
    print_table(rows)


if __name__ == "__main__":
    main()
