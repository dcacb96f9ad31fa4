"""How error falls with time, epochs and bytes: what training methods are compared by."""

import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F  # the name everyone knows it by
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_easgd.callbacks.recording import (
    ElasticStrategy,
    ddp_bytes,
    evaluating,
    gather,
    layout_of,
    own_part,
    prepared,
    ranks_that_draw_alike,
    write_csv,
)
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy

__all__ = ["CURVE_FILE", "LearningCurve"]

CURVE_FILE = "curve.csv"
_COLUMNS = ("step", "epochs", "seconds", "bytes_sent", "val_loss", "val_error", "test_loss", "test_error")


class LearningCurve(Callback):
    """Scores the evaluated model on the whole validation and test set, and says what training has cost until then.

    The evaluated model is the center (with A- and MVADOWNPOUR the average of it), the workers' mean of post-local SGD,
    the average of ASGD and MVASGD, and rank 0's model elsewhere. It is scored at each validation and at the end of
    training; the loss is cross-entropy, the error the share of wrong answers.

    =============  ====================================================================================================
    column         meaning
    =============  ====================================================================================================
    ``step``       optimizer steps of rank 0
    ``epochs``     samples that all workers have seen together, over the size of the training set
    ``seconds``    wall-clock of rank 0, validations not counted
    ``bytes_sent`` bytes that a worker has sent for its training, mean of the workers: as the strategy counts them; for
                   DDP a ring all-reduce of the gradients at every step
    =============  ====================================================================================================

    A budget in seconds ends training at the first validation at which it is used up: all ranks meet there, so that
    nobody has to ask for the time at every batch. Training that has diverged, that is with a validation loss that is
    not finite, ends there too.

    The data come from the datamodule, whose batches are pairs of inputs and targets. Put it last but for `TimeSplit`.

    Args:
        directory: Where `curve.csv` goes.
        max_seconds: Budget; None for none.

    Raises:
        ValueError: If the budget is not positive.
    """

    def __init__(self, directory: str | Path, max_seconds: float | None = None) -> None:
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"LearningCurve(max_seconds={max_seconds}): a budget is positive; None sets no limit.")
        self.directory = directory
        self.max_seconds = max_seconds
        self.rows: list[list[float]] = []
        self._seconds = self._started = 0.0
        self._samples = self._first_step = 0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.rows = []
        self._seconds, self._samples, self._first_step = 0.0, 0, trainer.global_step
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples."""
        self._samples += len(batch[0])

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._started

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a row, and end a training that has used up its budget or has diverged."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._record(trainer, pl_module)
            row = dict(zip(_COLUMNS, self.rows[-1], strict=True))
            over = self.max_seconds is not None and row["seconds"] >= self.max_seconds
            if over or not math.isfinite(row["val_loss"]):
                trainer.should_stop = True
        self._started = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the last row."""
        last = self.rows[-1][0] if self.rows else None
        # Rank 0's step counts: all have to agree on whether they score once more.
        if trainer.strategy.broadcast(last != trainer.global_step):
            self._seconds += time.perf_counter() - self._started
            self._record(trainer, pl_module)

    def _record(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        scores = [*self._score(trainer, module, "val"), *self._score(trainer, module, "test")]
        sent = _bytes_sent(trainer, module, trainer.global_step - self._first_step)
        ranks = gather(trainer, [trainer.global_step, self._seconds, self._samples, sent, *scores])
        step, seconds = ranks[0][:2]
        samples, sent, *totals = (sum(column) for column in list(zip(*ranks, strict=True))[2:])
        samples /= ranks_that_draw_alike(trainer)
        size = len(trainer.train_dataloader.dataset)  # type: ignore[union-attr]
        errors = [totals[i + j] / totals[i + 2] for i in (0, 3) for j in (0, 1)]
        self.rows.append([int(step), samples / size, seconds, sent / layout_of(trainer).workers, *errors])
        if trainer.is_global_zero:
            write_csv(Path(self.directory) / CURVE_FILE, _COLUMNS, self.rows)

    @torch.no_grad()
    def _score(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> tuple[float, float, int]:
        """Sum of the losses, wrong answers and samples of this rank's part of a set."""
        strategy = trainer.strategy
        if isinstance(strategy, ElasticStrategy):  # the same model everywhere: each worker scores a part
            with strategy.center_weights():
                return self._total(trainer, module, stage, own_part(trainer))
        return self._total(trainer, module, stage, slice(None)) if trainer.global_rank == 0 else (0.0, 0.0, 0)

    def _total(
        self, trainer: L.Trainer, module: L.LightningModule, stage: str, part: slice
    ) -> tuple[float, float, int]:
        data: L.LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        data.setup("test")
        loader = data.val_dataloader() if stage == "val" else data.test_dataloader()
        loss, wrong, count = 0.0, 0.0, 0
        with evaluating(module):
            for batch in islice(loader, part.start or 0, None, part.step or 1):
                inputs, targets = prepared(trainer, batch)
                with trainer.precision_plugin.forward_context():
                    logits = module(inputs)
                loss += float(F.cross_entropy(logits.float(), targets, reduction="sum"))
                wrong += float((logits.argmax(dim=-1) != targets).sum())
                count += len(targets)
        return loss, wrong, count


def _bytes_sent(trainer: L.Trainer, module: L.LightningModule, steps: int) -> int:
    """Bytes that this rank has sent for its training."""
    strategy = trainer.strategy
    if isinstance(strategy, ElasticStrategy):
        return strategy.communication.bytes_sent
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, TrainerStrategy):
        size = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
        return ddp_bytes(size, steps, trainer.world_size)
    return 0
