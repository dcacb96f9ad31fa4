"""What Lightning does in private and a strategy has no hook for; a contract test watches each place."""

import contextlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["communicates_at_epoch_end", "free_running", "reads_the_clock", "request_stop"]


def free_running(trainer: Any, on_sigterm: Callable[[], None]) -> Callable[[], None]:
    """Let the ranks of a fit run at their own pace.

    Since 2.5.2 Lightning broadcasts a flag from rank 0 before every batch, and again inside its SIGTERM handler, so
    that all ranks run in lock-step and a preempted rank blocks. Both methods are replaced on this trainer's objects.

    Args:
        trainer: The trainer, before it registers its signal handlers (that is: in ``Strategy.setup``).
        on_sigterm: Called in place of the handler's broadcast; it runs inside a signal handler.

    Returns:
        A function that undoes it.
    """
    loop = trainer.fit_loop.epoch_loop
    connector = trainer._signal_connector
    forwarded = False

    def notify(signum: int, _: FrameType | None) -> None:
        nonlocal forwarded
        launcher = trainer.strategy.launcher
        if launcher is not None and not forwarded:
            forwarded = True
            launcher.kill(signal.Signals(signum))
        on_sigterm()

    replaced = []
    for owner, name, replacement in (
        (loop, "_broadcast_sigterm_tensor", lambda: None),
        (connector, "_sigterm_notifier_fn", notify),
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


def reads_the_clock(callback: Any) -> bool:
    """Whether a callback asks all ranks for the time after every batch: a timer, or a checkpoint that follows one."""
    return type(callback).__name__ == "Timer" or getattr(callback, "_train_time_interval", None) is not None
