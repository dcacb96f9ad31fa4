"""The center and each worker, scored on the same data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_easgd.callbacks.recording import (
    ElasticStrategy,
    evaluating,
    gather,
    layout_of,
    number_of,
    own_part,
    own_weights,
    prepared,
    reached,
    write_csv,
)

__all__ = ["ACCURACY_FILE", "WorkerEvaluation", "accuracy"]

Score: TypeAlias = Callable[[L.LightningModule, Any], tuple[Tensor, int]]

ACCURACY_FILE = "accuracy.csv"


def accuracy(module: L.LightningModule, batch: Any) -> tuple[Tensor, int]:
    """Counts the right answers to a batch of (inputs, targets).

    Args:
        module: Maps inputs to logits.
        batch: Inputs and targets.

    Returns:
        The number of right answers and the number of samples.
    """
    inputs, targets = batch
    return (module(inputs).argmax(dim=-1) == targets).sum(), len(targets)


class WorkerEvaluation(Callback):
    """Scores the center and each worker's own weights on the same data.

    Lightning's validation splits the data over the ranks, each of which would score another worker on another
    part. Here every worker sees the whole set; the center, which is the same everywhere, is scored in equal
    parts by all workers. With a strategy without a center, the model that training returns (rank 0's) takes its
    place. After the loss of an asynchronous worker each rank scores the center alone, and knows its own worker only.

    The data come from the datamodule's `val_dataloader` after each validation, and from its `test_dataloader`
    at the end of training.

    Args:
        directory: Where `accuracy.csv` goes; None writes none and only logs.
        test: Score the test set at the end of training.
        max_batches: Score at most so many batches of a set; None scores all.
        score: Returns the sum of the scores and the number of samples of a batch.

    Raises:
        ValueError: If ``max_batches`` < 1.
        TypeError: When training starts, if there is no datamodule, or if its test set is to be scored and it has none.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        test: bool = True,
        max_batches: int | None = None,
        score: Score = accuracy,
    ) -> None:
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"WorkerEvaluation(max_batches={max_batches}): give 1 or more, or None to score all.")
        self.directory = directory
        self.test = test
        self.max_batches = max_batches
        self.score = score
        self.last_scores: dict[str, float] = {}
        self._rows: list[list[Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts anew, so that a second `fit` does not repeat the rows of the first.

        Raises:
            TypeError: If what is to be scored is not there: at the end of training that would cost what was trained.
        """
        self._rows = []
        datamodule: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
        if datamodule is None:
            raise TypeError(
                "WorkerEvaluation(): it scores every worker on the same, unsplit data and takes them from a "
                "datamodule, but the trainer has none; give trainer.fit(..., datamodule=...)."
            )
        if self.test and not is_overridden("test_dataloader", datamodule):
            raise TypeError(
                f"WorkerEvaluation(test=True): {type(datamodule).__name__} has no test_dataloader, which is scored at"
                " the end of training; give it one, or test=False."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the validation set."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._evaluate(trainer, pl_module, "val")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the test set."""
        if self.test:
            self._evaluate(trainer, pl_module, "test")

    def _evaluate(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        batches = self._batches(trainer, stage)
        strategy, rank = trainer.strategy, trainer.global_rank
        layout = layout_of(trainer)
        with own_weights(strategy):
            worker = self._total(trainer, module, batches)
        model = worker if rank == 0 else (0.0, 0)
        if isinstance(strategy, ElasticStrategy):
            with strategy.center_weights():
                model = self._total(trainer, module, batches[own_part(trainer)])
        gathered, known = gather(trainer, [*worker, *model]), reached(trainer)
        model_sum, model_count = sum(row[2] for row in gathered), sum(row[3] for row in gathered)
        scores = {"center": model_sum / model_count}
        rows = {i: gathered[ranks[0]] for i, ranks in enumerate(layout.inside) if ranks[0] in known}
        scores |= {f"worker_{number_of(trainer, i)}": row[0] / row[1] for i, row in rows.items()}
        self.last_scores = scores
        self._record(trainer, stage, scores)

    def _batches(self, trainer: L.Trainer, stage: str) -> list[Any]:
        datamodule: L.LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "test":
            datamodule.setup("test")
        loader = datamodule.val_dataloader() if stage == "val" else datamodule.test_dataloader()
        batches: list[Any] = []
        for batch in loader:
            if self.max_batches is not None and len(batches) >= self.max_batches:
                break
            batches.append(batch)
        return batches

    def _total(self, trainer: L.Trainer, module: L.LightningModule, batches: Sequence[Any]) -> tuple[float, int]:
        total, count = 0.0, 0
        with evaluating(module), torch.no_grad():
            for batch in batches:
                given = prepared(trainer, batch)
                with trainer.precision_plugin.forward_context():
                    value, samples = self.score(module, given)
                total, count = total + float(value), count + samples
        return total, count

    def _record(self, trainer: L.Trainer, stage: str, scores: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"{stage}/accuracy_{name}": value for name, value in scores.items()},
                step=trainer.global_step,
            )
        self._rows += [[stage, trainer.global_step, name, value] for name, value in scores.items()]
        if self.directory is not None:
            write_csv(Path(self.directory) / ACCURACY_FILE, ["stage", "step", "weights", "accuracy"], self._rows)
