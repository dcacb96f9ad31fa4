"""What a training step costs: local training, EASGD, DDP and peers, through the Lightning Trainer on one host.

    python examples/benchmarks/run.py step_cost --ranks 2 4 --parameters 350000 10000000 --tau 1 10 64

The methods take turns in the same processes, round after round, and each is compared with the local training of its
own round: load from outside hits all of them. Printed is the median over the rounds of the ratio to local, with the
smallest and the largest, for wall-clock and the median for processor time (all threads of the rank); the bytes that a
rank sends over TCP per step, counted by the kernel in a fit of their own; and the most memory of a rank beyond what it
had before it built the model. The first two periods of each turn are not counted. The control is in the table: "local
again" is local training a second time, and shows what the noise of the machine alone does.

Peers: Lightning's DDP, also with torch's fp16 hook; torch's post-local SGD; one blocking all-reduce of a flat buffer
("flat_local_sgd"); LocalSGD of accelerate, LocalSGD and DiLoCo of torchft (pip install 'lightning_easgd[bench]').
"""

import argparse
import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from pathlib import Path

from harness.command import add_method_options, add_options, chosen_methods, collect_turns, parser
from harness.figures import draw_ratios, panels_of
from harness.methods import NAMES
from harness.model import Task
from harness.ranks import one_host
from harness.ratios import every_turn, ratios
from harness.results import print_table, write_results
from harness.turns import Turns

from lightning_easgd.lab.report import read_rows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--parameters", type=int, nargs="+", default=[350_000, 1_000_000, 10_000_000])
    options.add_argument("--ranks", type=int, nargs="+", default=[2])
    options.add_argument("--batch-size", type=int, nargs="+", default=[128], help="128 is the EASGD paper's")
    options.add_argument("--tensors", type=int, nargs="+", default=[8], help="parameter tensors of the model")
    options.add_argument("--steps", type=int, default=20, help="counted steps of a turn, at least (%(default)s)")
    add_method_options(options, taus=[10], names=NAMES)
    add_options(options, "step_cost", rounds=3)
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = _options(arguments)
    methods = chosen_methods(options)
    rows, rounds = [], []
    for ranks, batch_size, tensors, parameters in itertools.product(
        options.ranks, options.batch_size, options.tensors, options.parameters
    ):
        setting = {"ranks": ranks, "batch_size": batch_size, "tensors": tensors, "parameters": parameters}
        turns = collect_turns(
            one_host(ranks),
            Turns(Task(parameters, tensors, batch_size).model, methods, options.rounds, options.steps, options.steps),
            title=f"{ranks} ranks {batch_size:>4} {parameters:>10}",
            timeout=options.timeout,
        )
        rows += ratios(setting, turns)
        rounds += every_turn(setting, turns)
        # Written after every setting: what is measured is not lost.
        write_results(options.output, {"step_cost": rows, "rounds": rounds}, vars(options))
    print_table(rows)
    draw(options.output)


def draw(results: Path) -> None:
    """Draw the figure of a results directory from its table."""
    panels = panels_of(
        read_rows(results / "step_cost.csv"),
        ("ranks", "batch_size", "tensors", "parameters"),
        lambda row: f"{float(row['parameters']) / 1e6:g} M parameters, {row['ranks']} processes",
    )
    draw_ratios(results / "figure.png", panels, "Time of a training step on one host")


if __name__ == "__main__":
    main()
