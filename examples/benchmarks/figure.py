"""Draw the figures of results directories again, from their tables alone.

    python examples/benchmarks/run.py figure examples/results/step_cost/small examples/results/straggler

Which benchmark has written a directory is in its setting.json. The figure of several benchmarks is drawn by overview.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.command import parser

__all__ = ["main"]

_WITH_A_FIGURE = (
    "batchnorm_statistics",
    "gpu",
    "membership",
    "outer_rules",
    "slow_link",
    "stacked",
    "step_cost",
    "straggler",
    "time_to_accuracy",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw."""
    options = parser(__doc__)
    options.add_argument("directories", nargs="+", type=Path, metavar="DIRECTORY", help="results directories")
    for directory in options.parse_args(arguments).directories:
        setting = directory / "setting.json"
        if not setting.is_file():
            sys.exit(f"figure {directory}: there is no {setting.name}; give the directory that a benchmark has written")
        name = json.loads(setting.read_text(encoding="utf-8"))["command"].split()[2]
        if name not in _WITH_A_FIGURE:
            sys.exit(f"figure {directory}: {name} has none; those of {', '.join(_WITH_A_FIGURE)} do")
        importlib.import_module(name).draw(directory)
        print(f"figure: {directory / 'figure.png'}")


if __name__ == "__main__":
    main()
