"""Whatever is wrong with a command line: a code that is not zero, and at most three lines that name key and remedy."""

import sys

import pytest
from application import composed

from lightning_easgd.lab import evaluate, plots, train
from lightning_easgd.lab.compare import compare_command, plot_command
from lightning_easgd.lab.simulation import simulate_command
from lightning_easgd.lab.stability import stability_command

pytestmark = pytest.mark.timeout(60)

COMMANDS = {
    "easgd-train": train.main,
    "easgd-evaluate": evaluate.main,
    "easgd-compare": compare_command.main,
    "easgd-plot": plot_command.main,
    "easgd-simulate": simulate_command.main,
    "easgd-stability": stability_command.main,
    "plots": plots.main,
}
RUN = "RUN/checkpoints/last.ckpt"  # of the fixture below

# Command line, and what the sentence has to say.
WRONG = [
    # Keys and options that are not there
    ("easgd-train strategy.tua=3", "did you mean strategy.tau?"),
    ("easgd-train seeds=3", "did you mean seed?"),
    ("easgd-train strategy=esgd", "did you mean strategy=easgd?"),
    ("easgd-train method=easgdd", "did you mean method=easgd?"),
    ("easgd-train logger=tensorbord", "did you mean logger=tensorboard?"),
    ("easgd-train data=birds", "easgd-train(data=birds): there is no such data; choose one of"),
    ("easgd-train experiment=nothing", "there is no such experiment; choose one of"),
    ("easgd-train strategy", "write key=value"),
    ("easgd-train ~seed", "easgd-train(seed)"),
    ("easgd-train +data.colour=red", "easgd-train(+data.colour=red)", "correct this value"),
    ("easgd-train --bogus", "easgd-train(--bogus): there is no such option"),
    ("easgd-train --multrun seed=1,2", "did you mean --multirun?"),
    ("easgd-train --config-name nothing", "Cannot find primary config 'nothing'"),
    ("easgd-train --cfg", "easgd-train: argument --cfg/-c: expected one argument"),
    ("easgd-compare --cfg all experiment=quick --info nothing", "easgd-compare: argument --info/-i: invalid choice"),
    ("easgd-train --config-dir nowhere --config-name config", "Additional config directory"),
    # Values
    ("easgd-train strategy.tau=0", "EASGDStrategy(tau=0)", "at least 1"),
    ("easgd-train strategy.tau=[1,2]", "EASGDStrategy(tau=[1, 2])", "give an int"),
    ("easgd-train strategy.tau=1,2", "strategy.tau=1,2", "add --multirun"),
    ("easgd-train strategy.tau=${nothing}", "easgd-train(strategy.tau=${nothing})", "'nothing' not found"),
    ("easgd-train strategy.mode=asink", "EASGDStrategy(mode='asink')", "use "),
    ("easgd-train strategy.timeout=-3", "give a positive number of seconds"),
    ("easgd-train seed=abc", "easgd-train(seed=abc): give a whole number"),
    ("easgd-train seed=-1", "easgd-train(seed=-1): give a whole number"),
    ("easgd-train overwrite=perhaps", "easgd-train(overwrite=perhaps): give true or false"),
    ("easgd-train on_divergence=ignore", "choose one of: fail, report"),
    ("easgd-train optimizer.lr=-1", "easgd-train(optimizer.lr=-1)", "correct this value"),
    ("easgd-train optimizer.lr=fast", "easgd-train(optimizer.lr=fast)", "correct this value"),
    ("easgd-train optimizer._target_=torch.optim.Nothing", "easgd-train(optimizer._target_=torch.optim.Nothing)"),
    ("easgd-train scheduler=cosine scheduler.T_max=0", "easgd-train(scheduler.T_max=0)", "correct this value"),
    ("easgd-train scheduler=cosine trainer.max_epochs=-1", "easgd-train(scheduler.T_max=-1)", "set trainer.max_epochs"),
    ("easgd-train scheduler=cosine_steps", "easgd-train(scheduler.T_max=-1)", "trainer.max_steps"),
    ("easgd-train model.scheduler_interval=day", "Classifier(scheduler_interval='day')", "choose 'epoch'"),
    ("easgd-train data.batch_size=0", "DigitsDataModule(batch_size=0)", "give 1 or more"),
    ("easgd-train data.batch_size=abc", "easgd-train(data.batch_size=abc)", "correct this value"),
    ("easgd-train data.num_workers=-1", "DigitsDataModule(num_workers=-1)", "0 loads without any"),
    ("easgd-train data.sampling=abc", "DigitsDataModule(sampling='abc')", "choose 'full'"),
    ("easgd-train data.num_classes=7", "DigitsDataModule(num_classes=7)", "give num_classes=10"),
    ("easgd-train model.num_classes=7", "Classifier(num_classes=7)", "leave model.num_classes"),
    ("easgd-train model.network.width=abc", "model.network.width=abc", "correct this value"),
    ("easgd-train trainer.devices=0", "easgd-train(trainer.devices=0)", "correct this value"),
    ("easgd-train trainer.devices=two", "easgd-train(trainer.devices=two)", "should be an int > 0"),
    ("easgd-train trainer.accelerator=abacus", "trainer.accelerator=abacus", "Available names are"),
    ("easgd-train trainer.precision=17", "easgd-train(trainer.precision=17)", "Allowed precision values"),
    ("easgd-train trainer.max_epochs=abc", "easgd-train(trainer.max_epochs=abc): give a whole number"),
    ("easgd-train trainer.max_steps=abc", "easgd-train(trainer.max_steps=abc): give a whole number"),
    ("easgd-train trainer.accumulate_grad_batches=0", "give a whole number from 1 on"),
    ("easgd-train callbacks.checkpoint_best.mode=best", "callbacks.checkpoint_best.mode=best", "min, max"),
    ("easgd-train paths.run=null", "easgd-train(paths.run=null): give a path"),
    ("easgd-train paths.run=[a]", "easgd-train(paths.run=['a']): give a path"),
    ("easgd-train ckpt_path=3", "easgd-train(ckpt_path=3): give a path, as ./NAME"),
    ("easgd-train strategy=null", "easgd-train(strategy=null): a group takes one of its options"),
    ("easgd-train strategy._target_=lightning_easgd.NoStrategy", "strategy._target_=lightning_easgd.NoStrategy"),
    ("easgd-train strategy.center_rule._target_=a.B", "no keys; +strategy.center_rule._target_=... gives it"),
    ("easgd-train strategy.fault_tolerance._target_=a.B", "no keys; +strategy.fault_tolerance._target_=... gives"),
    ("easgd-train strategy.process_group_backend=abc", "strategy.process_group_backend=abc", "choose one of: gloo"),
    ("easgd-train data.seed=abc", "easgd-train(data.seed=abc): give a whole number"),
    ("easgd-train model.network.hidden=-5", "easgd-train(model.network.hidden=-5)", "negative dimension"),
    ("easgd-train trainer.devices=9999999999999", "easgd-train(trainer.devices=9999999999999): MemoryError"),
    ("easgd-train trainer.enable_progress_bar=abc", "trainer.enable_progress_bar=abc): give true or false"),
    ("easgd-train trainer.num_sanity_val_steps=abc", "trainer.num_sanity_val_steps=abc): give a whole number"),
    ("easgd-train trainer.val_check_interval=0", "trainer.val_check_interval=0): give a number of batches"),
    ("easgd-train -m seed=range(3,1)", "this sweep has no jobs"),
    ("easgd-train callbacks.time_split=3", "easgd-train(callbacks.time_split=3): give null to leave it out"),
    # What does not go together
    ("easgd-train strategy=single trainer.devices=2", "set trainer.devices=1"),
    ("easgd-train strategy=eamsgd optimizer=adamw", "EAMSGD is defined for SGD", "Use torch.optim.SGD"),
    ("easgd-train -m seed=0,1", "set strategy.start_method=spawn"),
    ("easgd-train experiment=[digits_quick,quick]", "run easgd-compare experiment=quick"),
    ("easgd-train experiment=quick", "run easgd-compare experiment=quick"),
    # Files
    ("easgd-train paths.run=/proc/nowhere", "easgd-train(paths.run=/proc/nowhere)", "choose another directory"),
    ("easgd-train paths.run=file.txt", "easgd-train(paths.run=file.txt)", "choose another directory"),
    ("easgd-train data=cifar10 paths.data=nowhere model=strided_net", "nowhere/cifar-10-batches-py", "download=true"),
    ("easgd-train data=mnist paths.data=nowhere model=strided_net strategy.start_method=fork", "set download=true"),
    ("easgd-train data=imagenet data.root=nowhere model=resnet18 strategy.start_method=spawn", "root (data.root)"),
    ("easgd-train data=imagenet data.root=classes model=resnet18", "set data.num_classes=2"),
    ("easgd-train ckpt_path=nowhere.ckpt", "easgd-train(ckpt_path=nowhere.ckpt): there is no such file; check"),
    ("easgd-train ckpt_path=file.txt", "easgd-train(ckpt_path=file.txt)", "give another one"),
    ("easgd-train ckpt_path=broken/last.ckpt", "broken/config.yaml: this configuration of a run cannot be read"),
    ("easgd-train --config-dir broken --config-name config", "broken/config.yaml", "correct this file"),
    # A run that is there
    ("easgd-train paths.run=RUN/checkpoints", "RUN/checkpoints belongs to the run in", "choose another paths.run"),
    ("easgd-train callbacks.checkpoint_last.dirpath=RUN/checkpoints", "callbacks.checkpoint_last.dirpath=RUN/ch"),
    ("easgd-train logger.csv.save_dir=RUN", "easgd-train(logger.csv.save_dir=RUN): another run's results lie there"),
    ("easgd-train paths.run=RUN", "go on with ckpt_path=RUN/checkpoints/last.ckpt", "overwrite=true"),
    (f"easgd-train paths.run=RUN overwrite=true ckpt_path={RUN}", "leave overwrite=true out"),
    (f"easgd-train ckpt_path={RUN}", "trainer.max_epochs=1; give more, as trainer.max_epochs=2"),
    (f"easgd-train ckpt_path={RUN} optimizer=adamw trainer.max_epochs=2", "optimizer=torch.optim.AdamW", "leave"),
    (f"easgd-train ckpt_path={RUN} scheduler=cosine trainer.max_epochs=2", "easgd-train(scheduler=", "leave"),
    (f"easgd-train ckpt_path={RUN} model.network.width=8 trainer.max_epochs=2", "easgd-train(model.network.width=8)"),
    (f"easgd-train ckpt_path={RUN} method=asgd trainer.max_epochs=2", "callbacks.iterate_average", "choose the method"),
    (f"easgd-train -m ckpt_path={RUN},other.ckpt", "have settings of their own; give one checkpoint"),
    (f"easgd-train ckpt_path={RUN} optimiser.lr=1", "did you mean optimizer?"),
    ("easgd-train --config-dir RUN --config-name config optimizer=adamw", "easgd-train(optimizer=...)", "go on with"),
    # The other commands
    ("easgd-evaluate", "give ckpt_path="),
    ("easgd-evaluate ckpt_path=nowhere.ckpt", "there is no such file; check the path"),
    ("easgd-train ckpt_path=bytes/last.ckpt", "bytes/config.yaml: this configuration of a run cannot be read"),
    ("easgd-evaluate ckpt_path=file.txt", "cannot be read as a checkpoint"),
    ("easgd-evaluate ckpt_path=3", "easgd-evaluate(ckpt_path=3): give a path"),
    (f"easgd-evaluate ckpt_path={RUN} precision=17", "easgd-evaluate(precision=17): Precision 17 is invalid"),
    (f"easgd-evaluate ckpt_path={RUN} seed=abc", "easgd-evaluate(seed=abc): ", "correct this value"),
    (f"easgd-evaluate ckpt_path={RUN} progress_bar=abc", "easgd-evaluate(progress_bar=abc): give true or false"),
    ("easgd-evaluate ckpt=x", "did you mean ckpt_path?"),
    ("easgd-evaluate experiment=quick", "run easgd-compare experiment=quick"),
    (f"easgd-evaluate ckpt_path={RUN} model=strided_net", "another model", "leave model and data"),
    (f"easgd-evaluate ckpt_path={RUN} accelerator=abacus", "Available names are"),
    (f"easgd-evaluate ckpt_path={RUN} data=cifar10 paths.data=nowhere", "set download=true"),
    ("easgd-compare", "choose an experiment"),
    ("easgd-compare experiment=digits_quick", "run easgd-train experiment=digits_quick"),
    ("easgd-compare experiment=quick grid.seeds=[]", "easgd-compare(grid.seeds=[]): give one"),
    ("easgd-compare experiment=quick grid.seeds=abc", "easgd-compare(grid.seeds=abc): give one"),
    ("easgd-compare experiment=quick grid.only=[xyz]", "the grid has no xyz", "labels among"),
    ("easgd-compare experiment=quick grid.steps=null", "give one budget"),
    ("easgd-compare experiment=quick grid.timeout=abc", "give a positive number of seconds"),
    ("easgd-compare experiment=quick grid.baseline=xyz", "easgd-compare(grid.baseline=xyz)", "choose one of"),
    ("easgd-compare experiment=quick grid.workers=[0]", "easgd-compare(grid.workers=[0]): give one"),
    ("easgd-compare experiment=quick grid.tau=[0]", "easgd-compare(grid.tau=[0]): give one whole number"),
    ("easgd-compare experiment=quick grid.seeds=[1,1]", "each once"),
    ("easgd-compare experiment=quick grid.steps=0", "easgd-compare(grid.steps=0): give a whole number from 1 on"),
    ("easgd-compare experiment=quick grid.validate_every=abc", "grid.validate_every=abc): give a whole number"),
    ("easgd-compare experiment=quick grid.steps=null grid.seconds=-1", "grid.seconds=-1): give a positive number"),
    ("easgd-compare experiment=quick grid.target_errors=[2]", "grid.target_errors=[2]): give errors between"),
    ("easgd-compare experiment=quick grid.only=easgd", "grid.only=easgd): give a list, as [easgd]"),
    ("easgd-compare experiment=quick grid.methods=null", "grid.methods=None): give methods and rates"),
    ("easgd-compare experiment=quick grid.methods.easgd.lr=[-1]", "grid.methods.easgd=", "give it learning rates"),
    ("easgd-compare experiment=quick grid.methods.easgd.lr=0.1", "grid.methods.easgd=", "give it learning rates"),
    ("easgd-compare experiment=quick +grid.methods.ddp.tau=[0]", "grid.methods.ddp.tau=[0]): give whole numbers"),
    ("easgd-compare experiment=quick +grid.methods.foo.lr=[0.1]", "no method 'foo'; set its method, one of: "),
    ("easgd-compare experiment=quick fast_dev_run=abc", "easgd-compare(fast_dev_run=abc): give true or false"),
    ("easgd-compare experiment=quick directory=RUN", "easgd-compare(directory=RUN): this directory holds a run"),
    ("easgd-compare experiment=quick directory=file.txt", "FileExistsError", "check this path"),
    ("easgd-compare experiment=quick seed=3", "see grid.methods, grid.seeds"),
    ("easgd-compare experiment=quick optimizer.lrr=3", "did you mean optimizer.lr?"),
    ("easgd-compare experiment=quick data=cifar10 paths.data=nowhere", "set download=true"),
    ("easgd-plot", "usage: easgd-plot DIRECTORY"),
    ("easgd-plot nowhere", "give the directory of an easgd-compare"),
    ("easgd-plot torn", "easgd-plot(torn): it has no finished run to draw"),
    ("plots torn", "plots: ", "(traceback: "),
    ("plots bytes", "bytes/accuracy.csv: this is no text (utf-8)", "(traceback: "),
    ("plots classes", "there is nothing to draw"),
    ("plots nowhere", "usage: python -m lightning_easgd.plots RUN_DIRECTORY"),
    ("easgd-simulate walk", "easgd-simulate --help"),
    ("easgd-simulate run workers=-4", "workers=-4: give 1 or more"),
    ("easgd-simulate run worker=4", "did you mean workers?"),
    ("easgd-simulate sweep workers=1,2 file=file.txt", "file.txt", "overwrite=true"),
    ("easgd-simulate sweep workers=1,2 file=a.png", "file=a.png: this is no place for a table"),
    ("easgd-simulate sweep workers=1,2 file=", "give a CSV file, as file=sweep.csv"),
    ("easgd-simulate plot file=RUN", "IsADirectoryError", "check this path"),
    ("easgd-simulate sweep workers=1,2 overwrite=yes", "overwrite=yes: this is neither true nor false"),
    ("easgd-stability check lr=0.1", "give curvature=..., workers=..."),
    ("easgd-stability check lr=0 curvature=1 workers=2", "Setting(lr=0.0)"),
    ("easgd-stability draw points=0", "points=0: a map has 2 or more"),
    ("easgd-stability draw directory=.", "admm.png", "overwrite=true"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, a file, class folders of images, and an old figure."""
    folder = tmp_path_factory.mktemp("place")
    # NOTE: no processes: one worker.
    train.train(
        composed(
            folder / "RUN", "strategy=single", "trainer.max_epochs=1", "trainer.limit_train_batches=2", "plot=false",
            "report=false",
        )
    )  # fmt: skip
    (folder / "file.txt").write_text("text")
    (folder / "torn").mkdir()
    for name in ("cells.csv", "accuracy.csv"):
        (folder / "torn" / name).write_text("text\n1\n")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("seed: [")
    (folder / "broken" / "last.ckpt").write_text("")
    (folder / "bytes").mkdir()
    for name in ("config.yaml", "accuracy.csv"):
        (folder / "bytes" / name).write_bytes(b"\xff\xfe\x00a,")
    (folder / "bytes" / "last.ckpt").write_text("")
    (folder / "admm.png").write_text("figure")
    for name in ("cat", "dog"):
        (folder / "classes" / "train" / name).mkdir(parents=True)
    return folder


@pytest.mark.parametrize(("line", "says"), [(line, says) for line, *says in WRONG], ids=[line for line, *_ in WRONG])
def test_wrong_input_is_a_sentence(monkeypatch, capfd, place, line, says):
    name, *words = line.split()
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [name, *words])
    before = {path: path.stat().st_mtime_ns for path in (place / "RUN").rglob("*")}
    with pytest.raises(SystemExit) as end:
        COMMANDS[name]()
    assert end.value.code
    assert isinstance(end.value.code, str), "a sentence, which makes the exit code 1"
    shown = capfd.readouterr()
    lines = [*shown.out.splitlines(), *shown.err.splitlines(), *end.value.code.splitlines()]
    assert len([each for each in lines if "[HYDRA]" not in each]) <= 3, lines
    for part in says:
        assert part in end.value.code
    assert {path: path.stat().st_mtime_ns for path in (place / "RUN").rglob("*")} == before
