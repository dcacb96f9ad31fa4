"""What Lightning does in private and a strategy has no hook for; a contract test watches each place."""

import contextlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning_easgd.checkpointing import isolated_random_state

__all__ = [
    "TRAINING_LOADER_BARRIER",
    "begins_epoch",
    "communicates_at_epoch_end",
    "fetches_next",
    "free_running",
    "request_stop",
]

TRAINING_LOADER_BARRIER = "train_dataloader()"
"""Where Lightning waits for all ranks before it draws the order of the first epoch."""


def free_running(
    trainer: Any,
    on_sigterm: Callable[[], None],
    handling_signal: Callable[[], contextlib.AbstractContextManager[None]],
) -> Callable[[], None]:
    """Let the ranks of a fit run at their own pace.

    Since 2.5.2 Lightning broadcasts a flag from rank 0 before every batch, and again inside its SIGTERM handler, so
    that all ranks run in lock-step and a preempted rank blocks. Both methods are replaced on this trainer's objects.
    The handler of SLURM's requeue signal, which saves a checkpoint, is told that it cannot wait for anybody. And the
    validation of a fit leaves the random number generators as they were, so that training does not depend on whether
    a resumed run repeats a validation.

    Args:
        trainer: The trainer, before it registers its signal handlers (that is: in ``Strategy.setup``).
        on_sigterm: Called in place of the handler's broadcast; it runs inside a signal handler.
        handling_signal: Makes the context in which the requeue handler runs.

    Returns:
        A function that undoes it.
    """
    loop = trainer.fit_loop.epoch_loop
    connector = trainer._signal_connector
    validation = loop.val_loop
    forwarded = False

    def notify(signum: int, _: FrameType | None) -> None:
        nonlocal forwarded
        launcher = trainer.strategy.launcher
        if launcher is not None and not forwarded:
            forwarded = True
            launcher.kill(signal.Signals(signum))
        on_sigterm()

    def requeue(signum: int, frame: FrameType | None) -> None:
        with handling_signal():
            type(connector)._slurm_sigusr_handler_fn(connector, signum, frame)

    def validate() -> Any:
        with isolated_random_state(trainer.strategy.root_device):
            return type(validation).run(validation)

    replaced = []
    for owner, name, replacement in (
        (loop, "_broadcast_sigterm_tensor", lambda: None),
        (connector, "_sigterm_notifier_fn", notify),
        (connector, "_slurm_sigusr_handler_fn", requeue),
        (validation, "run", validate),
    ):
        if hasattr(owner, name):
            setattr(owner, name, replacement)
            replaced.append((owner, name))

    def undo() -> None:
        for owner, name in replaced:
            with contextlib.suppress(AttributeError):
                delattr(owner, name)

    return undo


def request_stop(trainer: Any) -> None:
    """Make the trainer end the fit with ``SIGTERMException`` after the current batch, as its own handler does."""
    trainer._signal_connector.received_sigterm = True


def communicates_at_epoch_end(trainer: Any) -> bool:
    """Whether Lightning itself communicates at the end of an epoch: to reduce what was logged, or to stop and save."""
    logged = trainer.fit_loop.epoch_loop._results.values()
    return bool(
        trainer.checkpoint_callbacks
        or trainer.early_stopping_callbacks
        or any(result.meta.on_epoch and (result.meta.sync.should or not result.is_tensor) for result in logged)
    )


def begins_epoch(trainer: Any) -> bool:
    """Whether a resumed fit, its loops restored, goes on with a new epoch."""
    epochs = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    saved_after_batch = batches.current.completed < batches.current.processed
    return bool(epochs.processed == epochs.ready or (batches.is_last_batch and saved_after_batch))


def fetches_next(trainer: Any) -> bool:
    """Whether a resumed fit, its loops restored, goes on with a batch of the epoch that it was in."""
    return not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
