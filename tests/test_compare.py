"""`easgd-compare` and `easgd-plot`: the grid, its runs, the choice of learning rates, and what is drawn."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from application import CONF, command, composed, options
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict
from preloaded import python
from test_configs import SINGLE_RUNS, available

from lightning_easgd.callbacks import LocalEnergyMonitor
from lightning_easgd.lab.building import build_model, build_trainer
from lightning_easgd.lab.command_errors import UsageError, explain
from lightning_easgd.lab.compare import compare_command, plot_command, runs
from lightning_easgd.lab.compare.compare_command import compare, planned
from lightning_easgd.lab.compare.curves import Panel, energy_curves, mean_curves, panels
from lightning_easgd.lab.compare.grid import cells
from lightning_easgd.lab.compare.records import CELLS, FAILURES, SELECTION, TIMES, collect, read_table
from lightning_easgd.lab.compare.tables import write_tables
from lightning_easgd.lab.demo_extra import MissingExtraError
from lightning_easgd.lab.recorders import CURVE_FILE, LearningCurve

pytestmark = pytest.mark.timeout(120)
COMPARISONS = [name for name in options("experiment") if name not in SINGLE_RUNS]
FIGURES = {"error_by_seconds.png", "error_by_epochs.png", "error_by_bytes.png", "time_to_error.png"}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def comparison(tmp_path: Path, *overrides: str):
    """The configuration as easgd-compare sees it."""
    HydraConfig.instance().cfg = None
    return composed(tmp_path / "run", f"directory={tmp_path}", *overrides, name="compare")


def grid(tmp_path: Path, methods: dict, **settings):
    config = comparison(tmp_path)
    with open_dict(config):
        config.grid = OmegaConf.merge(config.grid, {"steps": 10, **settings, "methods": methods})
    return config


# The grid


def test_cells_are_the_product_of_all_settings(tmp_path):
    methods = {"easgd": {"lr": [0.1, 0.2]}, "sgd": {"lr": [0.3]}, "mdownpour": {"lr": [0.4]}}
    found = cells(grid(tmp_path, methods, seeds=[0, 1], tau=[1, 4], workers=[2, 3]).grid)
    names = [cell.name for cell in found if cell.seed == 0]
    assert names == [
        *(f"easgd-tau{tau}-p{p}-lr{lr}-seed0" for tau in (1, 4) for p in (2, 3) for lr in (0.1, 0.2)),
        "sgd-p1-lr0.3-seed0",
        "mdownpour-tau1-p2-lr0.4-seed0",
        "mdownpour-tau1-p3-lr0.4-seed0",
    ]
    assert len({cell.name for cell in found}) == len(found) == 2 * len(names)
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found), "whole seeds first"


def test_overrides_of_a_cell(tmp_path):
    methods = {"weak": {"method": "eamsgd", "tau": [8], "lr": [0.1], "overrides": ["strategy.alpha=0.01"]}}
    config = grid(tmp_path, methods, workers=[2], overrides=["data.batch_size=16"])
    (cell,) = cells(config.grid, ["data=digits"])
    assert (cell.panel_tau, cell.panel_workers) == (None, 2), "its own period: compared with every one of the grid"
    run = composed(tmp_path, *cell.overrides, "callbacks=compare")
    assert (run.strategy.momentum, run.strategy.tau, run.strategy.alpha) == (0.9, 8, 0.01)
    assert (run.trainer.devices, run.trainer.max_steps, run.trainer.val_check_interval) == (2, 10, 100)
    assert (run.optimizer.lr, run.seed, run.data.batch_size) == (0.1, 0, 16)


def test_a_budget_of_seconds(tmp_path):
    (cell,) = cells(grid(tmp_path, {"sgd": {"lr": [0.1]}}, steps=None, seconds=7).grid)
    run = composed(tmp_path, *cell.overrides, "callbacks=compare")
    assert (run.callbacks.learning_curve.max_seconds, run.trainer.max_steps) == (7, -1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": None}, "give one budget"),
        ({"seconds": 5}, "give one budget"),
        ({"only": ["adam"]}, "the grid has no adam"),
        ({"methods": {"sgd": {"lr": []}}}, r"methods.sgd=.*give it learning rates"),
        ({"methods": {"sgd": {"lr": [1], "taus": [1]}}}, r"methods.sgd.taus=\.\.\.\): there is no such key"),
    ],
)
def test_impossible_grids_are_refused(tmp_path, settings, message):
    config = grid(tmp_path, **({"methods": {"sgd": {"lr": [0.1]}}} | settings))
    with pytest.raises(UsageError, match=message):
        cells(config.grid)


def test_an_empty_grid_is_refused(tmp_path):
    with pytest.raises(UsageError, match="choose an experiment"):
        cells(grid(tmp_path, {}).grid)


@pytest.mark.parametrize("override", ["method=easgd", "seed=3", "callbacks=none"])
def test_what_the_grid_sets_cannot_be_overridden(tmp_path, override):
    with pytest.raises(UsageError, match=r"see grid.methods, grid.seeds and grid.only"):
        planned(grid(tmp_path, {"sgd": {"lr": [0.1]}}), ["experiment=quick", override])


# The shipped experiments


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=[] if available(name) else pytest.mark.skip("its data or model is not here yet"))
        for name in COMPARISONS
    ],
)
def test_every_run_of_every_experiment_instantiates(tmp_path, experiment):
    every = planned(comparison(tmp_path, f"experiment={experiment}"), [f"experiment={experiment}"])
    assert len({cell.name for cell in every}) == len(every)
    for cell in {cell.label: cell for cell in every}.values():
        config = composed(tmp_path, *cell.overrides, "callbacks=compare", "logger=csv", "trainer.accelerator=cpu")
        assert build_trainer(config).world_size == cell.workers
        build_model(config).configure_optimizers()
        instantiate(config.data)


@pytest.mark.parametrize(
    ("experiment", "facts"),
    [
        ("cifar10_tau", {"workers": [4], "tau": [1, 4, 16, 64]}),
        ("cifar10_workers", {"workers": [4, 8, 16], "tau": [10]}),
        ("imagenet_workers", {"workers": [4, 8], "tau": [10]}),
    ],
)
def test_the_papers_grids(experiment, facts):
    loaded = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml")
    base = OmegaConf.load(CONF / "experiment" / "cifar10_tau.yaml") if "cifar" in experiment else loaded
    merged = OmegaConf.merge(base, loaded).grid
    assert {name: list(merged[name]) for name in facts} == facts
    assert {"easgd", "eamsgd", "downpour", "sgd", "msgd"} <= set(merged.methods)
    for label in {"downpour", "adownpour", "mvadownpour"} & set(merged.methods):
        assert merged.methods[label].get("tau") == (None if experiment == "cifar10_tau" else [1])


def test_a_trial_runs_one_of_each_method_with_few_workers(tmp_path):
    config = comparison(tmp_path, "experiment=quick", "fast_dev_run=true", "grid.workers=[16]")
    every = planned(config, ["experiment=quick", "fast_dev_run=true", "grid.workers=[16]"])
    assert [cell.label for cell in every] == list(config.grid.methods)
    assert max(cell.workers for cell in every) == 2
    for cell in every:
        assert cell.overrides[:2] == ("experiment=quick", "trainer.fast_dev_run=true")


# Runs


def script(text: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", text, *arguments]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


# A grandchild that ignores requests to end, beside a child that does as it is told.
TREE = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
                          "print('ready', flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
child.stdout.readline()
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.processes
@pytest.mark.parametrize("seconds", ["60", "0"], ids=["killed", "ended"])
def test_no_process_of_a_run_is_left(tmp_path, seconds):
    with runs.only_one(tmp_path) as lock:
        failure = runs._supervise(script(TREE, str(tmp_path / "pid"), seconds), tmp_path / "output", 6, lock)
    assert failure == (None if seconds == "0" else "killed: it was still running after 6 s")
    assert gone(int((tmp_path / "pid").read_text()))


@pytest.mark.processes
def test_a_failure_is_named_by_the_last_line(tmp_path):
    with runs.only_one(tmp_path) as lock:
        failure = runs._supervise(script("import sys; print('a'); sys.exit('no data\\n')"), tmp_path / "o", 20, lock)
    assert failure == "no data (exit code 1)"


def test_two_comparisons_cannot_share_a_directory(tmp_path):
    with runs.only_one(tmp_path), pytest.raises(UsageError, match="is at work"), runs.only_one(tmp_path):
        pass
    with runs.only_one(tmp_path) as lock:  # a run that a killed comparison has left behind
        left = subprocess.Popen(script("import time; time.sleep(60)"), pass_fds=(lock.fileno(),))
    try:
        with pytest.raises(UsageError, match="left behind"), runs.only_one(tmp_path):
            pass
    finally:
        left.kill()
        left.wait()
    with runs.only_one(tmp_path):
        pass


CURVE = "step,epochs,seconds,bytes_sent,val_loss,val_error,test_loss,test_error\n"


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time; those whose name holds a word of `fake.failing` fail."""

    class Fake:
        def __init__(self):
            self.failing, self.ran = (), []

        def __call__(self, arguments, output, timeout, lock):
            name = output.parent.name
            self.ran.append(name)
            output.write_text("...")
            if any(word in name for word in self.failing):
                return "no data (exit code 1)"
            (output.parent / CURVE_FILE).write_text(CURVE + "10,1,2,0,0.5,0.4,0.6,0.5\n")
            return None

    fake = Fake()
    monkeypatch.setattr(runs, "_supervise", fake)
    return fake


@pytest.mark.processes
def test_finished_runs_are_skipped_and_failed_or_torn_ones_repeated(tmp_path, fake, capsys):
    config = grid(tmp_path, {"sgd": {"lr": [0.1, 0.2, 0.3]}})
    every = planned(config, [])
    fake.failing = ("lr0.2",)
    assert compare(config, every) == {"sgd-p1-lr0.2-seed0": "no data (exit code 1)"}
    assert len(fake.ran) == 3, "a failure does not stop the grid"
    assert rows(tmp_path / FAILURES) == [{"cell": "sgd-p1-lr0.2-seed0", "failure": "no data (exit code 1)"}]
    assert (tmp_path / "failed" / "sgd-p1-lr0.2-seed0" / "output.txt").exists()
    assert "[3/3] sgd-p1-lr0.3-seed0 ..." in capsys.readouterr().out
    # Half-finished: an interruption has left a part of it.
    torn = tmp_path / "runs" / "sgd-p1-lr0.3-seed0"
    torn.rename(tmp_path / "torn")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "torn").rename(tmp_path / "unfinished" / torn.name)
    fake.failing, fake.ran = (), []
    assert compare(config, every) == {}
    assert fake.ran == ["sgd-p1-lr0.2-seed0", "sgd-p1-lr0.3-seed0"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {cell.name for cell in every}
    assert not list((tmp_path / "failed").iterdir())
    assert not (tmp_path / "unfinished").exists()
    assert rows(tmp_path / FAILURES) == []
    out = capsys.readouterr().out
    assert "1 of 3 runs are finished and skipped" in out
    assert "about 0:00:00 left" in out


def test_a_run_that_leaves_no_curve_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_supervise", lambda *arguments: None)
    config = grid(tmp_path, {"sgd": {"lr": [0.1]}})
    assert compare(config, planned(config, [])) == {"sgd-p1-lr0.1-seed0": "it ended well but wrote no curve.csv"}


def test_finished_runs_with_other_settings_are_refused(tmp_path, fake):
    config = grid(tmp_path, {"sgd": {"lr": [0.1]}})
    compare(config, planned(config, []))
    config.grid.steps = 11
    with pytest.raises(UsageError, match=r"other settings \(trainer.max_steps=10, trainer.max_steps=11\)"):
        compare(config, planned(config, []))


@pytest.mark.processes
def test_a_sweep_of_comparisons_ends_with_a_table_of_all(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["-m", "experiment=quick", "grid.only=[easgd,msgd]", "grid.tau=[4],[8]", "hydra.sweep.dir=sweep"]
    monkeypatch.setattr(sys, "argv", ["easgd-compare", *words])
    compare_command.main()
    found = {
        (row["grid.tau"], row["method"], row["tau"]): row["test error"]
        for row in rows(tmp_path / "sweep" / "sweep.csv")
    }
    assert found == {
        ("[4]", "easgd", "4"): "50.00%", ("[4]", "msgd", ""): "50.00%",
        ("[8]", "easgd", "8"): "50.00%", ("[8]", "msgd", ""): "50.00%",
    }  # fmt: skip
    assert "error_by_seconds.png" in {path.name for path in (tmp_path / "sweep" / "1").iterdir()}
    assert capsys.readouterr().out.splitlines()[-2:] == ["  sweep/sweep.csv", "  sweep/sweep.png"]
    assert (tmp_path / "sweep" / "sweep.png").exists()


# From runs to tables


def finished(directory: Path, label: str, lr: float, seed: int, curve: str, **settings) -> None:
    run = directory / "runs" / f"{label}-lr{lr}-seed{seed}"
    run.mkdir(parents=True)
    cell = {"label": label, "method": label, "tau": 4, "workers": 2, "lr": lr, "seed": seed}
    (run / "cell.json").write_text(json.dumps(cell | {"panel_tau": 4, "panel_workers": 2} | settings))
    (run / CURVE_FILE).write_text(CURVE + curve)
    (run / "time.csv").write_text("rank,compute,data,communication,rest,total\n0,8,1,1,2,12\n1,6,1,3,2,12\n")


@pytest.fixture
def results(tmp_path):
    """Of easgd's rates 0.1 is better in validation, 0.2 on the test set, and 0.3 diverges."""
    for seed in (0, 1):
        finished(tmp_path, "easgd", 0.1, seed, f"100,1,{2 + seed},1e6,1,.5,1,.6\n200,2,{4 + 2 * seed},2e6,1,.2,1,.3\n")
        finished(tmp_path, "easgd", 0.2, seed, "100,1,2,1e6,1,.5,1,.6\n200,2,4,2e6,1,.25,1,.1\n")
        finished(tmp_path, "easgd", 0.3, seed, "100,1,2,1e6,nan,.1,nan,.9\n")
        finished(
            tmp_path, "msgd", 0.1, seed, "100,1,20,0,1,.5,1,.3\n", tau=None, panel_tau=None, workers=1,
            panel_workers=None,
        )  # fmt: skip
        finished(tmp_path, "ddp", 0.1, seed, "100,1,8,3e6,1,.5,1,.5\n", tau=None, panel_tau=None)
    collect(tmp_path, ["msgd", "easgd", "ddp"], [0.3, 0.05], "msgd", {"bad": "no data"})
    return tmp_path


def test_rates_are_chosen_by_validation_error(results):
    table = {(row["label"], row["lr"]): row for row in rows(results / SELECTION)}
    assert {key for key, row in table.items() if row["chosen"] == "yes"} == {
        ("msgd", "0.1"), ("easgd", "0.1"), ("ddp", "0.1"),
    }  # fmt: skip
    assert float(table["easgd", "0.1"]["val_error"]) == pytest.approx(0.2)
    diverged = table["easgd", "0.3"]
    assert (diverged["diverged"], diverged["val_error"]) == ("2", "1.0"), "a result, and the worst there is"
    assert rows(results / SELECTION)[0]["label"] == "msgd", "in the order of the grid"


def test_a_rate_whose_runs_have_failed_is_not_chosen(results):
    shutil.rmtree(results / "runs" / "easgd-lr0.1-seed1")
    collect(results, ["easgd"], [], None, {})
    assert [row["lr"] for row in rows(results / SELECTION) if (row["label"], row["chosen"]) == ("easgd", "yes")] == [
        "0.2"
    ]


def test_costs_of_a_target_error_are_means_over_the_seeds(results):
    table = {(row["label"], row["target_error"]): row for row in rows(results / TIMES)}
    easgd = table["easgd", "0.3"]
    assert [float(easgd[name]) for name in ("seconds", "epochs", "bytes_sent", "speedup")] == [5, 2, 2e6, 4]
    assert float(table["msgd", "0.3"]["speedup"]) == 1
    assert table["ddp", "0.3"]["seconds"] == table["easgd", "0.05"]["seconds"] == ""


def test_tables(results):
    text = write_tables(results)
    assert "| easgd | 4 | 2 | 0.1 | 2 | 0 | 30.00% ± 0.00% | 2.0 | 5.0 | 2.00 |" in text
    assert "| 0.3 | easgd | 4 | 2 | 5.0 | 4.00 | 2.0 | 2.00 |" in text
    assert "| easgd | 4 | 2 | 14.00 | 2.00 | 4.00 |" in text, "per 400 mini-batches, mean of the workers"
    assert "| ddp |  | 2 | 28.00 | 4.00 | in compute |" in text
    assert "| bad | no data |" in text


def test_curves_are_means_over_the_seeds(results):
    curve = next(curve for curve in mean_curves(results) if curve.label == "easgd")
    assert curve.costs["seconds"].tolist() == [2.5, 5.0]
    assert curve.error.tolist() == pytest.approx([0.6, 0.3])


ENERGY = "step,weights,sigma,error,energy,deviation,draws,samples\n"


@pytest.fixture
def energies(results):
    """Of easgd's chosen rate: two seeds, measured twice, with two workers; of msgd one seed only is measured."""
    for seed in (0, 1):
        rows = [(100, "center", s, 0.9, 9.0) for s in (0.1, 0.05)]  # in mid training: of no account
        rows += [(200, "center", s, 0.3 + 0.1 * seed, 10 * s + seed) for s in (0.1, 0.05)]
        rows += [(200, f"worker_{w}", s, 0.5, 20 * s + seed + w) for w in (0, 1) for s in (0.1, 0.05)]
        text = "".join(f"{step},{weights},{s},{error},{energy},0,5,64\n" for step, weights, s, error, energy in rows)
        (results / "runs" / f"easgd-lr0.1-seed{seed}" / "local_energy.csv").write_text(ENERGY + text)
    (results / "runs" / "msgd-lr0.1-seed0" / "local_energy.csv").write_text(ENERGY + "100,center,0.1,0.2,0.1,0,5,64\n")
    collect(results, ["msgd", "easgd", "ddp"], [0.3, 0.05], "msgd", {})
    return results


def test_energies_are_those_of_the_end_for_each_seed(energies):
    center, workers = energy_curves(energies)
    assert [(curve.label, curve.weights) for curve in (center, workers)] == [("easgd", "center"), ("easgd", "workers")]
    assert center.sigmas.tolist() == [0.05, 0.1]
    assert center.errors.tolist() == pytest.approx([0.3, 0.4])
    assert center.energies == pytest.approx(np.array([[0.5, 1.0], [1.5, 2.0]]))
    assert workers.energies == pytest.approx(np.array([[1.5, 2.5], [2.5, 3.5]]))
    assert [values.tolist() for values in center.summary] == [[1.0, 1.5], [0.5, 1.0], [1.5, 2.0]]


def test_energies_are_in_the_tables_and_drawn_again(energies, tmp_path, monkeypatch):
    assert "| easgd | 4 | 2 | center | 35.00% | 100.00 ± 50.00 | 150.00 ± 50.00 |" in write_tables(energies)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in energies.glob("*.csv"):
        shutil.copy(path, copy)
    monkeypatch.setattr(sys, "argv", ["easgd-plot", str(copy)])
    plot_command.main()
    assert {path.name for path in copy.glob("*.png")} == FIGURES | {"local_energy.png"}


def test_a_comparison_without_energies_has_none(results):
    assert energy_curves(results) == []
    assert "noise" not in write_tables(results)
    assert not (results / "local_energy.csv").exists()


def test_the_rate_of_replicated_sgd_has_grown_when_the_budget_ends(tmp_path):
    config = comparison(tmp_path, "experiment=flatness_small", "grid.steps=70")
    cell = next(cell for cell in planned(config, ["experiment=flatness_small"]) if cell.label == "replicated_sgd")
    run = composed(tmp_path, *cell.overrides, "callbacks=compare")
    strategy = build_trainer(run).strategy
    assert strategy.rates.rho(70) == strategy.rates.rho.extremes[1]
    alpha, beta = strategy.rates.resolve(cell.workers, run.optimizer.lr, clock=70)
    assert (alpha, beta) == (pytest.approx(0.5), 1.0)
    assert any(isinstance(callback, LocalEnergyMonitor) for callback in build_trainer(run).callbacks)


def test_panels():
    found = list(panels(["4", "16", ""], ["2", ""]))
    assert found == [Panel("4", "2"), Panel("16", "2")]
    assert found[0].title == "τ = 4, p = 2"
    assert found[0].holds("", "2")
    assert not found[0].holds("16", "2")


def test_everything_is_drawn_again_from_the_csv_files(results, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in results.glob("*.csv"):
        shutil.copy(path, copy)
    monkeypatch.setattr(sys, "argv", ["easgd-plot", str(copy)])
    plot_command.main()
    assert {path.name for path in copy.glob("*.png")} == FIGURES
    assert (copy / "tables.md").read_text() == write_tables(results)
    assert len(capsys.readouterr().out.splitlines()) == len(FIGURES)


def test_a_directory_without_a_comparison_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["easgd-plot", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"there is no cells\.csv"):
        plot_command.main()


def test_missing_pandas_is_one_clear_sentence_before_anything_runs(tmp_path, monkeypatch, fake):
    config = grid(tmp_path, {"sgd": {"lr": [0.1]}})
    monkeypatch.setitem(sys.modules, "pandas", None)
    for name in ("compare_figures", "curves", "records", "tables"):
        monkeypatch.delitem(sys.modules, f"lightning_easgd.lab.compare.{name}", raising=False)
    sentence = r"pandas is not installed; run pip install 'lightning_easgd\[demo\]'"
    with pytest.raises(MissingExtraError, match=sentence) as raised:
        compare(config, planned(config, []))
    assert explain("easgd-compare", raised.value).startswith("easgd-compare: pandas is not installed")
    assert fake.ran == []
    monkeypatch.setattr(sys, "argv", ["easgd-plot", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"easgd-plot: {sentence}"):
        plot_command.main()


def test_tables_are_read_as_they_were_written(tmp_path):
    """Settings stay text, whatever they look like, and what is missing is none of pandas' many words for it."""
    (tmp_path / "a.csv").write_text("label,tau,workers,seconds\nnull,,2,\n007,4,2,1.5\n")
    table = read_table(tmp_path / "a.csv")
    assert table[["label", "tau", "workers"]].to_numpy().tolist() == [["null", "", "2"], ["007", "4", "2"]]
    assert np.isnan(table["seconds"][0])
    assert len(read_table(tmp_path / "missing.csv")) == 0


# The learning curve


def curve_of(tmp_path, *overrides: str):
    config = composed(
        tmp_path, "callbacks=compare", "trainer.max_epochs=-1", "trainer.val_check_interval=10", "logger=none",
        "trainer.check_val_every_n_epoch=null", "trainer.enable_progress_bar=false", "trainer.limit_val_batches=1",
        "trainer.enable_checkpointing=false", *overrides,
    )  # fmt: skip
    trainer, model, data = build_trainer(config), build_model(config), instantiate(config.data)
    trainer.fit(model, datamodule=data)
    return trainer, model, data, rows(tmp_path / CURVE_FILE)


def test_the_curve_scores_the_model_that_is_evaluated(tmp_path):
    trainer, model, data, curve = curve_of(tmp_path, "method=asgd", "trainer.max_steps=25", "optimizer.lr=0.5")
    assert [row["step"] for row in curve] == ["10", "20", "25"]
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    assert float(curve[-1]["test_error"]) == pytest.approx(1 - tested["test/accuracy"], abs=1e-6)
    assert float(curve[-1]["test_loss"]) == pytest.approx(tested["test/loss"], abs=1e-5)
    assert float(curve[0]["epochs"]) == pytest.approx(320 / len(data.train_dataloader().dataset))
    seconds = [float(row["seconds"]) for row in curve]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_training_that_has_diverged_ends_at_the_next_validation(tmp_path):
    *_, curve = curve_of(tmp_path, "method=sgd", "trainer.max_steps=1000", "optimizer.lr=1e12")
    assert [row["step"] for row in curve] == ["10"]
    assert curve[0]["val_loss"] == "nan"


def test_a_budget_of_seconds_ends_training_at_a_validation(tmp_path):
    *_, curve = curve_of(tmp_path, "method=sgd", "trainer.max_steps=-1", "callbacks.learning_curve.max_seconds=0.2")
    assert int(curve[-1]["step"]) % 10 == 0
    before = [float(row["seconds"]) for row in curve[:-1]]
    assert all(seconds < 0.2 for seconds in before)
    assert float(curve[-1]["seconds"]) >= 0.2


def test_a_budget_is_positive(tmp_path):
    with pytest.raises(ValueError, match=r"LearningCurve\(max_seconds=0\)"):
        LearningCurve(tmp_path, max_seconds=0)


# As a user runs it


@pytest.mark.timeout(400)
def test_the_quick_experiment(tmp_path):
    done = command("lab.compare.compare_command", "experiment=quick", "directory=quick", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = tmp_path / "quick"
    table = {row["cell"]: row for row in rows(directory / CELLS)}
    assert len(table) == 6
    assert {row["state"] for row in table.values()} == {"finished"}
    assert {row["step"] for row in table.values()} == {"120"}, "equal budgets"
    sent = {name.split("-")[0]: float(row["bytes_sent"]) for name, row in table.items()}
    assert sent["ddp"] / sent["easgd"] == pytest.approx(120 / 29, rel=1e-3)
    assert sent["msgd"] == 0
    assert {path.name for path in directory.glob("*.png")} == FIGURES
    run = directory / "runs" / "easgd-tau4-p2-lr0.2-seed0"
    files = {path.name for path in run.iterdir()}
    assert files >= {"config.yaml", "versions.txt", "metrics.csv", "curve.csv", "time.csv", "communication.csv"}
    assert str(tmp_path) not in (run / "config.yaml").read_text()
    assert "cores" in (directory / "machine.txt").read_text()
    again = command("lab.compare.compare_command", "experiment=quick", "directory=quick", cwd=tmp_path, timeout=60)
    assert "6 of 6 runs are finished and skipped" in again.stdout


def test_a_trial_of_a_failing_grid_ends_with_the_failures(tmp_path):
    done = command(
        "lab.compare.compare_command", "experiment=quick", "directory=d", "fast_dev_run=true", "grid.only=[msgd,bad]",
        "+grid.methods.bad={method:sgd,lr:[0.1],overrides:['data.sampling=half']}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert "[2/2] bad-p1-lr0.1-seed0 ... DigitsDataModule(sampling='half')" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("easgd-compare: 1 run(s) failed")
    assert (tmp_path / "d" / "fast_dev_run" / "runs" / "msgd-p1-lr0.05-seed0" / CURVE_FILE).exists()


def test_sigterm_ends_the_run_under_way(tmp_path):
    waiting = (
        "import sys, pathlib, time; from lightning_easgd.lab.compare import compare_command as command, runs;"
        "tree = pathlib.Path(sys.argv.pop(1)).read_text();"
        "supervise = runs._supervise;"
        "runs._supervise = lambda c, *rest: supervise([sys.executable, '-c', tree, 'pid', '60'], *rest);"
        "command.main()"
    )
    (tmp_path / "tree.py").write_text(TREE)
    (tmp_path / "waiting.py").write_text(waiting)
    arguments = ("tree.py", "experiment=quick", "directory=d", "grid.only=[msgd]")
    process = subprocess.Popen([python(), "waiting.py", *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert gone(int(pid.read_text()))
    assert not (tmp_path / "d" / "runs").exists()
