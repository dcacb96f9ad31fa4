"""`easgd-plot DIRECTORY`: figures and tables of a comparison once more, from its CSV files only."""

import sys
from pathlib import Path

from lightning_easgd.lab.demo_extra import MissingExtraError, demo_extra

__all__ = ["main"]

_COMMAND = "easgd-plot"


def main() -> None:
    """Run the command."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: {_COMMAND} DIRECTORY")
    try:
        with demo_extra():
            from lightning_easgd.lab.compare.compare_figures import draw  # noqa: PLC0415
            from lightning_easgd.lab.compare.records import CELLS  # noqa: PLC0415
            from lightning_easgd.lab.compare.tables import write_tables  # noqa: PLC0415
        directory = Path(sys.argv[1])
        if not (directory / CELLS).is_file():
            sys.exit(f"{_COMMAND}({directory}): there is no {CELLS}; give the directory of an easgd-compare")
        write_tables(directory)
        print(*draw(directory), sep="\n")
    except MissingExtraError as error:
        sys.exit(f"{_COMMAND}: {error}")


if __name__ == "__main__":
    main()
