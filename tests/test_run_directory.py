"""No run destroys another's result; a run goes on with its own settings, and its figure covers all of it."""

import sys

import application  # noqa: F401  # asks for the platform once
import pytest
import torch
from omegaconf import OmegaConf

from lightning_easgd.lab import report, run_directory, train
from lightning_easgd.lab.command_errors import UsageError
from lightning_easgd.lab.compare.runs import CELL_FILE, RUNS, check_same_comparison

pytestmark = pytest.mark.timeout(60)

QUICK = ("strategy=single", "trainer.max_epochs=1", "trainer.limit_train_batches=3", "plot=false", "report=false",
         "callbacks.worker_evaluation.test=false", "callbacks.progress_bar.refresh_rate=0")  # fmt: skip
LAST = "run/checkpoints/last.ckpt"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs easgd-train in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["easgd-train", *words])
        monkeypatch.setattr(run_directory, "_taken", set())  # of another process
        train.main()

    return call


def refused(run, *words) -> str:
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert isinstance(end.value.code, str)
    return end.value.code


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(rows) -> list[int]:
    return sorted({int(row["step"]) for row in rows})


@pytest.mark.parametrize("place", ["paths.run=run", "hydra.run.dir=run"])
def test_a_directory_with_a_run_is_refused_and_stays_as_it_is(run, tmp_path, place):
    run(*QUICK, place)
    before = contents(tmp_path / "run")
    sentence = refused(run, *QUICK, place, "seed=1")
    for remedy in ("this directory holds a run", f"ckpt_path={tmp_path if 'hydra' in place else ''}", "overwrite=true"):
        assert remedy in sentence
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("left", ["accuracy.csv", "metrics.csv", "checkpoints/best.ckpt", "figure.png"])
def test_a_run_is_known_by_any_of_its_files(run, tmp_path, left):
    (tmp_path / "run" / left).parent.mkdir(parents=True)
    (tmp_path / "run" / left).write_text("step\n1\n")
    assert "holds a run" in refused(run, *QUICK, "paths.run=run")


def test_overwrite_removes_the_runs_own_files_and_no_others(run, tmp_path):
    own = ("callbacks.checkpoint_best.filename='{epoch}-{step}'", "callbacks.checkpoint_best.save_top_k=-1")
    run(*QUICK, *own, "paths.run=run")
    assert (tmp_path / "run" / "checkpoints" / "epoch=0-step=3.ckpt").exists()
    mine = [
        "notes.txt",
        "elastic/notes.csv",
        "checkpoints/keep.ckpt",
        "checkpoints/best_of_all.ckpt",
        "data/accuracy.csv",
    ]
    for name in mine:
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run" / "time.csv").write_text("of the old run")
    run(*QUICK[:5], "paths.run=run", "overwrite=true", "seed=1", "callbacks=none", "logger=none",
        "trainer.enable_checkpointing=false", "trainer.enable_progress_bar=false")  # fmt: skip
    left = contents(tmp_path / "run")
    assert {name for name, text in left.items() if text == b"mine"} == set(mine)
    assert set(left) - set(mine) == {"config.yaml", "versions.txt"}
    saved = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert (saved.seed, saved.overwrite) == (1, False)


def test_a_sweep_into_one_directory_is_refused_even_with_overwrite(run, tmp_path):
    sentence = refused(run, *QUICK, "-m", "seed=0,1", "paths.run=run", "overwrite=true")
    assert "another run of this sweep has this directory" in sentence
    assert OmegaConf.load(tmp_path / "run" / "config.yaml").seed == 0


def test_a_sweep_has_a_directory_for_each_job(run, tmp_path):
    run(*QUICK, "-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert [OmegaConf.load(tmp_path / "sweep" / job / "config.yaml").seed for job in "01"] == [0, 1]
    before = contents(tmp_path / "sweep")
    assert "holds a sweep; choose another" in refused(run, *QUICK, "-m", "seed=2,3", "hydra.sweep.dir=sweep")
    assert contents(tmp_path / "sweep") == before
    run(*QUICK, "-m", "seed=2", "hydra.sweep.dir=sweep", "overwrite=true")
    assert OmegaConf.load(tmp_path / "sweep" / "0" / "config.yaml").seed == 2


def test_a_directory_with_a_comparison_is_no_place_for_a_run_or_another_comparison(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "grid.yaml").write_text("seeds: [0]")
    assert "holds a comparison" in refused(run, *QUICK, "paths.run=run", "overwrite=true")
    cell = tmp_path / "run" / RUNS / "easgd-seed0"
    cell.mkdir(parents=True)
    (cell / CELL_FILE).write_text('{"label": "easgd"}')
    check_same_comparison(tmp_path / "run", ["ddp", "easgd"])
    with pytest.raises(UsageError, match=r"another comparison \(easgd\); choose another directory"):
        check_same_comparison(tmp_path / "run", ["ddp"])


def test_a_run_goes_on_with_its_own_settings_and_those_of_the_command_line(run, tmp_path):
    run(*QUICK, "paths.run=run", "optimizer=adamw", "optimizer.betas=[0.8,0.99]", "model.network.width=8", "seed=5")
    run(f"ckpt_path={LAST}", "trainer.max_epochs=2", "optimizer.lr=0.25", "paths.run=again")
    saved = OmegaConf.load(tmp_path / "again" / "config.yaml")
    assert saved.optimizer._target_ == "torch.optim.AdamW"
    assert (saved.model.network.width, saved.seed, list(saved.optimizer.betas)) == (8, 5, [0.8, 0.99])
    checkpoint = torch.load(tmp_path / "again" / "checkpoints" / "last.ckpt", weights_only=False)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.25  # and not what the checkpoint had
    assert tuple(group["betas"]) == (0.8, 0.99)
    assert checkpoint["global_step"] == 6


def test_a_scheduler_goes_on_with_what_has_been_changed(run, tmp_path):
    run(*QUICK, "paths.run=run", "scheduler=cosine", "scheduler.T_max=4")
    run(f"ckpt_path={LAST}", "trainer.max_epochs=2", "scheduler.eta_min=0.01", "optimizer.lr=1", "paths.run=again")
    checkpoint = torch.load(tmp_path / "again" / "checkpoints" / "last.ckpt", weights_only=False)
    (scheduler,) = checkpoint["lr_schedulers"]
    assert (scheduler["eta_min"], scheduler["base_lrs"], scheduler["T_max"]) == (0.01, [1], 4)


@pytest.mark.parametrize("option", ["method=msgd", "strategy=easgd", "experiment=digits_quick"])
def test_a_group_that_is_chosen_takes_the_place_of_what_was_saved(run, tmp_path, option):
    run(*QUICK, "paths.run=run", "data.batch_size=16")
    run(f"ckpt_path={LAST}", "trainer.max_epochs=2", "trainer.devices=1", option, "paths.run=again")
    saved = OmegaConf.load(tmp_path / "again" / "config.yaml")
    if option == "method=msgd":
        assert saved.optimizer.momentum > 0
    if option == "strategy=easgd":
        assert saved.strategy._target_ == "lightning_easgd.EASGDStrategy"
    assert saved.data.batch_size == (32 if "experiment" in option else 16)  # that experiment chooses data


@pytest.mark.parametrize("place", ["again", "run"])
def test_the_records_of_a_resumed_run_are_of_all_of_it(run, tmp_path, place):
    run(*QUICK, "paths.run=run")
    run(f"ckpt_path={LAST}", "trainer.max_epochs=2", f"paths.run={place}", "optimizer.lr=0.01")
    folder = tmp_path / place
    assert steps(report.read_rows(folder / "accuracy.csv")) == [6]
    assert steps(report.whole_rows(folder, "accuracy.csv")) == [3, 6]
    run(f"ckpt_path={place}/checkpoints/last.ckpt", "trainer.max_epochs=3", "paths.run=third")
    assert steps(report.whole_rows(tmp_path / "third", "accuracy.csv")) == [3, 6, 9]
    rates = [OmegaConf.load(tmp_path / "third" / "earlier" / leg / "config.yaml").optimizer.lr for leg in "36"]
    assert rates == [0.1, 0.01]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_rows_after_the_checkpoint_are_not_of_the_resumed_run(run, tmp_path):
    run(*QUICK, "paths.run=run", "callbacks.checkpoint_last.every_n_train_steps=2", "trainer.max_epochs=2",
        "callbacks.checkpoint_last.filename='{step}'", "callbacks.checkpoint_last.save_top_k=-1")  # fmt: skip
    run("ckpt_path='run/checkpoints/step=4.ckpt'", "trainer.max_epochs=3", "paths.run=again")
    assert steps(report.whole_rows(tmp_path / "again", "accuracy.csv")) == [3, 6, 9]
    assert steps(report.read_rows(tmp_path / "again" / "earlier" / "4" / "accuracy.csv")) == [3]


@pytest.mark.parametrize("place", ["again", "run"])
def test_a_run_that_fails_before_its_first_checkpoint_takes_nothing_of_the_records(run, tmp_path, place):
    run(*QUICK, "paths.run=run")
    # It ends like a crash: with records of an epoch, and without a checkpoint.
    run(f"ckpt_path={LAST}", "trainer.max_epochs=2", "paths.run=run", "trainer.enable_checkpointing=false")
    run(f"ckpt_path={LAST}", "trainer.max_epochs=3", f"paths.run={place}", "trainer.enable_checkpointing=true")
    assert steps(report.whole_rows(tmp_path / place, "accuracy.csv")) == [3, 6, 9]
    assert steps(report.read_rows(tmp_path / place / "earlier" / "3" / "accuracy.csv")) == [3]


def test_the_records_of_a_run_that_goes_on_from_before_another_leg(run, tmp_path):
    saving = ("callbacks.checkpoint_best.filename='{step}'", "callbacks.checkpoint_best.save_top_k=-1")
    run(*QUICK, *saving, "trainer.max_epochs=2", "paths.run=run")
    run(f"ckpt_path={LAST}", "trainer.max_epochs=3", "paths.run=run")
    run("ckpt_path='run/checkpoints/step=3.ckpt'", "trainer.max_epochs=2", "paths.run=again", "seed=1")
    assert [leg.name for leg in (tmp_path / "again" / "earlier").iterdir()] == ["3"]
    assert steps(report.read_rows(tmp_path / "again" / "earlier" / "3" / "accuracy.csv")) == [3]
    assert steps(report.whole_rows(tmp_path / "again", "accuracy.csv")) == [3, 6]
    for name in ("last.ckpt", "step=6.ckpt", "step=9.ckpt"):
        (tmp_path / "run" / "checkpoints" / name).unlink()
    run("ckpt_path='run/checkpoints/step=3.ckpt'", "trainer.max_epochs=2", "paths.run=run")
    assert [leg.name for leg in (tmp_path / "run" / "earlier").iterdir()] == ["3"]
    assert steps(report.whole_rows(tmp_path / "run", "accuracy.csv")) == [3, 6]


def test_a_run_goes_on_in_its_directory_from_its_last_checkpoint_only(run, tmp_path):
    saving = ("callbacks.checkpoint_best.filename='{step}'", "callbacks.checkpoint_best.save_top_k=-1")
    run(*QUICK, *saving, "trainer.max_epochs=2", "paths.run=run")
    before = contents(tmp_path / "run")
    sentence = refused(run, "ckpt_path='run/checkpoints/step=3.ckpt'", "trainer.max_epochs=3", "paths.run=run")
    assert "this run has gone on after step=3.ckpt" in sentence
    assert contents(tmp_path / "run") == before


def test_a_saved_configuration_runs_again(run, tmp_path):
    run(*QUICK, "paths.run=run", "strategy.tau=null", "model.network.width=8")
    run("--config-dir", "run", "--config-name", "config", "seed=3", "hydra.run.dir=again")
    saved = OmegaConf.load(tmp_path / "again" / "config.yaml")
    assert (saved.seed, saved.data.seed, saved.model.network.width) == (3, 3, 8)
    assert (tmp_path / "again" / "metrics.csv").exists()
    assert steps(report.read_rows(tmp_path / "run" / "accuracy.csv")) == [3]


def test_settings_reach_the_loggers(run, tmp_path):
    run(*QUICK, "paths.run=run", "logger=tensorboard", "trainer.log_every_n_steps=1")
    for name in ("hparams.yaml", "tensorboard/hparams.yaml"):
        written = OmegaConf.to_container(OmegaConf.load(tmp_path / "run" / name))
        assert written["optimizer.lr"] == 0.1
        assert written["model.network.width"] == 16
        assert not any(str(value).startswith(str(tmp_path)) for value in written.values())


@pytest.mark.parametrize(
    ("loss", "accuracy", "classes", "said"),
    [
        (float("nan"), 0.1, 10, "not finite"),
        (float("inf"), 0.9, None, "not finite"),
        (1e9, 0.1, 10, "loss is 1e+09"),
        (5.0, 0.1, 10, None),  # a network that has hardly been trained
        (1e9, 0.9, 10, None),
        (2.3, 0.1, 10, None),
        (None, 0.1, 10, None),
        (1e9, None, 10, None),
        (1e9, 0.1, None, None),
    ],
)
def test_divergence(loss, accuracy, classes, said):
    sentence = report.divergence(loss, accuracy, classes)
    assert (said in sentence) if said else sentence is None


def test_names_of_checkpoints(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "callbacks: {one: {filename: '{epoch}-best'}, two: {filename: null}, x: null}"
    )
    names = run_directory._checkpoint_names(OmegaConf.load(tmp_path / "config.yaml"))
    for name, own in {
        "epoch=3-best": True,
        "epoch=1-step=9": True,
        "last-v2": True,
        "best": True,
        "mine": False,
    }.items():
        assert any(each.fullmatch(name) for each in names) is own
