"""The contract with Lightning's private parts: if one of these fails, lightning_easgd/_compat.py must follow."""

import inspect
import signal
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from toys import quiet_trainer

from lightning_easgd._compat import free_running, is_without_steps, request_stop


def test_the_broadcast_before_every_batch_is_a_method_without_arguments():
    assert list(inspect.signature(_TrainingEpochLoop._broadcast_sigterm_tensor).parameters) == ["self"]
    assert "_broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop.advance)


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
    original = loop._broadcast_sigterm_tensor, connector._sigterm_notifier_fn, loop.val_loop.run
    calls = []
    undo = free_running(trainer, lambda: calls.append("stop"), nullcontext, nullcontext)
    assert loop._broadcast_sigterm_tensor() is None
    connector._sigterm_notifier_fn(signal.SIGTERM, None)
    assert calls == ["stop"]
    undo()
    assert (loop._broadcast_sigterm_tensor, connector._sigterm_notifier_fn, loop.val_loop.run) == original
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
