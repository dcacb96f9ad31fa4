"""Draw the README's figure: step time relative to local training, on one host and over a slow network.

    python examples/benchmarks/run.py overview --fast outputs/benchmarks/step_cost --slow outputs/benchmarks/slow_link

Reads the tables that the benchmarks step_cost and slow_link have written, and takes of each the rows of one setting.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from pathlib import Path

from harness.command import parser
from harness.figures import Panel, draw_ratios
from harness.network import Link
from harness.ratios import Row

from lightning_easgd.lab.report import read_rows

SHOWN = (
    "easgd", "easgd int8", "easgd_async", "flat_local_sgd", "post_local_sgd", "accelerate", "torchft", "torchft_diloco",
    "ddp fp16", "ddp",
)  # fmt: skip


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    results = Path("outputs", "benchmarks")
    options.add_argument("--fast", type=Path, default=results / "step_cost", help="results directory (%(default)s)")
    options.add_argument("--slow", type=Path, default=results / "slow_link", help="results directory (%(default)s)")
    options.add_argument("--fast-parameters", type=int, help="which model of step_cost; the largest unless given")
    options.add_argument("--fast-tau", type=int, default=10, help="which period on one host (%(default)s)")
    options.add_argument("--fast-batch-size", type=int, default=128, help="which mini-batch (%(default)s)")
    options.add_argument("--slow-parameters", type=int, help="which model of slow_link; the largest unless given")
    options.add_argument("--slow-tau", type=int, default=40, help="which period over the network (%(default)s)")
    options.add_argument("--ranks", type=int, default=2, help="which number of ranks (%(default)s)")
    options.add_argument("--mbit", type=float, default=100.0, help="which rate (%(default)g)")
    options.add_argument("--delay-ms", type=float, default=0.0, help="which delay (%(default)g)")
    options.add_argument("--tensors", type=int, default=8, help="which cut of the models (%(default)s)")
    options.add_argument("--output", type=Path, default=results / "overview.png", help="the figure (%(default)s)")
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    options = _options(arguments)
    common = {"ranks": options.ranks, "tensors": options.tensors}
    on_host = common | {"batch_size": options.fast_batch_size}
    on_network = common | {"mbit": options.mbit, "delay_ms": options.delay_ms}
    fast = _rows(options.fast / "step_cost.csv", on_host, options.fast_parameters, options.fast_tau)
    slow = _rows(options.slow / "slow_link.csv", on_network, options.slow_parameters, options.slow_tau)
    panels = [
        Panel(f"one host, {_millions(fast)}, τ = {options.fast_tau}", fast),
        Panel(f"{Link(options.mbit, options.delay_ms).name}, {_millions(slow)}, τ = {options.slow_tau}", slow),
    ]
    draw_ratios(options.output, panels, "Time of a training step", methods=SHOWN)
    print(f"figure: {options.output}")


def _rows(table: Path, wanted: dict[str, float], parameters: int | None, tau: int) -> list[Row]:
    """The rows of one setting and period, with the methods' plain names."""
    rows: list[Row] = [row for row in read_rows(table) if all(float(row[name]) == wanted[name] for name in wanted)]
    if not rows:
        raise SystemExit(f"{table}: no row has {wanted}; measure it first, or choose another setting")
    size = parameters or max(int(row["parameters"]) for row in rows)
    return [
        row | {"method": row["method"].removesuffix(f" tau={tau}")} for row in rows if int(row["parameters"]) == size
    ]


def _millions(rows: Sequence[Row]) -> str:
    return f"{int(rows[0]['parameters']) / 1e6:g} M"


if __name__ == "__main__":
    main()
