"""Where the time of a run went."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_easgd.callbacks.recording import (
    ElasticStrategy,
    gather,
    reached,
    write_csv,
)

__all__ = ["TIME_FILE", "TimeSplit"]

TIME_FILE = "time.csv"


class TimeSplit(Callback):
    """Splits each rank's wall-clock of training into compute, data, communication and the rest.

    Communication is what the strategy says it has waited; compute is the time inside batches less what was
    waited there; data is the time between two batches that no validation takes; the rest is validation and
    checkpoints. What DDP's all-reduce takes cannot be seen from outside and is part of compute; Lightning's
    broadcast before each batch, which EASGD switches off, is part of data.

    Put it last, so that what other callbacks do in a validation is not taken for data.

    Args:
        directory: Where `time.csv` goes; None writes none.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = directory
        self.seconds: list[dict[str, float]] = []
        self._compute = self._data = 0.0
        self._start = self._stop = _Moment(0.0, 0.0)
        self._mark = self._batch_start = _Moment(0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts the clock."""
        self._compute = self._data = 0.0
        self._start = self._stop = self._mark = _Moment.now(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Marks where the first batch of an epoch is fetched."""
        self._mark = _Moment.now(trainer)

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Counts what has passed since the mark as data: the batch is here now."""
        self._batch_start = _Moment.now(trainer)
        self._data += self._batch_start.working_since(self._mark)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Counts the batch as compute, less what was waited in it."""
        self._mark = self._stop = _Moment.now(trainer)
        self._compute += self._mark.working_since(self._batch_start)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Marks where the next batch is fetched."""
        self._mark = self._stop = _Moment.now(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Marks where training ends if this epoch is the last."""
        self._stop = _Moment.now(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Gathers the split of every rank; rank 0 writes it."""
        communication = self._stop.waited - self._start.waited
        total = self._stop.clock - self._start.clock
        rest = total - self._compute - self._data - communication
        names = ["compute", "data", "communication", "rest", "total"]
        rows = gather(trainer, [self._compute, self._data, communication, rest, total])
        self.seconds = [dict(zip(names, rows[rank], strict=True)) for rank in reached(trainer)]
        if trainer.is_global_zero and self.directory is not None:
            write_csv(
                Path(self.directory) / TIME_FILE,
                ["rank", *names],
                ([rank, *rows[rank]] for rank in reached(trainer)),
            )


@dataclass(frozen=True)
class _Moment:
    """A time on the clock, and how many seconds the strategy had waited until then."""

    clock: float
    waited: float

    @classmethod
    def now(cls, trainer: L.Trainer) -> Self:
        strategy = trainer.strategy
        waited = strategy.communication.seconds_waited if isinstance(strategy, ElasticStrategy) else 0.0
        return cls(time.perf_counter(), waited)

    def working_since(self, earlier: "_Moment") -> float:
        """Seconds since `earlier` in which the strategy did not wait."""
        return self.clock - earlier.clock - (self.waited - earlier.waited)
