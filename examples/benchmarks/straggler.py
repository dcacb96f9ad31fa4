"""How fast workers are beside a slow one, and when all of them stop at times.

    python examples/benchmarks/run.py straggler --ranks 4

A step of each rank is a sleep beside a little arithmetic, so that the ranks do not compete for cores. Three situations
take turns, round after round, each with every method:

    undisturbed  all ranks sleep as long
    straggler    the last rank sleeps --slower times as long
    jitter       each rank, now and then by chance, sleeps --slower times as long; the same steps for every method

Printed is the step rate of the ranks (with the straggler: of the others) as a share of the same method's undisturbed
rate, and as a share of local training's rate in the same situation: median, smallest, largest over the rounds.
"""

import argparse
import dataclasses
import functools
import math
import os
import random
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from harness.command import add_method_options, add_options, chosen_methods, collect_turns, parser
from harness.figures import Panel, draw_ratios
from harness.methods import LOCAL
from harness.model import Task
from harness.ranks import one_host
from harness.ratios import Row, every_turn, median_and_range
from harness.results import print_table, write_results
from harness.turns import Turn, Turns

from lightning_easgd.lab.report import read_rows

UNDISTURBED, STRAGGLER, JITTER = "undisturbed", "straggler", "jitter"
METHODS = ("local", "easgd", "easgd_async", "post_local_sgd", "flat_local_sgd", "ddp")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--ranks", type=int, default=4)
    options.add_argument("--slower", type=float, default=5.0, help="how much (%(default)s)")
    options.add_argument("--sleep-ms", type=float, default=20.0, help="of an undisturbed step (%(default)s)")
    options.add_argument("--chance", type=float, default=0.1, help="of a slow step (%(default)s)")
    options.add_argument("--parameters", type=int, default=100_000)
    options.add_argument("--steps", type=int, default=60, help="counted steps of a turn, at least (%(default)s)")
    add_method_options(options, taus=[10], names=METHODS)
    add_options(options, "straggler", rounds=2)
    return options.parse_args(arguments)


def _situations(options: argparse.Namespace) -> dict[str, Callable[[int, int], None]]:
    """What a rank does in each step."""
    usual, slow, last = options.sleep_ms / 1e3, options.slower * options.sleep_ms / 1e3, options.ranks - 1

    def jittery(rank: int, step: int) -> bool:
        return random.Random(f"{rank} {step}").random() < options.chance

    return {
        UNDISTURBED: lambda rank, step: time.sleep(usual),
        STRAGGLER: lambda rank, step: time.sleep(slow if rank == last else usual),
        JITTER: lambda rank, step: time.sleep(slow if jittery(rank, step) else usual),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = _options(arguments)
    methods = chosen_methods(options)
    period = math.lcm(*options.tau)
    steps = -(-options.steps // period) * period  # every method counts the same steps, with the same pauses
    turns: dict[str, list[Turn]] = defaultdict(list)
    for number in range(options.rounds):
        for situation, pause in _situations(options).items():
            task = Task(options.parameters, batch_size=8, pause=pause)
            once = collect_turns(
                one_host(options.ranks),
                Turns(task.model, methods, 1, steps, steps, warm_up=max(options.tau) + 1, count_bytes=False),
                title=f"{situation:<11}",
                timeout=options.timeout,
            )
            turns[situation] += [dataclasses.replace(turn, round=number) for turn in once]
    rows = [row for situation, own in turns.items() for row in _shares(situation, own, turns[UNDISTURBED])]
    rounds = [row for situation, own in turns.items() for row in every_turn({"situation": situation}, own)]
    write_results(options.output, {"straggler": rows, "rounds": rounds}, vars(options))
    print_table(rows)
    draw(options.output)


def draw(results: Path) -> None:
    """Draw the figure of a results directory from its table."""
    rows = read_rows(results / "straggler.csv")
    panels = [
        Panel(title, [row | _bar(row) for row in rows if row["situation"] == situation])
        for situation, title in ((STRAGGLER, "one rank is slow"), (JITTER, "all ranks pause at times"))
    ]
    draw_ratios(results / "figure.png", panels, "Time of a training step of the other ranks")


def _shares(situation: str, turns: Sequence[Turn], undisturbed: Sequence[Turn]) -> list[Row]:
    """One row for each method: its step rate as a share of two others."""
    rank_seconds = functools.partial(_seconds, others=situation == STRAGGLER)
    before = {(turn.method, turn.round): rank_seconds(turn) for turn in undisturbed}
    local = {turn.round: rank_seconds(turn) for turn in turns if turn.method == LOCAL}
    rows = []
    for name in dict.fromkeys(turn.method for turn in turns):
        own = {turn.round: rank_seconds(turn) for turn in turns if turn.method == name}
        own = {number: value for number, value in own.items() if number in local and (name, number) in before}
        if not own:
            continue
        shares = {
            "rate_of_undisturbed": [before[name, number] / value for number, value in own.items()],
            "rate_of_local": [local[number] / value for number, value in own.items()],
        }
        row: Row = {"situation": situation, "method": name, "ms_per_step": round(1e3 * fmean(own.values()), 3)}
        for column, values in shares.items():
            cells = median_and_range(values)
            row |= {f"{column}{end}": round(cell, 3) for end, cell in zip(("", "_min", "_max"), cells, strict=True)}
        rows.append(row)
    return rows


def _seconds(turn: Turn, others: bool) -> float:
    """Mean seconds per step, of all ranks or of all but the last."""
    return fmean(turn.seconds[:-1] if others else turn.seconds)


def _bar(row: Row) -> Row:
    """Step time in place of step rate."""
    low, middle, high = (float(row[f"rate_of_local{end}"]) for end in ("_max", "", "_min"))
    return {"ratio": 1 / middle, "ratio_min": 1 / low, "ratio_max": 1 / high}


if __name__ == "__main__":
    main()
