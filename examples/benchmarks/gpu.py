"""On a GPU: the exchange against the memory's bandwidth, its memory, where the host waits, what a step costs.

    python examples/benchmarks/run.py gpu

    bandwidth  an exchange of ResNet-50's parameters and its parts, against a copy of as many: of_copy by the bytes that
               the code moves, least_of_copy by the bytes that have to be moved at least
    memory     of the device, beyond local training, in float32 words for each parameter: at the peak and after a step,
               beside what docs/limits.md says
    stalls     calls in which the host waits for the device, in steps with an exchange and in others; per_exchange is
               what all steps of a period have beyond those of local training
    step_cost  seconds of a training step of ResNet-50, bf16-mixed: one rank over NCCL, two ranks that share the GPU
               over gloo (NCCL admits one rank for each GPU), and two over NCCL where there are two GPUs; the columns
               are those of the benchmark step_cost, and peak_MB is the GPU's memory

Each table is written when it is there. --limit bounds the whole: further rounds of step_cost are left out. Without a
GPU it says so and ends. --device cpu tries the code with a small network; its numbers mean nothing.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.command import add_options, collect_turns, parser
from harness.figures import draw_ratios, panels_of
from harness.ranks import Place, RanksError, Send, run_ranks
from harness.ratios import Row, every_turn, ratios
from harness.results import print_table, write_results
from harness.turns import Turn, Turns
from on_gpu.bandwidth import measure_bandwidth
from on_gpu.card import describe
from on_gpu.memory import measure_memory, memory_table
from on_gpu.stalls import measure_stalls
from on_gpu.training import COMPRESSED, Setting, methods, model, settings

from lightning_easgd.lab.report import read_rows

PARTS = "bandwidth", "stalls", "memory", "step_cost"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only tries the code")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which tables (all)")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--tau", type=int, default=10)
    options.add_argument("--steps", type=int, default=20, help="counted steps of a turn, at least (%(default)s)")
    options.add_argument("--limit", type=float, default=100.0, help="seconds for all, about (%(default)g)")
    add_options(options, "gpu", rounds=5, timeout=90.0)
    return options.parse_args(arguments)


_MEASURE: dict[str, Callable[..., None]] = {
    "card": describe,
    "bandwidth": measure_bandwidth,
    "stalls": measure_stalls,
    "memory": measure_memory,
}


class _Report:
    """The tables so far; each is written when it has grown."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._measured_memory: list[tuple[str, int, float, float]] = []
        self.card: dict[str, Any] = {}
        self.tables: dict[str, list[Row]] = {}
        self.failures: list[str] = []

    def add(self, table: str, rows: Sequence[Row]) -> None:
        """Add rows to a table, and write it."""
        self.tables.setdefault(table, []).extend(rows)
        self.write()

    def put_steps(self, setting: Setting, turns: Sequence[Turn]) -> None:
        """Put the rows of a setting's turns in place of those of before, and write the tables."""
        columns = setting.columns
        for name, rows in {"step_cost": ratios(columns, turns), "rounds": every_turn(columns, turns)}.items():
            others = [row for row in self.tables.get(name, []) if not columns.items() <= row.items()]
            self.tables[name] = [*others, *rows]
        self.write()

    def write(self) -> None:
        """Write all tables with what they were measured on."""
        more = {"card": self.card, "failures": self.failures}
        write_results(self._options.output, self.tables, vars(self._options), more)

    def measure(self, setting: Setting, names: Sequence[str]) -> None:
        """Measure some things in the same ranks; if they fail, what has been measured remains."""
        started = time.monotonic()
        arguments = names, setting, self._options
        try:
            run_ranks(
                _measure,
                setting.places,
                *arguments,
                timeout=self._options.timeout,
                receive=partial(self._receive, setting),
            )
        except RanksError as error:
            self.failures.append(f"{setting.title}: {error}")
            print(f"{setting.title}: cut off: {error}", file=sys.stderr, flush=True)
            self.write()
        print(f"{setting.title}: {', '.join(names)}: {time.monotonic() - started:.1f} s", flush=True)

    def _receive(self, setting: Setting, message: tuple[str, Any]) -> None:
        name, content = message
        if name == "card":
            self.card = content
        elif name == "memory":  # a row for each method, beside the row of local training
            self._measured_memory.append(content)
            self.tables["memory"] = memory_table(setting.columns, self._measured_memory, self._options.tau)
            self.write()
        else:
            self.add(name, content)


def _measure(
    rank: int, place: Place, send: Send, names: Sequence[str], setting: Setting, options: argparse.Namespace
) -> None:
    """Be one rank, and measure one thing after the other; where there should be a GPU and is none, nothing."""

    def send_as(name: str, content: Any) -> None:
        send((name, content))

    for name in names:
        if name == "card" or setting.device == "cpu" or torch.cuda.is_available():
            _MEASURE[name](rank, place, partial(send_as, name), setting, options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the tables, and write the results directory; the exit status says whether a part has failed."""
    options = _options(arguments)
    deadline = time.monotonic() + options.limit
    report = _Report(options)
    alone, together, *_ = settings(options.device, 1)
    # Ranks are forks of this process, which therefore must not start CUDA: the first rank says whether there is a GPU.
    report.measure(alone, ["card", *(name for name in ("bandwidth", "stalls") if name in options.parts)])
    if options.device == "cuda" and not report.card:
        if report.failures:
            sys.exit(f"gpu: nothing was measured; see {options.output / 'setting.json'}")
        print("gpu: this machine has no CUDA device (or torch was built without CUDA); nothing was measured")
        return
    second = [name for name in ("stalls", "memory") if name in options.parts]
    if second:
        report.measure(together, second)
    if "step_cost" in options.parts:
        _measure_steps(options, settings(options.device, report.card.get("count", 0)), report, deadline)
    for rows in report.tables.values():
        print_table(rows)
    if report.failures:
        sys.exit(f"gpu: {len(report.failures)} parts were cut off; see {options.output / 'setting.json'}")


def _measure_steps(options: argparse.Namespace, chosen: Sequence[Setting], report: _Report, deadline: float) -> None:
    for number, setting in enumerate(chosen):
        # What remains is divided among the settings that are left; one that takes less leaves more to the others.
        limit = max(0.0, deadline - time.monotonic()) / (len(chosen) - number)
        known = methods(options.tau, setting.backend)
        turns = collect_turns(
            setting.places,
            Turns(
                partial(model, setting.device, options.batch_size, 224 if setting.device == "cuda" else 16),
                [method for name, method in known.items() if name not in COMPRESSED],
                options.rounds,
                options.steps,
                options.steps,
                count_bytes=False,
                trainer=setting.trainer,
                limit=limit,
            ),
            title=setting.title,
            timeout=options.timeout,
            keep=partial(report.put_steps, setting),
        )
        if len({turn.method for turn in turns}) < len(known) - len(COMPRESSED):
            report.failures.append(f"step_cost, {setting.title}: {len(turns)} turns; the error is in the log")
            report.write()
        draw(options.output)


def draw(results: Path) -> None:
    """Draw the figure of a results directory from its table."""
    panels = panels_of(
        read_rows(results / "step_cost.csv"),
        ("ranks", "backend"),
        lambda row: "one process" if int(row["ranks"]) == 1 else f"{row['ranks']} processes, {row['backend']}",
    )
    draw_ratios(results / "figure.png", panels, "Time of a training step of ResNet-50 in bf16 on a GPU")


if __name__ == "__main__":
    main()
