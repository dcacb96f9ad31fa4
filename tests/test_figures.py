"""What every figure keeps to, read from the figure itself: names, colors, marks, ticks, units, limits, room."""

import csv
import importlib
import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from application import CONF, ROOT, options
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from omegaconf import OmegaConf

from lightning_easgd.lab import figure_style as style
from lightning_easgd.lab import plots, sweep_summary
from lightning_easgd.lab.compare.compare_figures import draw as draw_comparison
from lightning_easgd.lab.simulation import sweep_figure
from lightning_easgd.lab.stability import stability_figures

sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

pytestmark = pytest.mark.timeout(120)
RESULTS = ROOT / "examples" / "results"
COMPARISONS = sorted(path.parent.name for path in RESULTS.glob("*/cells.csv"))
BENCHMARKS = sorted(
    str(path.parent.relative_to(RESULTS))
    for path in RESULTS.rglob("setting.json")
    if (path.parent / "figure.png").exists()
)
SWEEPS = {"workers": "workers", "bandwidth": "bandwidth", "latency": "latency", "digits": "workers"}
# An axis' label ends with one of these, unless it is a number of things or without dimension.
UNITS = (", s", ", %", ", % points", ", MB", ", MB/s", ", epochs", ", steps", ", 10⁻³", "σ²/h²", ", s (best η)")
WITHOUT_UNIT = (
    "steps",
    "workers",
    "turns",
    "distance",
    "multiples",
    "rate",
    "penalty",
    "radius",
    "relative",
    "start",
    ", p",
)


@pytest.fixture
def drawn(monkeypatch):
    """Figures that are written, by the file's name."""
    found = {}

    def savefig(figure, path, **arguments):
        found[Path(path).name] = figure
        written(figure, path, **arguments)

    written = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.fixture
def sketched(monkeypatch):
    """Figures that would be written, by the file's name: to make the images of many takes half of the time."""
    found = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **arguments: found.update({Path(path).name: figure}))
    return found


def copied(name, tmp_path):
    """The tables of committed results, without the figures."""
    for path in (RESULTS / name).rglob("*"):
        if path.suffix in (".csv", ".json"):
            target = tmp_path / path.relative_to(RESULTS / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path


def series(axes):
    return [line for line in axes.lines if not line.get_label().startswith("_") and len(line.get_xdata())]


def is_colorbar(axes):
    return axes.get_label() == "<colorbar>"


def texts_of(figure):
    """Every text that is drawn: titles, labels, ticks in view, legends, notes."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            middle = (high - low) * 1e-9
            for place, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True):
                if low - middle <= place <= high + middle and axis.get_visible():
                    yield label
            yield axis.label
        yield axes.title
        yield from axes.texts
        if axes.get_legend():
            yield from axes.get_legend().get_texts()
    for legend in figure.legends:
        yield from legend.get_texts()
    if figure.get_suptitle():
        yield next(text for text in figure.findobj(Text) if text.get_text() == figure.get_suptitle())


def check(figure):
    """What holds of any figure."""
    figure.draw_without_rendering()
    assert figure.get_suptitle(), "says what is compared"
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure) if text.get_text().strip()]
    page = figure.bbox
    for text, box in boxes:
        assert box.x0 >= page.x0 - 1, text
        assert box.x1 <= page.x1 + 1, text
        assert box.y0 >= page.y0 - 1, text
        assert box.y1 <= page.y1 + 1, text
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        apart = (
            first.x1 <= second.x0 + 1
            or second.x1 <= first.x0 + 1
            or first.y1 <= second.y0 + 1
            or second.y1 <= first.y0 + 1
        )
        assert apart, f"{one!r} and {other!r} overlap"
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for legend, axes in itertools.product(legends, figure.axes):
        assert not legend.get_window_extent().overlaps(axes.get_window_extent()), "beside the axes"
    assert figure.get_figwidth() <= 7.3, "10 points are to be read on a telephone"
    for axes in figure.axes:
        check_axes(axes)


def check_axes(axes):
    for axis in (axes.xaxis, axes.yaxis):
        words = [label.get_text() for label in axis.get_majorticklabels() if label.get_text()]
        named = words and not any(word.strip("$−").replace("^", "").replace("{", "")[:1].isdigit() for word in words)
        label = axis.get_label_text()
        if label or not (named or is_colorbar(axes) or not words):
            assert label.endswith(UNITS) or any(word in label for word in WITHOUT_UNIT), label
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            assert sum(low <= place <= high for place in axis.get_majorticklocs()) >= 2, "a log axis can be read"
    if is_colorbar(axes):
        return
    assert axes.lines or axes.collections or axes.patches, "an empty panel"
    (left, right), (low, high) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    for line in series(axes):
        if (
            len(line.get_xdata()) <= style.FEW_POINTS
            and line.get_transform() == axes.transData
            and line.get_markersize()
        ):
            assert line.get_marker() not in ("", "None", None), f"{line.get_label()}: each of its few points"
            assert line.get_markevery() in (None, 1)
    assert left < right
    assert low < high


def colors_by_label(figures):
    found = {}
    for figure in figures:
        for axes in figure.axes:
            for line in series(axes):
                found.setdefault(line.get_label().partition(", τ")[0], set()).add(
                    (to_hex(line.get_color()), line.get_marker(), line.get_linestyle())
                )
    return found


# The table of methods


def test_no_two_methods_look_alike_or_have_one_name():
    looks = [(each.color, each.marker, each.dashes) for each in style.METHODS.values()]
    assert len(set(looks)) == len(looks)
    assert len({each.label for each in style.METHODS.values()}) == len(looks)
    assert not any("_" in each.label for each in style.METHODS.values()), "plain names"


def test_the_colors_are_of_okabe_and_ito():
    palette = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"}
    assert {each.color for each in style.METHODS.values()} <= palette


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_shipped_methods_name_is_in_the_table(experiment):
    grid = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml").get("grid", {})
    assert set(grid.get("methods", {})) <= set(style.METHODS)


def test_every_option_of_method_is_in_the_table():
    assert set(options("method")) <= set(style.METHODS)


def test_a_label_of_ones_own_gets_a_style_of_its_own_and_the_others_keep_theirs():
    own = [f"my_rate_{number}" for number in range(20)]
    styles = style.method_styles(["easgd", *own, "ddp tau=4"])
    assert styles["easgd"] == style.METHODS["easgd"]
    assert styles["my_rate_3"].label == "my rate 3"
    assert styles["ddp tau=4"].label == "DDP, τ = 4"
    assert len({(each.color, each.marker, each.dashes) for each in styles.values()}) == len(styles)


# All figures from committed tables


def test_a_method_has_one_color_and_name_in_all_figures(sketched, tmp_path):
    for name in COMPARISONS:
        files = draw_comparison(copied(name, tmp_path / name))
        assert {path.name for path in files} >= {path.name for path in (RESULTS / name).glob("*.png")}
        for path in files:
            sketched[f"{name} {path.name}"] = sketched.pop(path.name)
    for name in BENCHMARKS:
        results = copied(name, tmp_path / name)
        module = json.loads((results / "setting.json").read_text())["command"].split()[2]
        importlib.import_module(module).draw(results)
        sketched[name] = sketched.pop("figure.png")
    importlib.import_module("overview").main(
        [
            "--fast", str(RESULTS / "step_cost" / "10M"), "--slow", str(RESULTS / "slow_link" / "100mbit"),
            "--slow-tau", "100", "--output", str(tmp_path / "overview.png"),
        ]
    )  # fmt: skip
    sweeps = copied("simulation", tmp_path / "simulation")
    for name, x in SWEEPS.items():
        sweep_figure.draw(sweeps / f"{name}.csv", x)
    for name, figure in sketched.items():
        try:
            check(figure)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    found = colors_by_label(sketched.values())
    assert {label: looks for label, looks in found.items() if len(looks) > 1} == {}
    known = {each.label: each.color.lower() for each in style.METHODS.values()}
    assert {"EASGD", "EAMSGD", "DDP"} <= set(found)
    assert all(color == known[label] for label, looks in found.items() if label in known for color, *_ in looks)


def test_the_stability_figures(drawn, tmp_path):
    stability_figures.draw(tmp_path, points=24)
    assert [len(figure.axes) for figure in drawn.values()] == [3 + 2, 3, 2]
    for figure in drawn.values():
        check(figure)


# A run


def a_run(path, scores=(), distances=()):
    path.mkdir(parents=True, exist_ok=True)
    if scores:
        lines = [f"val,{step},{weights},{accuracy}" for step, weights, accuracy in scores]
        (path / "accuracy.csv").write_text("\n".join(["stage,step,weights,accuracy", *lines, ""]))
    if distances:
        (path / "communication.csv").write_text("rank,steps\n0,1\n")
        (path / "elastic").mkdir()
        for rank, rows in enumerate(distances):
            text = "".join(f"{step},{distance}\n" for step, distance in rows)
            (path / "elastic" / f"rank_{rank}.csv").write_text("step,distance\n" + text)
    return path


def test_the_figure_of_a_run(drawn, tmp_path):
    plots.draw(copied("digits", tmp_path))
    figure = drawn["figure.png"]
    check(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["each worker", "center"]
    assert [axes.get_title() for axes in figure.axes] == [
        "accuracy on held-out data",
        "how far the workers are from it",
    ]


def test_a_run_of_one_validation_shows_its_points(drawn, tmp_path):
    scores = [(10, "center", 0.5), (10, "worker_0", 0.4), (10, "worker_1", 0.3)]
    plots.draw(a_run(tmp_path, scores, [[(10, 0.1)], [(10, 0.2)]]))
    figure = drawn["figure.png"]
    check(figure)
    assert [len(series(axes)) for axes in figure.axes] == [3, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["each worker", "center"]


@pytest.mark.parametrize(
    ("scores", "distances", "labels"),
    [
        ([(10, "center", 0.5), (20, "center", 0.6)], [], ["validation accuracy, %"]),
        ([], [[(10, 0.1)], []], ["elastic distance ‖xᵢ − x̃‖"]),
        ([(10, "center", 0.5)], [[(10, "")]], ["validation accuracy, %"]),
    ],
)
def test_an_empty_panel_is_left_out(drawn, tmp_path, scores, distances, labels):
    assert plots.draw(a_run(tmp_path, scores, distances)) == tmp_path / "figure.png"
    assert [axes.get_ylabel() for axes in drawn["figure.png"].axes] == labels
    check(drawn["figure.png"])


def test_a_run_without_files_has_no_figure(tmp_path, monkeypatch):
    assert plots.draw(tmp_path) is None
    monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
    with pytest.raises(SystemExit, match="there is nothing to draw"):
        plots.main()
    assert not list(tmp_path.iterdir())


def test_equal_ranks_of_ddp_are_one_model(drawn, tmp_path):
    scores = [(step, weights, 0.5) for step in (1, 2) for weights in ("center", "worker_0", "worker_1")]
    plots.draw(a_run(tmp_path, scores))
    (axes,) = drawn["figure.png"].axes
    assert [line.get_label() for line in series(axes)] == ["model"]


def test_many_points_are_marked_now_and_then(drawn, tmp_path):
    plots.draw(a_run(tmp_path, [(step, "center", 0.5) for step in range(1, 101)]))
    (line,) = series(drawn["figure.png"].axes[0])
    assert 4 <= 100 / line.get_markevery() <= 10


# Limits


def curves_on(*curves, log=False):
    figure, (axes,) = style.blank_figure(1, "test")
    for label, x, y in curves:
        style.plot(axes, x, y, style.LineStyle(label, "#000000", "o"), band=(y, y))
    axes.set(xlabel="time, s", ylabel="error, %", **({"xscale": "log"} if log else {}))
    style.fit_to_most([axes], "s", "%")
    style.legend_below(figure)
    return figure, axes


USUAL = [(name, [1, 5, 10], [60, 40, 30 + number]) for number, name in enumerate("abc")]


@pytest.mark.parametrize(
    ("control", "says"),
    [
        (("worst", [1, 5, 10], [90, 90, 90]), "worst ends at 90 %"),
        (("lost", [1, 5, 10], [60, np.nan, np.nan]), "lost diverges"),
        (("huge", [1, 5, 10], [60, 1e9, 1e30]), "huge ends at 1e+30 %"),
        (("slow", [10, 50, 100], [60, 40, 30]), "slow, to 100 s (30 %)"),
    ],
)
def test_a_control_does_not_stretch_the_axes_and_is_told(control, says):
    figure, axes = curves_on(*USUAL, control)
    assert axes.get_ylim()[1] < 65
    assert axes.get_xlim()[1] < 12
    assert axes.get_ylim()[0] > 20
    assert [text.get_text() for text in axes.texts] == [f"Not shown:\n{says}"]
    check(figure)


def test_without_a_control_everything_is_in_sight():
    figure, axes = curves_on(*USUAL)
    assert not axes.texts
    for _, x, y in USUAL:
        assert axes.get_xlim()[0] < min(x) <= max(x) < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < min(y) <= max(y) < axes.get_ylim()[1]
    check(figure)


@pytest.mark.parametrize("other", [([1, 5, 10], [60, 55, 50]), ([10, 100, 1000], [90, 90, 90])])
def test_of_two_curves_neither_is_a_control(other):
    _, axes = curves_on(("a", [1, 2, 3], [50, 20, 10]), ("b", *other))
    assert not axes.texts
    assert axes.get_xlim()[1] >= max(other[0])
    assert axes.get_ylim()[1] >= max(other[1])


@pytest.mark.parametrize("value", [0.0, 37.0, np.nan])
def test_one_point_alone(value):
    figure, axes = curves_on(("a", [3], [value]))
    assert axes.get_xlim()[0] < 3 < axes.get_xlim()[1]
    check(figure)


@pytest.mark.parametrize(
    ("low", "high"), [(4, 5), (0.98, 1.02), (10, 200), (1, 30), (1e-4, 0.1), (1, 1e6), (3e-9, 4e9), (90, 110)]
)
@pytest.mark.parametrize("axis", ["x", "y"])
def test_ticks_of_a_log_axis_can_be_read(low, high, axis):
    figure, (axes, _) = style.blank_figure(2, "test")
    axes.set(**{f"{axis}lim": (low, high)})
    style.readable_log(getattr(axes, f"{axis}axis"))
    figure.draw_without_rendering()
    labels = [
        label
        for place, label in zip(
            getattr(axes, f"{axis}axis").get_majorticklocs(),
            getattr(axes, f"{axis}axis").get_majorticklabels(),
            strict=True,
        )
        if low <= place <= high
    ]
    assert 2 <= len(labels) <= 7
    assert all(label.get_text() for label in labels)
    assert not any("e" in label.get_text() for label in labels)
    assert not any(label.get_text() for label in axes.xaxis.get_minorticklabels())
    boxes = [label.get_window_extent() for label in labels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


# Comparisons of other shapes


def comparison(path, rows, times=()):
    """CSV files of a comparison; a row is label, tau, workers, panel_tau, panel_workers, its curve."""
    path.mkdir(parents=True, exist_ok=True)
    setting = ["label", "tau", "workers", "panel_tau", "panel_workers"]
    tables = {
        "selection.csv": ([*setting, "lr", "chosen"], [[*row[:5], 0.1, "yes"] for row in rows]),
        "cells.csv": (
            ["cell", *setting, "lr", "seed"],
            [[number, *row[:5], 0.1, 0] for number, row in enumerate(rows)],
        ),
        "curves.csv": (
            ["cell", "step", "epochs", "seconds", "bytes_sent", "test_error"],
            [
                [number, step, step, step, sent, error]
                for number, row in enumerate(rows)
                for step, sent, error in row[5]
            ],
        ),
        "times.csv": ([*setting, "target_error", "seconds"], times),
    }
    for name, (header, lines) in tables.items():
        with (path / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *lines])
    return path


CURVE = [(1, 1e6, 0.5), (2, 2e6, 0.4)]


def test_an_untaken_target_and_a_silent_method_leave_no_panel(drawn, tmp_path):
    rows = [("local", "", 2, "", 2, [(1, 0, 0.5)]), ("msgd", "", 1, "", "", [(1, 0, 0.6)])]
    times = [("local", "", 2, "", 2, 0.5, 3.0), ("local", "", 2, "", 2, 0.1, "")]
    files = draw_comparison(comparison(tmp_path, rows, times))
    assert [path.name for path in files] == ["error_by_seconds.png", "error_by_epochs.png", "time_to_error.png"]
    assert [axes.get_title() for axes in drawn["time_to_error.png"].axes] == ["to 50 % test error"]
    for figure in drawn.values():
        check(figure)


def test_a_panel_in_which_nothing_of_the_grid_has_run_is_left_out(drawn, tmp_path):
    rows = [("easgd", 1, 2, 1, 2, CURVE), ("easgd", 4, 4, 4, 4, CURVE), ("msgd", "", 1, "", "", CURVE)]
    draw_comparison(comparison(tmp_path, rows))
    assert [axes.get_title() for axes in drawn["error_by_seconds.png"].axes] == [
        "exchange every step, 2 workers",
        "exchange every 4 steps, 4 workers",
    ]


def test_thirteen_methods_over_four_periods(sketched, tmp_path):
    labels = list(OmegaConf.load(CONF / "experiment" / "cifar10_tau.yaml").grid.methods)
    rows = [(label, tau, 4, tau, 4, CURVE) for label in labels for tau in (1, 4, 16, 64)]
    times = [(label, tau, 4, tau, 4, 0.4, 1 + number) for number, label in enumerate(labels) for tau in (1, 4, 16, 64)]
    draw_comparison(comparison(tmp_path, rows, times))
    for figure in sketched.values():
        check(figure)
        assert len(figure.legends[0].get_texts()) == len(labels)


# Sweeps of the simulator


def test_settings_of_one_schedule_are_compared_in_one_system_of_axes(drawn, tmp_path):
    header = "schedule,workers,lr,tau,seconds_to_error,last_error,exchanges\n"
    lines = [f"sync,{p},0.1,{tau},{100 / p + tau},0.01,5\n" for p in (1, 4, 16) for tau in (1, 10)]
    (tmp_path / "a.csv").write_text(header + "alone,1,0.1,1,inf,0.5,1\n" + "".join(lines))
    sweep_figure.draw(tmp_path / "a.csv", "workers")
    (axes,) = drawn["a.png"].axes
    assert [line.get_label() for line in series(axes)] == ["τ = 1", "τ = 10"]
    check(drawn["a.png"])


def test_a_sweep_that_never_gets_there_and_one_without_latency(drawn, tmp_path):
    header = "schedule,workers,lr,latency,seconds_to_error,last_error,exchanges\n"
    (tmp_path / "never.csv").write_text(header + "alone,1,0.1,0,inf,0.5,1\nsync,2,0.1,0,inf,0.5,1\n")
    (tmp_path / "none.csv").write_text(header + "alone,1,0.1,0,9,0.5,1\nsync,2,0.1,0,5,0.5,1\nsync,2,0.1,1,6,0.5,1\n")
    for name in ("never", "none"):
        sweep_figure.draw(tmp_path / f"{name}.csv", "latency")
    check(drawn["none.png"])
    assert drawn["none.png"].axes[0].get_xscale() == "linear"


# Sweeps of runs


def jobs_of(tmp_path, count):
    for job in range(count):
        scores = [(step, "center", 0.1 + 0.01 * job + 0.05 * step) for step in (1, 2)]
        yield a_run(tmp_path / str(job), scores)


@pytest.mark.parametrize("key", ["strategy", "method"])
def test_jobs_that_differ_in_the_method_have_its_name_and_color(drawn, tmp_path, key):
    labels = [{key: name} for name in ("easgd", "ddp", "local")]
    sweep_summary._draw(tmp_path / "sweep.png", labels, list(jobs_of(tmp_path, 3)))
    found = colors_by_label([drawn["sweep.png"]])
    assert found == {
        each.label: {(each.color.lower(), each.marker, each.dashes)}
        for each in (style.METHODS[name] for name in ("easgd", "ddp", "local"))
    }
    check(drawn["sweep.png"])


def test_other_jobs_are_named_by_what_differs(drawn, tmp_path):
    labels = [{"strategy": "easgd", "strategy.tau": str(tau)} for tau in (1, 4)]
    sweep_summary._draw(tmp_path / "sweep.png", labels, list(jobs_of(tmp_path, 2)))
    assert [line.get_label() for line in series(drawn["sweep.png"].axes[0])] == [
        "strategy = easgd, tau = 1", "strategy = easgd, tau = 4",
    ]  # fmt: skip
    check(drawn["sweep.png"])


def test_of_many_jobs_the_ends_are_drawn_over_each_setting(drawn, tmp_path):
    labels = [{"optimizer.lr": f"{0.1 * job:.2g}", "strategy": ("easgd", "ddp")[job % 2]} for job in range(15)]
    sweep_summary._draw(tmp_path / "sweep.png", labels, list(jobs_of(tmp_path, 15)))
    figure = drawn["sweep.png"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["optimizer.lr", "strategy"]
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [15, 15]
    assert all(axes.lines[0].get_linestyle() == "None" and axes.lines[0].get_markevery() == 1 for axes in figure.axes)


def test_jobs_without_accuracies_have_no_figure(tmp_path):
    sweep_summary._draw(tmp_path / "sweep.png", [{"seed": "1"}], [tmp_path])
    assert not list(tmp_path.iterdir())


def test_comparisons_are_drawn_beside_each_other(drawn, tmp_path):
    runs = [comparison(tmp_path / str(job), []) for job in (0, 1)]
    for run in runs:
        (run / "selection.csv").write_text(
            "label,tau,workers,test_error,chosen\neasgd,4,2,0.5,yes\nddp,,2,0.4,yes\nddp,,2,0.9,no\n"
        )
    sweep_summary._draw(tmp_path / "sweep.png", [{"grid.seeds": "[0]"}, {"grid.seeds": "[1]"}], runs)
    (axes,) = drawn["sweep.png"].axes
    assert {line.get_label(): list(line.get_ydata()) for line in series(axes)} == {"EASGD": [50, 50], "DDP": [40, 40]}
    check(drawn["sweep.png"])
