"""How far a training is: a bar on a terminal, a line for each epoch or minute elsewhere."""

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from typing_extensions import override

__all__ = ["ProgressLines", "progress"]


def progress(refresh_rate: int = 10, leave: bool = False, seconds: float = 60.0) -> ProgressBar:
    """Make what shows the progress where the output goes.

    Args:
        refresh_rate: Batches between two states of the bar; 0 shows nothing, anywhere.
        leave: Whether the bars of past epochs stay.
        seconds: Between two lines within an epoch, where there is no terminal.
    """
    if sys.stdout.isatty() or refresh_rate == 0:
        return TQDMProgressBar(refresh_rate=refresh_rate, leave=leave)
    return ProgressLines(seconds)


class ProgressLines(ProgressBar):
    """Prints a line at the end of each epoch, and within long ones at most one in so many seconds.

    Args:
        seconds: Between two lines within an epoch.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        super().__init__()
        self._seconds = seconds
        self._enabled = True
        self._started = self._last = 0.0

    @override
    def disable(self) -> None:
        """Print nothing; Lightning calls it on all ranks but the first."""
        self._enabled = False

    @override
    def enable(self) -> None:
        """Print."""
        self._enabled = True

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = self._last = time.monotonic()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far a long epoch is."""
        if time.monotonic() - self._last >= self._seconds:
            self._print(trainer, f"batch {batch_idx + 1}/{self.total_train_batches}")

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how an epoch has ended; its validation lies behind it."""
        self._print(trainer, "")

    def _print(self, trainer: L.Trainer, within: str) -> None:
        self._last = time.monotonic()
        if not self._enabled:
            return
        last = trainer.max_epochs
        of = f"/{last}" if last is not None and last > 0 and math.isfinite(last) else ""
        values = {name: trainer.callback_metrics[name] for name in _SHOWN if name in trainer.callback_metrics}
        parts = [
            f"epoch {trainer.current_epoch + 1}{of}",
            within,
            f"step {trainer.global_step}",
            *(f"{name} {float(value):.4g}" for name, value in values.items()),
            f"{self._last - self._started:.0f} s",
        ]
        print("  ".join(part for part in parts if part), flush=True)


_SHOWN = ("train/loss", "val/loss", "val/accuracy")
