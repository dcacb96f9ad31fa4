"""`easgd-plot DIRECTORY`: figures and tables of a comparison once more, from its CSV files only."""

import sys
from pathlib import Path

from lightning_easgd import __version__
from lightning_easgd.lab.demo_extra import MissingExtraError, demo_extra
from lightning_easgd.lab.unexpected import unexpected

__all__ = ["main"]

_COMMAND = "easgd-plot"
_USAGE = f"usage: {_COMMAND} DIRECTORY"
_HELP = f"""{_USAGE}

{_COMMAND} draws the figures and writes the tables of a comparison again, from the CSV files in its directory.

Examples:
  {_COMMAND} outputs/compare/quick
  {_COMMAND} examples/results/cifar10_tau_small
  {_COMMAND} --version"""


def main() -> None:
    """Run the command."""
    words = sys.argv[1:]
    if "--version" in words:
        print(f"{_COMMAND} {__version__}")
        return
    if not {"-h", "--help"}.isdisjoint(words):
        print(_HELP)
        return
    if len(words) != 1 or words[0].startswith("-"):
        sys.exit(f"{_USAGE}; {_COMMAND} --help explains it")
    try:
        with demo_extra():
            from lightning_easgd.lab.compare.compare_figures import draw  # noqa: PLC0415
            from lightning_easgd.lab.compare.records import CELLS  # noqa: PLC0415
            from lightning_easgd.lab.compare.tables import write_tables  # noqa: PLC0415
        directory = Path(words[0])
        if not (directory / CELLS).is_file():
            sys.exit(f"{_COMMAND}({directory}): there is no {CELLS}; give the directory of an easgd-compare")
        write_tables(directory)
        if not (figures := draw(directory)):
            sys.exit(f"{_COMMAND}({directory}): it has no finished run to draw; give another directory")
        print(*figures, sep="\n")
    except MissingExtraError as error:
        sys.exit(f"{_COMMAND}: {error}")
    except Exception as error:
        sys.exit(unexpected(_COMMAND, error))


if __name__ == "__main__":
    main()
