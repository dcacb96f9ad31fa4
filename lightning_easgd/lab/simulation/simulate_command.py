"""``easgd-simulate``: the time to error of one simulated run, and curves of it over workers, periods and links."""

import math
import sys
from functools import partial
from pathlib import Path

from lightning_easgd.lab.key_values import Actions, Examples, Values, build, check_new, run_action
from lightning_easgd.lab.simulation.scenario import Scenario
from lightning_easgd.lab.simulation.sweep import sweep, write_rows
from lightning_easgd.lab.simulation.sweep_figure import draw

__all__ = ["main", "run"]


def main() -> None:
    """Run the command."""
    sys.exit(run(sys.argv[1:]))


def _run(values: Values) -> int:
    """One simulated run: when the center reaches the target error, and what the workers waited for."""
    scenario = build(Scenario, values)
    simulated, timing = scenario.run(), scenario.time()
    seconds = simulated.time_to_error(scenario.target_error)
    reached = f"after {seconds:.4g} s" if math.isfinite(seconds) else f"not within {simulated.times[-1]:.4g} s"
    print(
        f"error {scenario.target_error:g}           {reached} (last reading {simulated.errors[-1]:.4g})\n"
        f"{scenario.steps} steps of all   {timing.seconds:.4g} s"
        f"{'' if timing.completed else ': ended by a dead worker'}\n"
        f"waiting              {100 * timing.waiting:.1f} % of the workers' time\n"
        f"exchanges            {timing.exchanges}"
    )
    return 0 if math.isfinite(seconds) else 1


def _sweep(
    values: Values,
    file: Path = Path("outputs/simulation/sweep.csv"),
    x: str = "workers",
    overwrite: bool = False,
) -> int:
    """All combinations of the values, with one worker alone beside them: a CSV file and its figure.

    In the figure the best of the learning rates is taken for each point.

    Args:
        values: Of the scenario's fields.
        file: The CSV file; the figure lies beside it.
        x: The key on the figure's abscissa.
        overwrite: Whether an earlier sweep's files are replaced.
    """
    if not file.name or file.suffix == ".png":
        raise ValueError(f"file={file}: this is no place for a table; give a CSV file, as file=sweep.csv")
    check_new(file, file.with_suffix(".png"), overwrite=overwrite)
    varied = {key: several for key, several in values.items() if len(several) > 1 or key == x}
    if x not in varied:
        raise ValueError(f"x={x}: the figure's abscissa needs values; give {x}=...,...")
    base = build(Scenario, {key: several[:1] for key, several in values.items()})
    rows = sweep(base, varied, report=lambda row: print(*(f"{key}={value}" for key, value in row.items()), flush=True))
    write_rows(rows, file)
    print(file)
    return _plot(file, x)


def _plot(file: Path, x: str = "workers") -> int:
    """The figure of a CSV file again.

    Args:
        file: The CSV file of a sweep.
        x: The key on the abscissa.
    """
    print(draw(file, x))
    return 0


_PURPOSE = (
    "predicts, in one process, how many workers learn, and how long they take on a given network: exchanges, waiting"
    " and failures are simulated in time, gradients are computed."
)
_ACTIONS: Actions = {"run": (_run, Scenario), "sweep": (_sweep, Scenario), "plot": (_plot,)}
_EXAMPLES: Examples = {
    "run": (
        "workers=16 tau=10 lr=0.5",
        "problem=digits workers=8 lr=0.3 schedule=async target=0.2",
        "workers=64 megabytes=100 bandwidth=1000 straggler=3",
    ),
    "sweep": (
        "workers=1,4,16,64 schedule=sync,async lr=0.2,0.5",
        "x=tau tau=1,4,16,64 workers=16 file=periods.csv",
        "workers=4,16 file=workers.csv overwrite=true",
    ),
    "plot": ("file=outputs/simulation/sweep.csv", "file=periods.csv x=tau", "file=workers.csv x=workers"),
}
run = partial(run_action, "easgd-simulate", _PURPOSE, _ACTIONS, _EXAMPLES)

if __name__ == "__main__":
    main()
