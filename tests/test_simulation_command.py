"""``easgd-simulate``: what it prints and writes, and what it says about wrong words."""

import math

import pytest

from lightning_easgd.lab.simulation.scenario import Scenario
from lightning_easgd.lab.simulation.simulate_command import run
from lightning_easgd.lab.simulation.sweep import ALONE, read_rows
from lightning_easgd.lab.simulation.sweep_figure import best_times

SMALL = ["dimension=10", "condition=4", "steps=200", "noise=0.02"]


def test_run_says_when_the_error_is_reached(capsys):
    assert run(["run", "workers=4", "lr=0.5", "tau=2", "jitter=0", *SMALL]) == 0
    shown = capsys.readouterr().out
    reached = Scenario(workers=4, lr=0.5, tau=2, jitter=0, dimension=10, condition=4, steps=200, noise=0.02).run()
    assert f"error 0.01           after {reached.time_to_error(0.01):.4g} s" in shown
    assert "200 steps of all   20 s" in shown
    assert "exchanges            396" in shown  # at the clocks 2, 4, …, 198 of 4 workers


def test_run_that_does_not_reach_the_error_fails(capsys):
    assert run(["run", "lr=0.001", *SMALL]) == 1
    assert "not within" in capsys.readouterr().out


def test_sweep_writes_a_table_and_its_figure(tmp_path, capsys):
    file = tmp_path / "curves" / "workers.csv"
    words = ["workers=1,8", "schedule=sync,tree", "lr=0.2,0.5", "noise=0.1", *SMALL[:3], f"file={file}"]
    assert run(["sweep", *words]) == 0
    rows = read_rows(file)
    assert [row["schedule"] for row in rows].count(ALONE) == 2  # one for each learning rate
    assert len(rows) == 2 + 8
    one = next(row for row in rows if (row["schedule"], row["workers"], row["lr"]) == ("tree", 8, 0.5))
    scenario = Scenario(schedule="tree", workers=8, lr=0.5, dimension=10, condition=4, steps=200, noise=0.1)
    assert one["seconds_to_error"] == pytest.approx(scenario.run().time_to_error(0.01), rel=1e-5)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    lines = best_times(rows, "workers")
    assert sorted(lines) == [("sync", ""), ("tree", "")]
    assert lines["sync", ""][8] == min(
        row["seconds_to_error"] for row in rows if (row["schedule"], row["workers"]) == ("sync", 8)
    )
    capsys.readouterr()
    file.with_suffix(".png").unlink()
    assert run(["plot", f"file={file}"]) == 0
    assert file.with_suffix(".png").exists()


def test_more_workers_average_more_noise():
    """The noise of one worker hides the target; that of sixteen does not."""
    noisy = {"lr": 0.5, "noise": 0.1, "dimension": 100, "condition": 10, "steps": 300, "tau": 5}
    one, sixteen = (Scenario(workers=workers, **noisy) for workers in (1, 16))
    assert math.isinf(one.run_alone().time_to_error(0.01))
    assert sixteen.run().time_to_error(0.01) < 10


def test_straggler_and_failures_reach_the_cluster():
    scenario = Scenario(workers=4, straggler=3.0, failures=2, failure_seconds=5.0, megabytes=10, bandwidth=100)
    cluster = scenario.make_cluster(0)
    assert cluster.speeds == [1, 1, 1, 1 / 3]
    assert cluster.failures == {3: 5.0, 2: 5.0}
    assert cluster.link.occupied(cluster.message_bytes) == pytest.approx(0.1)
    assert not scenario.time().completed


def test_digits():
    scenario = Scenario(problem="digits", workers=4, lr=0.3, steps=60, target=0.2, schedule="async")
    assert scenario.run().time_to_error(0.2) < 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "worker=4"], "did you mean workers?"),
        (["run", "workers=4", "colour=red"], "there is no key 'colour'; choose one of: problem, schedule, workers"),
        (["run", "alpha=fast"], "alpha=fast: this is no number"),
        (["plot", "tau=3"], "there is no key 'tau'; choose one of: file, x"),
        (["run", "workers=4.5"], "workers=4.5: this is no whole number"),
        (["run", "workers=1,2"], "workers=1,2: one value; only a sweep takes several"),
        (["run", "schedule=ring"], "schedule=ring: unknown; choose one of sync, async, round_robin, tree"),
        (["run", "failures=4"], "failures=4: one of the 4 workers at least has to live"),
        (["run", "tau"], "'tau' cannot be read; write key=value"),
        (["sweep", "lr=0.1,0.2"], "x=workers: the figure's abscissa needs values; give workers=...,..."),
        (["plot"], "give file=..."),
        (["plot", "file=nowhere.csv"], "No such file or directory: 'nowhere.csv'"),
        (["run", "tau=0"], "SynchronousSchedule(tau=0)"),
    ],
)
def test_wrong_words(words, message):
    assert message in run(words)


def test_help_explains_every_key(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: easgd-simulate {run,sweep,plot}")
    for name, field in Scenario.__dataclass_fields__.items():
        assert f"  {name} " in shown
        assert field.default is None or str(field.default) in shown
    assert "How many times slower the last worker is. (float, 1.0)" in shown
    assert "Size of a vector on the wire, 10⁶ bytes; None: as the problem's. (float, may be left out)" in " ".join(
        shown.split()
    )


def test_help_on_one_action(capsys):
    assert run(["plot", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "The CSV file of a sweep. (Path, required)" in shown
    assert "straggler" not in shown


@pytest.mark.parametrize("words", [[], ["walk"], ["walk", "workers=4"]])
def test_usage(words):
    assert (
        run(words) == "usage: easgd-simulate {run,sweep,plot} [key=value ...]; easgd-simulate --help explains the keys"
    )
