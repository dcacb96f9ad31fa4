"""Step time relative to local training as bars, and test errors as curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.ratios import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Panel", "draw_bars", "draw_curves"]

_OWN, _OTHERS, _LOCAL = "tab:blue", "tab:gray", "black"


@dataclass(frozen=True)
class Panel:
    """One system of axes: the methods of one setting.

    Attributes:
        title: Its title.
        rows: What :func:`harness.ratios.ratios` returns for the setting.
    """

    title: str
    rows: Sequence[Row]


def draw_bars(
    path: Path,
    panels: Sequence[Panel],
    *,
    title: str = "",
    what: str = "step time / local training",
    names: dict[str, str] | None = None,
) -> None:
    """Draw the ratios of each panel as horizontal bars beside each other; without matplotlib say so, and draw nothing.

    Args:
        path: The PNG file.
        panels: From left to right.
        title: Above all of them.
        what: What the bars are.
        names: What methods are called in the figure, in their order; None shows all by their labels.
    """
    shown = names or {row["method"]: row["method"] for panel in panels for row in panel.rows}
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    height = 1.1 + 0.3 * len(shown)
    figure = _figure((1.6 + 3.9 * columns, height * lines + 0.3 * bool(title)))
    if figure is None:
        return
    systems: Any = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes, panel in zip(systems, panels, strict=False):
        _draw(axes, panel, shown, what)
    for axes in list(systems)[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(axes: "Axes", panel: Panel, shown: dict[str, str], what: str) -> None:
    rows = {row["method"]: row for row in panel.rows}
    for place, method in enumerate(shown):
        if method not in rows:
            continue
        ratio, low, high = (float(rows[method][name]) for name in ("ratio", "ratio_min", "ratio_max"))
        color = _LOCAL if method.startswith("local") else _OWN if method.startswith("ea") else _OTHERS
        axes.barh(place, ratio, color=color, xerr=[[ratio - low], [high - ratio]], error_kw={"ecolor": "0.3"})
        axes.annotate(
            f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", (high, place), (4, 0), textcoords="offset points",
            va="center", fontsize="small",
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), list(shown.values()))
    axes.set(title=panel.title, xlabel=what)
    axes.set_ylim(len(shown) - 0.5, -0.5)  # the first on top
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    ratios = [float(row[name]) for row in rows.values() for name in ("ratio_min", "ratio_max")]
    smallest, largest = min(ratios, default=1.0), max(ratios, default=1.0)
    if largest > 6:
        axes.set_xscale("log")
        axes.set_xlim(min(0.7, 0.9 * smallest), largest * 2)
        ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if smallest / 2 < tick < largest * 2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        axes.set_xlim(0, largest * 1.2)
    axes.spines[["top", "right"]].set_visible(False)


Curves = Mapping[str, Sequence[tuple[float, float]]]


def draw_curves(
    path: Path,
    panels: Mapping[str, Curves],
    *,
    across: str = "seconds of training",
    target: float | None = None,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Draw curves of the test error; without matplotlib say so, and draw nothing.

    Args:
        path: The PNG file.
        panels: For each title the points of each curve by its label; systems of axes from left to right.
        across: What the errors are drawn over.
        target: The error to reach, a line.
        styles: How the line of each label looks; then there is one legend, beside the axes.
    """
    figure = _figure((0.6 + 4.6 * len(panels) + 1.6 * (styles is not None), 3.6))
    if figure is None:
        return
    systems: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False).flat
    for axes, (title, curves) in zip(systems, panels.items(), strict=True):
        for label, points in curves.items():
            style = {"marker": "."} if styles is None else styles[label]
            axes.plot(*zip(*points, strict=True), label=label, **style)
        if target is not None:
            axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
        axes.set(title=title, xlabel=across, ylabel="test error")
        if styles is None:
            axes.legend(fontsize="small")
    if styles is not None:
        handles = {line.get_label(): line for axes in figure.axes for line in axes.lines}
        figure.legend(handles=list(handles.values()), loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _figure(inches: tuple[float, float]) -> "Figure | None":
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        print("skipped: the figure: matplotlib is not installed; pip install 'lightning_easgd[demo]'")
        return None
    return Figure(figsize=inches, layout="constrained")
