"""What the extra ``demo`` brings: matplotlib and pandas, imported only where figures and tables need them."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MissingExtraError", "blank_figure", "demo_extra"]


class MissingExtraError(ModuleNotFoundError):
    """A package is missing that an extra brings; the message says what to install."""


@contextlib.contextmanager
def demo_extra() -> Iterator[None]:
    """Context in which a missing package is one sentence.

    Raises:
        MissingExtraError: Which says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise MissingExtraError(f"{package} is not installed; run pip install 'lightning_easgd[demo]'") from error


def blank_figure(inches: tuple[float, float], panels: int = 1, in_a_row: int = 4) -> tuple["Figure", list["Axes"]]:
    """Make a figure and its systems of axes, of so many inches each, with at most `in_a_row` side by side.

    Raises:
        MissingExtraError: If matplotlib is missing.
    """
    with demo_extra():
        # The object interface needs no display and leaves no global state.
        from matplotlib.figure import Figure  # noqa: PLC0415
    columns = min(panels, in_a_row)
    rows = -(-panels // columns)
    figure = Figure(figsize=(inches[0] * columns, inches[1] * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
