"""What a training step costs between nodes on a slow network: the methods of step_cost, each rank on a node of its own.

    python examples/benchmarks/run.py slow_link --mbit 100 1000 --delay-ms 0 10 --tau 10 64

The nodes are network namespaces of this machine, on a switch whose cables carry the given rate in each direction and,
if asked for, delay what they carry; root makes them, and they are gone afterwards. Beside step_cost's columns:

    rate_of_local  steps per second as a share of local training's, 1 / ratio
    link_load      share of the link that the method's bytes would take at the speed of local training: at most 1 where
                   the link can carry them at all, and above that the least ratio that any method with these bytes has

Models are cut into few or many tensors (--tensors 8 150): who sends tensors one by one pays for it here.
"""

import argparse
import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from pathlib import Path

from harness.command import add_method_options, add_options, chosen_methods, collect_turns, parser
from harness.figures import draw_ratios, panels_of
from harness.methods import LOCAL, NAMES
from harness.model import Task
from harness.network import Link, NoNamespacesError, slow_network
from harness.ratios import Row, every_turn, ratios
from harness.results import print_table, write_results
from harness.turns import Turns

from lightning_easgd.lab.report import read_rows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--mbit", type=float, nargs="+", default=[100.0, 1000.0], help="rates, Mbit/s (%(default)s)")
    options.add_argument("--delay-ms", type=float, nargs="+", default=[0.0], help="one-way delays, ms (%(default)s)")
    options.add_argument("--parameters", type=int, nargs="+", default=[1_000_000])
    options.add_argument("--tensors", type=int, nargs="+", default=[8, 150], help="parameter tensors of the model")
    options.add_argument("--ranks", type=int, nargs="+", default=[2])
    options.add_argument("--batch-size", type=int, default=128)
    options.add_argument("--steps", type=int, default=20, help="counted steps of a turn, at least (%(default)s)")
    options.add_argument("--blocking-steps", type=int, default=5, help="the same for DDP (%(default)s)")
    add_method_options(options, taus=[10, 40], names=NAMES)
    add_options(options, "slow_link", rounds=2)
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = _options(arguments)
    methods = chosen_methods(options)
    rows, rounds = [], []
    for mbit, delay, ranks, parameters, tensors in itertools.product(
        options.mbit, options.delay_ms, options.ranks, options.parameters, options.tensors
    ):
        link = Link(mbit, delay)
        task = Task(parameters, tensors, options.batch_size)
        setting = {"mbit": mbit, "delay_ms": delay, "ranks": ranks, "batch_size": options.batch_size}
        setting |= {"tensors": tensors, "parameters": parameters}
        try:
            with slow_network(ranks, link) as places:
                turns = collect_turns(
                    places,
                    Turns(task.model, methods, options.rounds, options.steps, options.blocking_steps),
                    title=f"{link.name}  {ranks} nodes  {parameters:>9} in {tensors:>3}",
                    timeout=options.timeout,
                )
        except NoNamespacesError as error:
            print(f"skipped: {link.name}: {error}")
            continue
        rows += _with_load(ratios(setting, turns), mbit)
        rounds += every_turn(setting, turns)
        write_results(options.output, {"slow_link": rows, "rounds": rounds}, vars(options))
    print_table(rows)
    if rows:
        draw(options.output)


def draw(results: Path) -> None:
    """Draw the figure of a results directory from its table."""
    panels = panels_of(
        read_rows(results / "slow_link.csv"),
        ("mbit", "delay_ms", "ranks", "parameters", "tensors"),
        lambda row: f"{Link(float(row['mbit']), float(row['delay_ms'])).name}, {row['tensors']} tensors",
    )
    draw_ratios(results / "figure.png", panels, "Time of a training step over a slow network")


def _with_load(rows: Sequence[Row], mbit: float) -> list[Row]:
    local = next((row["ms_per_step"] for row in rows if row["method"] == LOCAL), float("nan"))
    return [
        row
        | {
            "rate_of_local": round(1 / row["ratio"], 3),
            "link_load": round(8 * row["bytes_per_step"] / (1e3 * mbit * local), 3),
        }
        for row in rows
    ]


if __name__ == "__main__":
    main()
