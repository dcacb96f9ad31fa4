"""Table and figure come from CSV files only."""

import sys

import pytest
from application import CONF
from omegaconf import OmegaConf

from lightning_easgd.lab import plots, report

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def run(tmp_path):
    (tmp_path / "accuracy.csv").write_text(
        "stage,step,weights,accuracy\nval,10,center,0.5\nval,10,worker_0,0.25\nval,20,center,0.75\n"
        "val,20,worker_0,0.5\ntest,20,center,0.9876\ntest,20,worker_0,0.9\n"
    )
    (tmp_path / "time.csv").write_text("rank,compute,data,communication,rest,total\n0,6,1,1,2,10\n1,7,1,0,2,10\n")
    (tmp_path / "communication.csv").write_text(
        "rank,steps,exchanges,bytes_sent,ddp_bytes,seconds_waited\n0,100,10,1000000,10000000,1\n"
    )
    (tmp_path / "elastic").mkdir()
    (tmp_path / "elastic" / "rank_0.csv").write_text(
        "step,distance,exchanges,bytes_sent,seconds_waited\n10,0.5,1,1,0\n20,,2,2,0\n30,0.25,3,3,0\n"
    )
    return tmp_path


def test_table_of_an_elastic_run(run):
    assert report.render(run).splitlines() == [
        "  test accuracy at the center             98.76%",
        "  test accuracy of worker 0               90.00%",
        "  training time (mean of the workers)     10.0 s",
        "    compute                                6.5 s  65.0%",
        "    data                                   1.0 s  10.0%",
        "    communication                          0.5 s  5.0%",
        "    validation, checkpoints                2.0 s  20.0%",
        "  exchanges                                   10  in 100 steps of each worker",
        "  bytes sent by each worker              1.00 MB  DDP: 10.00 MB, 10.0% of it",
    ]


def test_what_the_ranks_of_a_worker_send_adds_up(run):
    """Steps and exchanges do not: its ranks make them together."""
    (run / "communication.csv").write_text(
        "rank,worker,steps,exchanges,bytes_sent,ddp_bytes,seconds_waited\n"
        "0,0,100,10,1000000,8000000,1\n1,0,100,10,2000000,8000000,1\n"
        "2,1,100,10,1000000,8000000,1\n3,1,100,10,2000000,8000000,1\n"
    )
    assert report.render(run).splitlines()[-2:] == [
        "  exchanges                                   10  in 100 steps of each worker",
        "  bytes sent by each worker              3.00 MB  DDP: 16.00 MB, 18.8% of it",
    ]


def test_table_of_a_run_without_a_center(run):
    (run / "communication.csv").unlink()
    table = report.render(run)
    assert "test accuracy of the model" in table
    assert "compute and communication" in table
    assert "center" not in table


@pytest.mark.parametrize(
    ("strategy", "label"),
    [("local", "compute"), ("single", "compute"), ("ddp", "compute and all-reduce"), ("easgd", "compute")],
)
def test_what_happens_inside_a_batch_depends_on_the_strategy(run, strategy, label):
    target = OmegaConf.load(CONF / "strategy" / f"{strategy}.yaml")
    target = target.get("_target_") or target.strategy._target_
    (run / "config.yaml").write_text(f"strategy:\n  _target_: {target}\n")
    if strategy != "easgd":
        (run / "communication.csv").unlink()
    (line,) = (line for line in report.render(run).splitlines() if "compute" in line)
    assert line.split("  ")[2] == label


def test_equal_ranks_are_shown_once(run):
    (run / "communication.csv").unlink()
    (run / "accuracy.csv").write_text("stage,step,weights,accuracy\ntest,1,center,0.5\ntest,1,worker_0,0.5\n")
    assert "worker 0" not in report.render(run)


def test_last_accuracy_is_the_last(run):
    assert report.last_accuracy(run, "val") == {"center": 0.75, "worker_0": 0.5}


def test_run_without_callbacks_says_so(tmp_path):
    assert "nothing to report: callbacks=default" in report.render(tmp_path)


def test_figure_is_a_png(run):
    path = plots.draw(run)
    assert path == run / "figure.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_missing_matplotlib_is_one_clear_sentence(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"matplotlib is not installed; run pip install 'lightning_easgd\[demo"
    ):
        plots.draw(run)
