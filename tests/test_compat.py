"""The contract with Lightning's private parts: if one of these fails, strategies/lightning_private.py must follow.

Private hooks that a strategy and a launcher can only override are listed here too, and nothing else is touched.
"""

import ast
import inspect
import re
import signal
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, Timer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from ranks import run_ranks
from toys import Quadratic, Regression, fitted, quiet_trainer

import lightning_easgd
from lightning_easgd import LocalStrategy
from lightning_easgd.strategies.trainer.lightning_private import (
    communicates_at_epoch_end,
    free_running,
    is_without_steps,
    linking_what_is_saved,
    reads_common_clock,
    request_stop,
)

PACKAGE = Path(lightning_easgd.__file__).parent
SOURCES = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py") if path.name != "lightning_private.py"}


def private(*objects):
    """The private names of Lightning's objects; those of every ``torch.nn.Module`` are torch's."""
    names = {name for owner in objects for name in dir(owner)} - set(dir(torch.nn.Module()))
    return {name for name in names if name.startswith("_") and not name.endswith("__")}


def used(path, on_self):
    """The private attributes that a file uses of itself and its base classes, or of other objects."""
    for node in ast.walk(SOURCES[path]):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if (owner in ("self", "super()")) == on_self:
                yield node.attr


def test_private_parts_of_trainer_loops_and_callbacks_are_touched_in_one_module():
    trainer = quiet_trainer()
    parts = [value for value in vars(trainer).values() if type(value).__module__.startswith("lightning.pytorch")]
    theirs = private(trainer, *parts, trainer.fit_loop.epoch_loop, pl.LightningModule(), DDPStrategy())
    theirs |= private(ModelCheckpoint(), EarlyStopping("loss"), Timer())
    assert {"_signal_connector", "_results", "_train_time_interval"} <= theirs
    assert {(path.name, name) for path in SOURCES for name in used(path, on_self=False) if name in theirs} == set()


def test_private_hooks_that_the_strategies_share_with_lightning():
    # Fabric's strategies are no subclasses of this DDPStrategy.
    names = ("worker_process", "center_method", "easgd", "downpour_family", "local", "launching", "post_local_sgd")
    strategies = [path for path in SOURCES if path.stem in names and "averagers" not in path.parts]
    strategies.append(PACKAGE / "strategies/trainer/strategy.py")
    theirs = private(DDPStrategy(), _MultiProcessingLauncher(DDPStrategy()))
    assert {name for path in strategies for name in used(path, on_self=True)} & theirs == {
        "_configure_launcher",
        "_ddp_comm_hook",
        "_ddp_comm_state",
        "_ddp_comm_wrapper",
        "_ddp_kwargs",
        "_get_process_group_backend",
        "_launcher",
        "_layer_sync",
        "_model_averager",  # of post-local SGD
        "_start_method",
        "_strategy",  # the launcher's
        "_timeout",
        "_wrapping_function",  # the launcher's
    }


def test_private_classes_that_are_imported():
    imported = {
        alias.name
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("lightning.", "pytorch_lightning"))
        for alias in node.names
    }
    assert {name for name in imported if name.startswith("_")} == {"_MultiProcessingLauncher"}


def test_the_launcher_is_configured_when_devices_and_layer_sync_are_known():
    seen = []

    class Strategy(DDPStrategy):
        def _configure_launcher(self):
            seen.append((len(self.parallel_devices), self._layer_sync is not None))
            super()._configure_launcher()

    quiet_trainer(strategy=Strategy(), devices=3, sync_batchnorm=True)
    assert seen == [(3, True)]


def test_the_launcher_of_a_strategy_can_be_replaced():
    strategy = DDPStrategy(start_method="fork", timeout=timedelta(seconds=7), process_group_backend="gloo")
    assert (strategy._start_method, strategy._timeout) == ("fork", timedelta(seconds=7))
    launcher = strategy._launcher = _MultiProcessingLauncher(strategy, start_method="fork")
    assert strategy.launcher is launcher
    assert launcher._strategy is strategy


def test_the_launcher_runs_its_wrapping_function_in_each_rank():
    assert "self._wrapping_function" in inspect.getsource(_MultiProcessingLauncher.launch)
    assert "is_alive" not in inspect.getsource(_MultiProcessingLauncher._wrapping_function)


def test_the_backend_is_known_when_the_process_group_is_there():
    source = inspect.getsource(DDPStrategy.setup_distributed)
    assert "self._process_group_backend = self._get_process_group_backend()" in source
    strategy = DDPStrategy(process_group_backend="gloo")
    assert strategy.process_group_backend == "gloo"


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (Timer("00:00:10:00"), True),
        (ModelCheckpoint(train_time_interval=timedelta(minutes=5)), True),
        (ModelCheckpoint(every_n_train_steps=5), False),
        (EarlyStopping("loss"), False),
    ],
)
def test_callbacks_that_read_the_clock(callback, expected):
    assert reads_common_clock(callback) == expected


@pytest.mark.parametrize(
    ("logged", "expected"),
    [
        ({}, False),
        ({"on_epoch": True, "on_step": False}, False),
        ({"on_epoch": True, "sync_dist": True}, True),
        ({"on_epoch": False, "on_step": True, "sync_dist": True}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*sync_dist.*")
def test_what_is_logged_tells_whether_lightning_communicates_at_the_epochs_end(logged, expected):
    class Logging(Regression):
        def training_step(self, batch, index):
            loss = self.loss(batch)
            if logged:
                self.log("loss", loss, **logged)
            return loss

        def on_train_epoch_end(self):
            seen.append(communicates_at_epoch_end(self.trainer))

    def train():
        fitted(Logging(), LocalStrategy(), 1, limit_val_batches=0)
        return seen

    seen = []
    assert run_ranks(train, 1) == [[expected]]


def test_nothing_but_one_method_broadcasts_before_a_batch():
    advance = inspect.getsource(_TrainingEpochLoop.advance)
    assert set(re.findall(r"\w*broadcast\w*", advance)) <= {"_broadcast_sigterm_tensor"}
    if hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor"):  # not before 2.5.2
        assert list(inspect.signature(_TrainingEpochLoop._broadcast_sigterm_tensor).parameters) == ["self"]
        assert "self._broadcast_sigterm_tensor()" in advance


def test_the_handler_is_looked_up_on_the_instance_when_it_is_registered_after_the_strategys_setup():
    assert "self._sigterm_notifier_fn" in inspect.getsource(_SignalConnector.register_signal_handlers)
    run = inspect.getsource(pl.Trainer._run)
    assert run.index("self.strategy.setup(self)") < run.index("register_signal_handlers()")


def test_states_compare_as_strings():
    assert TrainerFn.FITTING == "fit"
    assert TrainerStatus.INTERRUPTED == "interrupted"


def test_free_running_is_undone():
    trainer = quiet_trainer()
    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
    has_broadcast = hasattr(loop, "_broadcast_sigterm_tensor")
    original = getattr(loop, "_broadcast_sigterm_tensor", None), connector._sigterm_notifier_fn, loop.val_loop.run
    calls = []
    undo = free_running(trainer, lambda: calls.append("stop"), nullcontext, nullcontext)
    if has_broadcast:
        assert vars(loop)["_broadcast_sigterm_tensor"]() is None
    connector._sigterm_notifier_fn(signal.SIGTERM, None)
    assert calls == ["stop"]
    undo()
    now = getattr(loop, "_broadcast_sigterm_tensor", None), connector._sigterm_notifier_fn, loop.val_loop.run
    assert now == original
    undo()


def test_epochs_begin_with_a_new_iterator_of_the_fetcher():
    assert "iter(self._data_fetcher)" in inspect.getsource(_FitLoop.setup_data)
    assert "iter(data_fetcher)" in inspect.getsource(_TrainingEpochLoop.on_run_start)


def test_request_stop_is_what_the_loops_look_at():
    trainer = quiet_trainer()
    assert not trainer.received_sigterm
    request_stop(trainer)
    assert trainer.received_sigterm


def test_an_epoch_without_steps_is_announced_where_swa_does_so():
    trainer = quiet_trainer()
    assert not is_without_steps(trainer)
    assert "trainer.fit_loop._skip_backward = True" in inspect.getsource(StochasticWeightAveraging.on_train_epoch_start)
    trainer.fit_loop._skip_backward = True
    assert is_without_steps(trainer)


@pytest.mark.parametrize(
    "missing",
    [
        "_broadcast_sigterm_tensor",
        "_sigterm_notifier_fn",
        "_slurm_sigusr_handler_fn",
        "run",
        "increment_progress_to_evaluation_end",
    ],
)
def test_a_lightning_without_the_method_needs_no_replacement(missing):
    class Owner:
        def _broadcast_sigterm_tensor(self): ...

        def _sigterm_notifier_fn(self): ...

        def _slurm_sigusr_handler_fn(self, signum, frame): ...

        def run(self): ...

        def increment_progress_to_evaluation_end(self): ...

    owner = Owner()
    owner.val_loop = owner
    delattr(Owner, missing)
    trainer = type("T", (), {"fit_loop": type("F", (), {"epoch_loop": owner}), "_signal_connector": owner})
    free_running(trainer, lambda: None, nullcontext, nullcontext)()
    assert not hasattr(owner, missing)


@pytest.mark.parametrize("has_saved", [True, False])
def test_a_link_to_the_last_checkpoint_is_made_where_the_strategy_has_saved_it(has_saved, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last="link")
    trainer = quiet_trainer(devices=1, max_steps=4, callbacks=[checkpoint], enable_checkpointing=True)
    undo = linking_what_is_saved(trainer, lambda: has_saved)
    trainer.fit(Quadratic(record=False))
    assert (tmp_path / "last.ckpt").is_symlink() == has_saved
    undo()
    assert "_link_checkpoint" not in vars(checkpoint)
