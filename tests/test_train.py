"""`easgd-train` and `easgd-evaluate` as a user runs them."""

import csv
import os
import re
import subprocess
import sys
import tempfile

import pytest
from application import command, composed, only_run
from omegaconf import OmegaConf
from preloaded import python

from lightning_easgd.lab import evaluate, train

SHORT = ("trainer.devices=2", "trainer.max_epochs=2", "trainer.limit_train_batches=24", "strategy.tau=4")


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refusal(monkeypatch, tmp_path, main, *arguments: str) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["easgd", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, str), "a message, which makes the exit code 1"
    return caught.value.code


@pytest.mark.parametrize("start_method", ["popen", "spawn", "fork"])
def test_a_run_leaves_everything_in_one_directory(tmp_path, start_method):
    done = command("train", *SHORT, f"strategy.start_method={start_method}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml", "versions.txt", "metrics.csv", "figure.png", "accuracy.csv", "time.csv", "communication.csv",
        "hparams.yaml", "elastic/rank_0.csv", "elastic/rank_1.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt",
    }  # fmt: skip
    for line in ("test accuracy at the center", "of worker 0", "of worker 1", "communication", "DDP:"):
        assert done.stdout.count(line) == 1, done.stdout
    lines = done.stdout.splitlines()
    assert [line.split("  ")[:2] for line in lines[:2]] == [["epoch 1/2", "step 24"], ["epoch 2/2", "step 48"]]
    assert done.stderr == ""
    weights = {row["weights"] for row in rows(run / "accuracy.csv")}
    assert weights == {"center", "worker_0", "worker_1"}
    assert [int(row["exchanges"]) for row in rows(run / "communication.csv")] == [11, 11]
    assert OmegaConf.load(run / "config.yaml").strategy.tau == 4
    assert "torch 2." in (run / "versions.txt").read_text()


def test_evaluation_of_the_checkpoint_is_that_of_the_center(tmp_path):
    done = command("train", *SHORT, "model.network.width=4", "plot=false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    # The network's width is not the default: it comes from the run's saved configuration.
    evaluated = command("evaluate", f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    header, *lines = (line.rsplit(None, 2) for line in evaluated.stdout.splitlines() if line.startswith("  "))
    assert [word.strip() for word in header] == ["weights", "test/loss", "test/accuracy"]
    printed = {weights.strip().replace(" ", "_"): float(accuracy) for weights, _, accuracy in lines}
    recorded = {row["weights"]: float(row["accuracy"]) for row in rows(run / "accuracy.csv") if row["stage"] == "test"}
    assert set(recorded) == {"center", "worker_0", "worker_1"}
    assert printed == pytest.approx(recorded, abs=1e-4), "each worker's own weights are scored as the run did"


def test_a_run_goes_on_from_the_last_checkpoint(tmp_path):
    quick = ("trainer.devices=2", "trainer.limit_train_batches=10", "strategy.tau=2", "plot=false")
    for number, more in enumerate(
        (["trainer.max_epochs=1"], ["trainer.max_epochs=3", "ckpt_path=1/checkpoints/last.ckpt"])
    ):
        done = command("train", *quick, *more, f"hydra.run.dir={number + 1}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    # Steps 11 to 30: what DDP would have sent is counted for this run alone.
    assert [row["steps"] for row in rows(tmp_path / "2" / "communication.csv")] == ["20", "20"]
    assert {int(row["step"]) for row in rows(tmp_path / "2" / "accuracy.csv")} == {20, 30}


def test_defaults_reach_97_percent_at_the_center_in_half_of_their_epochs(tmp_path):
    less = ("callbacks.progress_bar.refresh_rate=0", "trainer.check_val_every_n_epoch=20")
    done = command("train", "trainer.max_epochs=20", *less, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = {row["weights"]: float(row["accuracy"]) for row in rows(only_run(tmp_path) / "accuracy.csv")}
    assert len(last) == 1 + 4
    assert last["center"] >= 0.97


def test_a_sweep_with_spawn_trains_every_setting(tmp_path):
    done = command("train", "-m", *SHORT[:3], "strategy.tau=4,8", "strategy.start_method=spawn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "multirun").glob("*/*")
    exchanges = [rows(sweep / job / "communication.csv")[1]["exchanges"] for job in ("0", "1")]
    assert exchanges == ["11", "5"]
    assert [(row["strategy.tau"], bool(row["test accuracy"])) for row in rows(sweep / "sweep.csv")] == [
        ("4", True),
        ("8", True),
    ]
    last = [line.split() for line in done.stdout.splitlines()[-5:]]
    assert last[0][:4] == ["strategy.tau", "val", "accuracy", "test"]
    assert [line[0] for line in last[1:3]] == ["4", "8"]
    assert (sweep / "sweep.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strategy.tua=3"], "easgd-train(strategy.tua=...): there is no key 'tua' in 'strategy'; did you mean "
         "strategy.tau?"),
        (["stratgy.tau=3"], "easgd-train(stratgy=...): there is no key 'stratgy'; did you mean strategy?"),
        (["seeds=3"], "easgd-train(seeds=...): there is no key 'seeds'; did you mean seed?"),
        (["model.network.layers=3"], "easgd-train(model.network.layers=...): there is no key 'layers' in "
         "'model.network'; choose one of: hidden, image_shape, num_classes, width"),
        (["strategy=esgd"], "easgd-train(strategy=esgd): there is no such strategy; did you mean strategy=easgd?"),
        (["data=birds"], "easgd-train(data=birds): there is no such data; choose one of: cifar10, cifar100, digits, "
         "fashion_mnist, imagenet, mnist"),
        (["strategy"], "easgd-train(strategy): this cannot be read as an override; write key=value"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_one_sentence_with_a_hint(monkeypatch, tmp_path, arguments, message):
    assert refusal(monkeypatch, tmp_path, train.main, *arguments) == message


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["strategy.tau=0"], "EASGDStrategy(tau=0)"),
        (["strategy.tau=1.5"], "EASGDStrategy(tau=1.5)"),
        (["strategy.mode=asink"], "EASGDStrategy(mode='asink')"),
        (["strategy=eamsgd", "strategy.momentum=2"], "EASGDStrategy(momentum=2)"),
        (["data.sampling=half"], "DigitsDataModule(sampling='half')"),
        (["callbacks.elastic_monitor.every_n_exchanges=0"], "ElasticMonitor(every_n_exchanges=0)"),
        (["strategy=single", "trainer.devices=2"], "easgd-train(strategy=single, trainer.devices=2)"),
    ],
)
def test_bad_values_are_refused_before_anything_starts(monkeypatch, tmp_path, arguments, beginning):
    sentence = refusal(monkeypatch, tmp_path, train.main, *arguments)
    assert sentence.startswith(beginning)
    assert "\n" not in sentence


@pytest.mark.parametrize("strategy", ["easgd", "ddp", "local"])
def test_a_sweep_with_popen_is_refused_with_the_remedy(monkeypatch, tmp_path, strategy):
    sentence = refusal(monkeypatch, tmp_path, train.main, "-m", f"strategy={strategy}", "seed=0,1")
    assert "each rank would repeat the whole sweep" in sentence
    assert sentence.endswith("set strategy.start_method=spawn")


def test_a_refused_sweep_stops_at_its_first_job(tmp_path):
    done = command("train", "-m", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 1
    assert "#1" not in done.stdout
    assert "Error executing" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("easgd-train(--multirun, strategy.start_method=popen")


@pytest.mark.parametrize("value", ["abc", "0", "-5", "true"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch, tmp_path, value):
    sentence = refusal(monkeypatch, tmp_path, train.main, f"strategy.timeout={value}")
    assert sentence.lower() == f"easgd-train(strategy.timeout={value}): give a positive number of seconds"


def test_runs_of_the_same_second_have_directories_of_their_own(monkeypatch, tmp_path):
    directories = set()
    monkeypatch.setattr(train, "train", lambda config: directories.add(config.paths.run))
    monkeypatch.setattr(sys, "argv", ["easgd-train", "hydra.run.dir=${easgd_launch:}"])
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        train.main()
    assert len(directories) == 3


def test_ranks_of_torchrun_write_one_directory(tmp_path):
    done = subprocess.run(
        [
            python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "lightning_easgd.lab.train", "trainer=torchrun", "trainer.accelerator=cpu", *SHORT[1:],
            "callbacks.elastic_monitor.every_n_exchanges=1",
        ],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len({path.parents[1] for path in tmp_path.rglob("elastic/rank_*.csv")}) == 1
    assert len(list(tmp_path.rglob("elastic/rank_*.csv"))) == 2


def test_a_logger_that_is_not_installed_is_one_sentence(monkeypatch, tmp_path):
    def absent(*arguments, **named):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr("lightning.pytorch.loggers.TensorBoardLogger.__init__", absent)
    sentence = refusal(monkeypatch, tmp_path, train.main, "logger=tensorboard", "strategy=single")
    assert "pip install 'lightning_easgd[tensorboard]' or choose logger=csv" in sentence


def test_a_run_is_not_spoiled_by_a_missing_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["easgd-train", "strategy=single", "trainer.fast_dev_run=true"])
    train.main()
    assert "no figure: matplotlib is not installed" in capsys.readouterr().out


def test_errors_that_are_no_ones_input_are_a_sentence_with_their_traceback_in_a_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(train, "train", lambda config: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["easgd-train"])
    with pytest.raises(SystemExit) as end:
        train.main()
    (file,) = tmp_path.glob("easgd-train-*.txt")
    assert re.match(rf"easgd-train: ZeroDivisionError: division by zero; .* \(traceback: {file}\)$", end.value.code)
    assert "Traceback (most recent call last)" in file.read_text()


def test_evaluate_needs_a_checkpoint(monkeypatch, tmp_path):
    assert "easgd-evaluate(ckpt_path=null)" in refusal(monkeypatch, tmp_path, evaluate.main)
    sentence = refusal(monkeypatch, tmp_path, evaluate.main, "ckpt_path=nowhere.ckpt")
    assert sentence == "easgd-evaluate(ckpt_path=nowhere.ckpt): there is no such file; check the path"


@pytest.mark.parametrize("place", [None, "elsewhere"])
def test_the_recorded_configuration_names_the_datas_place_only_if_it_was_given(tmp_path, monkeypatch, place):
    monkeypatch.setenv("EASGD_DATA", "/of/this/machine")
    given = [] if place is None else [f"paths.data={place}"]
    train._begin(composed(tmp_path, *given), tmp_path, None, 0)
    assert "/of/this/machine" not in (tmp_path / "config.yaml").read_text()
    loaded = OmegaConf.load(tmp_path / "config.yaml")
    monkeypatch.setenv("EASGD_DATA", "/of/another")
    assert loaded.paths.data == (place or "/of/another")
