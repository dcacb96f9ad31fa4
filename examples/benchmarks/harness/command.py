"""What the commands of the benchmarks have in common."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.methods import LOCAL, NAMES, Method, methods, why_missing
from harness.ranks import Place, RanksError, run_ranks
from harness.turns import Turn, Turns, take_turns

__all__ = ["add_method_options", "add_options", "chosen_methods", "collect_turns", "parser"]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_options(arguments: argparse.ArgumentParser, name: str, *, rounds: int, timeout: float = 1800.0) -> None:
    """Add what every benchmark takes."""
    arguments.add_argument("--rounds", type=int, default=rounds, help="how often each way is measured (%(default)s)")
    arguments.add_argument(
        "--timeout", type=float, default=timeout, help="seconds after which one setting is given up (%(default)g)"
    )
    default = Path("outputs", "benchmarks", name)
    arguments.add_argument("--output", type=Path, default=default, help="results directory (%(default)s)")


def add_method_options(arguments: argparse.ArgumentParser, *, taus: Sequence[int], names: Sequence[str]) -> None:
    """Add which methods are compared."""
    arguments.add_argument(
        "--methods", nargs="+", choices=NAMES, default=list(names), metavar="METHOD", help=f"of {', '.join(NAMES)}"
    )
    arguments.add_argument(
        "--tau", type=int, nargs="+", default=list(taus), help="communication periods, in steps (%(default)s)"
    )


def chosen_methods(options: argparse.Namespace) -> list[Method]:
    """The methods of the options that exist here, local training first; says which do not exist, and why."""
    for name in options.methods:
        reason = why_missing(name)
        if reason is not None:
            print(f"skipped: {name}: {reason}")
    return methods(dict.fromkeys([LOCAL, *options.methods]), options.tau)


def collect_turns(
    places: Sequence[Place],
    turns: Turns,
    *,
    title: str,
    timeout: float,
    keep: Callable[[list[Turn]], None] = lambda turns: None,
) -> list[Turn]:
    """Let the methods take turns, and print each; if a rank fails the turns until then remain.

    Args:
        places: One for each rank.
        turns: Who takes turns.
        title: Begins what is printed.
        timeout: Seconds after which the ranks are ended.
        keep: Called with all turns so far after each of them.
    """
    collected: list[Turn] = []

    def receive(turn: Turn) -> None:
        collected.append(turn)
        seconds = sum(turn.seconds) / len(turn.seconds)
        print(f"{title}  round {turn.round}  {turn.method:<24} {1e3 * seconds:9.3f} ms", flush=True)
        keep(collected)

    try:
        run_ranks(take_turns, places, turns, timeout=timeout, receive=receive)
    except RanksError as error:
        print(f"{title}: cut off after {len(collected)} turns: {error}", file=sys.stderr)
    return collected
