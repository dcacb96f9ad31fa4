"""`easgd-plot DIRECTORY`: figures and tables of a comparison once more, from its CSV files only."""

import sys
from pathlib import Path

from lightning_easgd.lab.compare.compare_figures import draw
from lightning_easgd.lab.compare.records import CELLS
from lightning_easgd.lab.compare.tables import write_tables

__all__ = ["main"]


def main() -> None:
    """Runs the command."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: easgd-plot DIRECTORY")
    directory = Path(sys.argv[1])
    if not (directory / CELLS).is_file():
        sys.exit(f"easgd-plot({directory}): there is no {CELLS}; give the directory of an easgd-compare")
    write_tables(directory)
    try:
        for path in draw(directory):
            print(path)
    except ModuleNotFoundError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
