"""`easgd-simulate`: the time to error of one simulated run, and curves of it over workers, periods and links."""

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from lightning_easgd.lab.simulation.figures import draw
from lightning_easgd.lab.simulation.scenario import Scenario
from lightning_easgd.lab.simulation.sweep import sweep, write_rows

__all__ = ["main"]

_USAGE = """usage: easgd-simulate run   [key=value ...]
       easgd-simulate sweep [key=value,value,... ...] [x=workers] [file=outputs/simulation/sweep.csv]
       easgd-simulate plot  file=... [x=workers]
run:   one simulated run: when the center reaches the target error, and what the workers waited for
sweep: all combinations of the values, with one worker alone beside them; a CSV file and its figure, in which the
       best of the learning rates is taken for each point
plot:  the figure of a CSV file again
keys:  problem=quadratic|digits schedule=sync|async|round_robin|tree workers tau lr momentum alpha beta steps target
       step_seconds jitter straggler failures failure_seconds megabytes bandwidth latency upper_latency
       workers_per_node handling_seconds upper_tau groups dimension condition noise batch_size seed
       (bandwidth: 10^6 bytes/s; latency: seconds)"""


def main() -> None:
    """Runs the command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int | str:
    """Runs the command.

    Args:
        arguments: The words after the command's name.

    Returns:
        The exit status, or the sentence to end with.
    """
    actions = {"run": _run, "sweep": _sweep, "plot": _plot}
    if not arguments or arguments[0] not in actions:
        asked = bool(arguments) and arguments[0] in ("-h", "--help", "help")
        if asked:
            print(_USAGE)
        return 0 if asked else _USAGE
    try:
        return actions[arguments[0]](arguments[1:])
    except (ValueError, ModuleNotFoundError) as error:
        return f"easgd-simulate: {error}"


def _run(words: Sequence[str]) -> int:
    scenario = Scenario(**{key: _one(key, values) for key, values in _parse(words, ()).items()})
    run, timing = scenario.run(), scenario.time()
    seconds = run.time_to_error(scenario.target_error)
    reached = f"after {seconds:.4g} s" if math.isfinite(seconds) else f"not within {run.times[-1]:.4g} s"
    print(
        f"error {scenario.target_error:g}           {reached} (last reading {run.errors[-1]:.4g})\n"
        f"{scenario.steps} steps of all   {timing.seconds:.4g} s"
        f"{'' if timing.completed else ': ended by a dead worker'}\n"
        f"waiting              {100 * timing.waiting:.1f} % of the workers' time\n"
        f"exchanges            {timing.exchanges}"
    )
    return 0 if math.isfinite(seconds) else 1


def _sweep(words: Sequence[str]) -> int:
    given = _parse(words, ("x", "file"))
    file = Path(_one("file", given.pop("file", ["outputs/simulation/sweep.csv"])))
    x = _one("x", given.pop("x", ["workers"]))
    varied = {key: values for key, values in given.items() if len(values) > 1 or key == x}
    if x not in varied:
        raise ValueError(f"x={x}: the figure's abscissa needs values; give {x}=...,...")
    base = Scenario(**{key: values[0] for key, values in given.items()})
    rows = sweep(base, varied, report=lambda row: print(*(f"{key}={value}" for key, value in row.items()), flush=True))
    write_rows(rows, file)
    print(file)
    print(draw(file, x))
    return 0


def _plot(words: Sequence[str]) -> int:
    given = _parse(words, ("x", "file"))
    if set(given) - {"x"} != {"file"}:
        raise ValueError("plot needs file=..., and takes x=... beside it")
    print(draw(Path(_one("file", given["file"])), _one("x", given.get("x", ["workers"]))))
    return 0


def _one(key: str, values: list[Any]) -> Any:
    if len(values) != 1:
        raise ValueError(f"{key}={','.join(map(str, values))}: one value; several are for `sweep`")
    return values[0]


def _parse(words: Sequence[str], more: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each key, in the types of the scenario's fields."""
    types = {field.name: _type(field.type) for field in fields(Scenario)} | dict.fromkeys(more, str)
    given: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} cannot be read; write key=value")
        if key not in types:
            close = difflib.get_close_matches(key, types, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose one of: {', '.join(types)}"
            raise ValueError(f"there is no key {key!r}; {hint}")
        try:
            given[key] = [types[key](value) for value in values.split(",")]
        except ValueError as error:
            number = "whole number" if types[key] is int else "number"
            raise ValueError(f"{key}={values}: this is no {number}") from error
    return given


def _type(annotation: Any) -> type:
    """The type of a value that is given: of ``float | None`` it is ``float``."""
    given: type = next((each for each in get_args(annotation) if each is not type(None)), annotation)
    return given


if __name__ == "__main__":
    main()
