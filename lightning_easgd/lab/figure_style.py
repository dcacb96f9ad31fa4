"""What all figures have in common: a method's name, color and marker; systems of axes, ticks, limits and legends.

A figure is at most two systems of axes wide, so that it can be read on a telephone, too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning_easgd.lab.demo_extra import demo_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

__all__ = [
    "CENTER_STYLE", "FEW_POINTS", "METHODS", "MODEL_STYLE", "WORKER_STYLE", "LineStyle", "blank_figure", "fit_to_most",
    "legend_below", "legend_under", "method_styles", "percent", "plot", "readable_log", "save", "value_styles",
]  # fmt: skip

# The palette of Okabe and Ito, which people with any kind of color vision can tell apart; without its yellow, which
# is too light for a line on white.
_BLACK, _ORANGE, _SKY, _GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
_BLUE, _VERMILLION, _PURPLE, _GRAY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"
_SOLID, _DASHED, _DOTTED, _BROKEN = "-", "--", ":", "-."

FEW_POINTS = 12
"""A series of so many points shows each of them."""
_MARKERS_OF_A_LONG_SERIES = 6
_INCHES = {1: (5.6, 3.4), 2: (3.6, 2.9)}  # of one system of axes, by the number of columns
_DOTS_PER_INCH = 150
# Above so many medians of the others a curve's end is not what an axis is made for.
_TOO_LONG, _TOO_HIGH = 2.0, 1.6
_BEGINNING = 2.5  # a curve that begins above so many of the highest ends enters the picture from above


Values: TypeAlias = "Sequence[float] | NDArray[Any]"


@dataclass(frozen=True)
class LineStyle:
    """How a series looks.

    Attributes:
        label: What it is called, in plain words.
        color: Of line, marker and bar.
        marker: Of its points.
        dashes: Of its line.
    """

    label: str
    color: str
    marker: str
    dashes: str = _SOLID

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dashes}


# A color for each family of methods, in it a marker and dashes for each method.
METHODS = {
    "easgd": LineStyle("EASGD", _BLUE, "o"),
    "easgd_async": LineStyle("EASGD, asynchronous", _BLUE, "s", _DASHED),
    "easgd_async delayed": LineStyle("EASGD, asynchronous, delayed", _BLUE, "<", _BROKEN),
    "easgd_async delayed int8": LineStyle("EASGD, asynchronous, delayed, int8", _BLUE, ">", _DOTTED),
    "easgd int8": LineStyle("EASGD, int8", _BLUE, "d", _DOTTED),
    "easgd bfloat16": LineStyle("EASGD, bfloat16", _BLUE, "p", _BROKEN),
    "easgd center on cpu": LineStyle("EASGD, center on the CPU", _BLUE, "h", _BROKEN),
    "round_robin": LineStyle("EASGD, round-robin", _SKY, "v", _DASHED),
    "tree": LineStyle("EASGD, tree of centers", _SKY, "^", _BROKEN),
    "family": LineStyle("family, momentum at the center", _SKY, "*"),
    "replicated_sgd": LineStyle("replicated SGD", _SKY, "P"),
    "eamsgd": LineStyle("EAMSGD", _VERMILLION, "D"),
    "eamsgd_async": LineStyle("EAMSGD, asynchronous", _VERMILLION, "s", _DASHED),
    "eamsgd_0.9": LineStyle("EAMSGD, δ = 0.9", _VERMILLION, "d", _BROKEN),
    "weak": LineStyle("EAMSGD, α ≈ 0 (control)", _VERMILLION, "x", _DOTTED),
    "float32": LineStyle("EAMSGD, float32", _VERMILLION, "o"),
    "bfloat16": LineStyle("EAMSGD, bfloat16", _VERMILLION, "p", _BROKEN),
    "int8": LineStyle("EAMSGD, int8", _VERMILLION, "h", _DOTTED),
    "downpour": LineStyle("DOWNPOUR", _PURPLE, "v"),
    "adownpour": LineStyle("ADOWNPOUR", _PURPLE, "<", _DASHED),
    "mvadownpour": LineStyle("MVADOWNPOUR", _PURPLE, ">", _BROKEN),
    "mdownpour": LineStyle("MDOWNPOUR", _PURPLE, "d", _DOTTED),
    "post_local_sgd": LineStyle("post-local SGD", _GREEN, "P"),
    "local_sgd": LineStyle("local SGD", _GREEN, "X", _DASHED),
    "local_sgd delayed": LineStyle("local SGD, delayed", _GREEN, "<", _BROKEN),
    "diloco": LineStyle("DiLoCo", _GREEN, "D"),
    "flat_local_sgd": LineStyle("local SGD, one buffer", _GREEN, "o", _DASHED),
    "accelerate": LineStyle("LocalSGD of accelerate", _GREEN, "s", _BROKEN),
    "torchft": LineStyle("LocalSGD of torchft", _GREEN, "^", _DOTTED),
    "torchft_diloco": LineStyle("DiLoCo of torchft", _GREEN, "v", _DASHED),
    "ddp": LineStyle("DDP", _BLACK, "s"),
    "ddp_momentum": LineStyle("DDP, momentum", _BLACK, "d", _DASHED),
    "ddp fp16": LineStyle("DDP, fp16", _BLACK, "x", _DOTTED),
    "local": LineStyle("no communication", _GRAY, "x", _DASHED),
    "local again": LineStyle("no communication, again", _GRAY, "+", _DOTTED),
    "raw_socket": LineStyle("plain sockets, no averaging", _GRAY, "*", _BROKEN),
    "sgd": LineStyle("SGD, one process", _ORANGE, "o", _DASHED),
    "msgd": LineStyle("momentum SGD, one process", _ORANGE, "^"),
    "asgd": LineStyle("averaged SGD, one process", _ORANGE, "<", _BROKEN),
    "mvasgd": LineStyle("moving-average SGD, one process", _ORANGE, ">", _DOTTED),
}  # fmt: skip

CENTER_STYLE = LineStyle("center", _BLUE, "o")
MODEL_STYLE = LineStyle("model", _BLACK, "o")
WORKER_STYLE = LineStyle("each worker", _ORANGE, ".")

# For what has no place in the table, such as a grid's own label.
_OTHERS = [
    (color, marker, dashes)
    for dashes, markers in ((_SOLID, "*H8X"), (_DOTTED, "X8H*"))
    for marker in markers
    for color in (_GREEN, _PURPLE, _SKY, _VERMILLION, _ORANGE, _BLUE, _BLACK, _GRAY)
]


def method_styles(names: Iterable[str]) -> dict[str, LineStyle]:
    """Return the style of each method; of the names that no method has here, different ones in their order.

    A period in a name, as in "easgd tau=10", goes into the label.
    """
    styles: dict[str, LineStyle] = {}
    others = 0
    for name in dict.fromkeys(names):
        method, _, tau = name.partition(" tau=")
        if method in METHODS:
            style = METHODS[method]
        else:
            color, marker, dashes = _OTHERS[others % len(_OTHERS)]
            style = LineStyle(method.replace("_", " "), color, marker, dashes)
            others += 1
        label = f"{style.label}, τ = {tau}" if tau else style.label
        styles[name] = LineStyle(label, style.color, style.marker, style.dashes)
    return styles


def value_styles(labels: Sequence[str]) -> list[LineStyle]:
    """Return styles for rising values of one quantity: from dark to light, as their order is what counts.

    The colors are viridis', whose lightness rises evenly for people with any kind of color vision.
    """
    with demo_extra():
        from matplotlib import colormaps  # noqa: PLC0415
        from matplotlib.colors import to_hex  # noqa: PLC0415
    dashes = (_SOLID, _DASHED, _BROKEN, _DOTTED)
    last = max(len(labels) - 1, 1)
    return [
        LineStyle(label, to_hex(colormaps["viridis"](0.8 * place / last)), "os^Dv<>"[place % 7], dashes[place % 4])
        for place, label in enumerate(labels)
    ]


def blank_figure(
    panels: int = 1, title: str = "", inches: tuple[float, float] | None = None
) -> tuple["Figure", list["Axes"]]:
    """Make a figure and its systems of axes, at most two side by side.

    Args:
        panels: How many systems of axes.
        title: What is compared, above all of them.
        inches: Of one system of axes; None for the usual size.

    Raises:
        MissingExtraError: If matplotlib is missing.
    """
    with demo_extra():
        # The object interface needs no display and leaves no global state.
        from matplotlib.figure import Figure  # noqa: PLC0415
        from matplotlib.ticker import MaxNLocator  # noqa: PLC0415
    columns = min(panels, 2)
    rows = -(-panels // columns)
    width, height = inches or _INCHES[columns]
    figure = Figure(figsize=(width * columns, height * rows + 0.35 * bool(title)), layout="constrained")
    systems = [figure.add_subplot(rows, columns, index + 1) for index in range(panels)]
    for axes in systems:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if title:
        figure.suptitle(title, fontweight="bold", fontsize="large")
    return figure, systems


def percent(shares: Iterable[float]) -> list[float]:
    """Shares of one as percentages."""
    return [100.0 * float(share) for share in shares]


def plot(
    axes: "Axes",
    x: Values,
    y: Values,
    style: LineStyle,
    band: tuple[Values, Values] | None = None,
    **more: Any,
) -> "Line2D":
    """Draw a series: each of its points if they are few, else some.

    Args:
        axes: Where.
        x: Of its points.
        y: The same.
        style: How it looks.
        band: The smallest and the largest value at each point.
        more: For `Axes.plot`, in place of the style's.
    """
    every = 1 if len(x) <= FEW_POINTS else -(-len(x) // _MARKERS_OF_A_LONG_SERIES)
    given = {"label": style.label, **style.line, "markersize": 4.5, "markevery": every, "linewidth": 1.6, **more}
    (line,) = axes.plot(x, y, **given)
    if band is not None:
        axes.fill_between(x, *band, color=style.color, alpha=0.15, linewidth=0, label=f"_{line.get_label()}")
    return line


def fit_to_most(systems: Sequence["Axes"], x_unit: str, y_unit: str) -> None:
    """Fit all axes to most of the curves of an error, so that none that diverges or is very slow stretches them.

    What is not shown of a curve is said below the axes. All systems of axes get the same limits.

    Args:
        systems: All of one figure; curves are their lines that have a label.
        x_unit: The unit of what the curves are drawn over.
        y_unit: The unit of the error.
    """
    lines = [line for axes in systems for line in axes.lines if not str(line.get_label()).startswith("_")]
    curves = [(_floats(line.get_xdata()), _floats(line.get_ydata())) for line in lines]
    curves = [(x, y) for x, y in curves if x]
    if not curves:
        return
    right = _usual([x[-1] for x, _ in curves], _TOO_LONG)
    highest_end = _usual([y[-1] for _, y in curves], _TOO_HIGH)
    near = [[value for value in y if math.isfinite(value)] for _, y in curves if y[-1] <= highest_end]
    shown = [y for y in near if y] or [[0.0, 1.0]]
    low, top = min(map(min, shown)), min(max(map(max, shown)), _BEGINNING * highest_end)
    margin = 0.06 * (top - low) or 0.05 * abs(top) or 1.0
    places = [place for x, y in curves if y[-1] <= highest_end for place in x if place > 0]
    longest = 0
    for axes in systems:
        axes.set_ylim(low - margin, top + margin)
        linear = axes.get_xscale() == "linear"
        if linear:
            axes.set_xlim(-0.03 * right, 1.04 * right)
        elif places:
            axes.set_xlim(min(places) / 1.2, max(places) * 1.2)
            readable_log(axes.xaxis)
        hidden = {f"_{line.get_label()}" for line in axes.lines if not _ends_within(line, top + margin)}
        for collection in axes.collections:
            collection.set_visible(collection.get_label() not in hidden)
        notes = _left_out(axes, right if linear else math.inf, top + margin, x_unit, y_unit)
        if notes:
            axes.annotate(
                "\n".join(["Not shown:", *notes]), (0.5, 0), (0, -36), xycoords="axes fraction",
                textcoords="offset points", ha="center", va="top", fontsize="small", color="0.3",
            )  # fmt: skip
        longest = max(longest, len(notes))
    figure: Any = systems[0].figure
    rows = -(-len(systems) // 2)
    figure.set_figheight(figure.get_figheight() + rows * 0.17 * (longest + 1 if longest else 0))


def _left_out(axes: "Axes", right: float, top: float, x_unit: str, y_unit: str) -> list[str]:
    notes = []
    for line in axes.lines:
        x, y = _floats(line.get_xdata()), _floats(line.get_ydata())
        if not x or str(line.get_label()).startswith("_"):
            continue
        if not _ends_within(line, top):
            how = f"ends at {y[-1]:.3g} {y_unit}" if math.isfinite(y[-1]) else "diverges"
            notes.append(f"{line.get_label()} {how}")
        elif x[-1] > 1.04 * right:
            notes.append(f"{line.get_label()}, to {x[-1]:.3g} {x_unit} ({y[-1]:.3g} {y_unit})")
    return notes


def _ends_within(line: "Line2D", top: float) -> bool:
    y = _floats(line.get_ydata())
    return not y or y[-1] <= top  # not so if it is not a number


def _usual(ends: Sequence[float], times: float) -> float:
    """The largest of some numbers that is not far from most of them."""
    finite = sorted(end for end in ends if math.isfinite(end))
    if not finite:
        return 1.0
    if len(finite) < 3:  # neither of two is the usual one
        return finite[-1]
    return max(end for end in finite if end <= times * finite[len(finite) // 2])


def _floats(data: Any) -> list[float]:
    return [float(value) for value in data]


def readable_log(axis: "Axis") -> None:
    """Make an axis logarithmic, its limits being known, with ticks in plain numbers that one can read."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter  # noqa: PLC0415

    axes: Any = axis.axes
    axes.set(**{f"{'x' if axis is axes.xaxis else 'y'}scale": "log"})
    low, high = sorted(axis.get_view_interval())
    ticks = _log_ticks(low, high)
    axis.set_major_locator(FixedLocator(ticks) if ticks else MaxNLocator(4, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axis.set_minor_formatter(NullFormatter())


def _log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten between two limits, with others between them where those are few; none if all are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            every = -(-len(ticks) // 6)
            return ticks[::every]
    return []


def _plain(value: float) -> str:
    if value <= 0:  # a linear locator looks beyond the limits
        return ""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = value / 10**exponent
    return f"$10^{{{exponent}}}$" if f"{factor:g}" == "1" else f"${factor:g}·10^{{{exponent}}}$"


def legend_below(figure: "Figure") -> None:
    """Say once for all systems of axes, below them, which line is what; of lines that are in sight somewhere."""
    handles: dict[str, Line2D] = {}
    for axes in figure.axes:
        for line in axes.lines:
            label = str(line.get_label())
            if not label.startswith("_") and _in_sight(axes, line):
                handles.setdefault(label, line)
    if not handles:
        return
    width = figure.get_figwidth()
    columns = max(1, min(len(handles), int(width / (0.55 + 0.085 * max(map(len, handles))))))
    rows = -(-len(handles) // columns)
    columns = -(-len(handles) // rows)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    # What is drawn in the figure may be short: a legend's line is long enough to show its dashes.
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False,
        fontsize="medium", handlelength=2.4,
    )  # fmt: skip


def legend_under(axes: "Axes") -> None:
    """Say below one system of axes which line is what, where each has lines of its own."""
    from matplotlib.transforms import ScaledTranslation  # noqa: PLC0415

    figure: Any = axes.figure
    labels = axes.get_legend_handles_labels()[1]
    columns = 2 if all(len(label) < 12 for label in labels) else 1
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(labels) // columns))
    below_the_label = axes.transAxes + ScaledTranslation(0, -0.5, figure.dpi_scale_trans)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below_the_label, ncols=columns, frameon=False,
        fontsize="small", handlelength=2.4,
    )  # fmt: skip


def _in_sight(axes: "Axes", line: "Line2D") -> bool:
    """Whether a line has a point between the limits; a line without points stands for what is no line."""
    x, y = _floats(line.get_xdata()), _floats(line.get_ydata())
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    across = line.get_transform() != axes.transData  # axhline, axvline
    return not x or across or any(left <= a <= right and low <= b <= high for a, b in zip(x, y, strict=True))


def save(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG; return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return path
