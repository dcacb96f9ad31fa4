"""Callbacks that watch a run through the strategy's public interface and write what they see to CSV files.

None of them runs a collective, or waits for an exchange in flight, while batches are trained. They gather what the
ranks have seen where all ranks meet anyway: at the end of a validation and at the end of training. With strategies
that have no center (DDP, one device, independent workers) they record what makes sense there.
"""

import csv
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

Score: TypeAlias = Callable[[L.LightningModule, Any], tuple[Tensor, int]]

ACCURACY_FILE = "accuracy.csv"
COMMUNICATION_FILE = "communication.csv"
TIME_FILE = "time.csv"


class Communication(Protocol):
    """What a strategy has communicated so far, on this rank."""

    exchanges: int
    bytes_sent: int
    seconds_waited: float


@runtime_checkable
class ElasticStrategy(Protocol):
    """The part of `EASGDStrategy` that the callbacks use."""

    @property
    def communication(self) -> Communication:
        """Counts of this rank."""

    def elastic_distance(self) -> float | None:
        """Distance of this worker from the center at the last exchange."""

    def center_weights(self) -> AbstractContextManager[Any]:
        """The module holds the center inside."""

    def worker_weights(self) -> AbstractContextManager[Any]:
        """The module holds this worker's own weights inside."""


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


class ElasticMonitor(Callback):
    """Logs the elastic distance ‖x_i - x̃‖ of this worker, exchanges, bytes sent and seconds waited.

    Loggers and the progress bar show rank 0. With a `directory`, every rank also writes its own rows to
    `elastic/rank_<i>.csv` there, and the totals of all ranks go to `communication.csv` at the end of training.

    Args:
        every_n_exchanges: Record every so many exchanges.
        directory: Where the files go; None writes none.
    """

    def __init__(self, every_n_exchanges: int = 1, directory: str | Path | None = None) -> None:
        if every_n_exchanges < 1:
            raise ValueError(
                f"ElasticMonitor(every_n_exchanges={every_n_exchanges}): at most every exchange can be "
                f"recorded; give 1 or more."
            )
        self.every_n_exchanges = every_n_exchanges
        self.directory = directory
        self._recorded = 0
        self._rows: list[list[Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts anew, so that a second `fit` does not repeat the rows of the first."""
        self._recorded = 0
        self._rows = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Records the exchanges that this batch has completed."""
        strategy = trainer.strategy
        if not isinstance(strategy, ElasticStrategy):
            return
        seen = strategy.communication
        if seen.exchanges - self._recorded < self.every_n_exchanges:
            return
        self._recorded = seen.exchanges
        values = {
            "elastic/distance": strategy.elastic_distance(),
            "elastic/exchanges": float(seen.exchanges),
            "elastic/bytes_sent": float(seen.bytes_sent),
            "elastic/seconds_waited": seen.seconds_waited,
        }
        self._rows.append([trainer.global_step, *values.values()])
        for name, value in values.items():
            if value is not None:
                pl_module.log(
                    name, value, rank_zero_only=True, prog_bar=name == "elastic/distance", batch_size=1
                )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Writes the rows so far, so that a run that is killed leaves them."""
        self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes this rank's rows, and the totals of all ranks on rank 0."""
        self._write(trainer)
        if self.directory is None:
            return
        strategy = trainer.strategy
        ours = isinstance(strategy, ElasticStrategy)
        counts = strategy.communication if isinstance(strategy, ElasticStrategy) else None
        gradient_bytes = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        totals = _gather(
            trainer,
            [
                trainer.global_step,
                counts.exchanges if counts else 0,
                counts.bytes_sent if counts else 0,
                counts.seconds_waited if counts else 0.0,
                ddp_bytes(gradient_bytes, trainer.global_step, trainer.world_size),
            ],
        )
        if trainer.is_global_zero and ours:
            header = ["rank", "steps", "exchanges", "bytes_sent", "seconds_waited", "ddp_bytes"]
            _write_csv(
                Path(self.directory) / COMMUNICATION_FILE,
                header,
                (
                    [rank, int(steps), int(exchanges), int(sent), waited, int(ddp)]
                    for rank, (steps, exchanges, sent, waited, ddp) in enumerate(totals)
                ),
            )

    def _write(self, trainer: L.Trainer) -> None:
        if self.directory is not None and self._rows:
            header = ["step", "distance", "exchanges", "bytes_sent", "seconds_waited"]
            path = Path(self.directory) / "elastic" / f"rank_{trainer.global_rank}.csv"
            _write_csv(path, header, self._rows)


class WorkerEvaluation(Callback):
    """Scores the center and each worker's own weights on the same data.

    Lightning's validation splits the data over the ranks, each of which would score another worker on another part.
    Here every worker sees the whole set; the center, which is the same everywhere, is scored in equal parts by all
    ranks. With a strategy without a center, the model that training returns (rank 0's) takes its place.

    The data come from the datamodule's `val_dataloader` after each validation, and from its `test_dataloader`
    at the end of training.

    Args:
        directory: Where `accuracy.csv` goes; None writes none and only logs.
        test: Score the test set at the end of training.
        max_batches: Score at most so many batches of a set; None scores all.
        score: Returns the sum of the scores and the number of samples of a batch.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        test: bool = True,
        max_batches: int | None = None,
        score: Score = accuracy,
    ) -> None:
        self.directory = directory
        self.test = test
        self.max_batches = max_batches
        self.score = score
        self.last_scores: dict[str, float] = {}
        self._rows: list[list[Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts anew, so that a second `fit` does not repeat the rows of the first."""
        self._rows = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the validation set."""
        if trainer.training or trainer.validating and trainer.state.fn == "fit":
            self._evaluate(trainer, pl_module, "val")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores the test set."""
        if self.test:
            self._evaluate(trainer, pl_module, "test")

    def _evaluate(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        batches = self._batches(trainer, stage)
        strategy, rank, world = trainer.strategy, trainer.global_rank, trainer.world_size
        with _own_weights(strategy):
            worker = self._total(trainer, module, batches)
        model = worker if rank == 0 else (0.0, 0)
        if isinstance(strategy, ElasticStrategy):
            with strategy.center_weights():
                model = self._total(trainer, module, batches[rank::world])
        gathered = _gather(trainer, [*worker, *model])
        model_sum, model_count = sum(row[2] for row in gathered), sum(row[3] for row in gathered)
        scores = {"center": model_sum / model_count}
        scores |= {f"worker_{i}": row[0] / row[1] for i, row in enumerate(gathered)}
        self.last_scores = scores
        self._record(trainer, stage, scores)

    def _batches(self, trainer: L.Trainer, stage: str) -> list[Any]:
        datamodule: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
        if datamodule is None:
            raise TypeError(
                "WorkerEvaluation(): it scores every worker on the same, unsplit data and takes them from a "
                "datamodule, but the trainer has none; give trainer.fit(..., datamodule=...)."
            )
        if stage == "test":
            datamodule.setup("test")
        loader = datamodule.val_dataloader() if stage == "val" else datamodule.test_dataloader()
        batches: list[Any] = []
        for batch in loader:
            if self.max_batches is not None and len(batches) >= self.max_batches:
                break
            batches.append(batch)
        return batches

    def _total(
        self, trainer: L.Trainer, module: L.LightningModule, batches: Sequence[Any]
    ) -> tuple[float, int]:
        was_training = module.training
        module.eval()
        total, count = 0.0, 0
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for batch in batches:
                    on_device = trainer.strategy.batch_to_device(batch, module.device)
                    value, samples = self.score(module, on_device)
                    total, count = total + float(value), count + samples
        finally:
            module.train(was_training)
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
            _write_csv(
                Path(self.directory) / ACCURACY_FILE, ["stage", "step", "weights", "accuracy"], self._rows
            )


class TimeSplit(Callback):
    """Splits each rank's wall-clock of training into compute, data, communication and evaluation.

    Communication is what the strategy says it has waited; data is the time between two batches that no validation
    takes; compute is the rest. What DDP's all-reduce takes cannot be seen from outside and is part of compute;
    Lightning's broadcast before each batch, which EASGD switches off, is part of data.

    Put it before `WorkerEvaluation`, whose final test would count as compute otherwise.

    Args:
        directory: Where `time.csv` goes; None writes none.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = directory
        self.seconds: list[dict[str, float]] = []
        self._reset()

    def _reset(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._data = self._evaluation = self._waited_evaluating = 0.0
        self._evaluating_since: tuple[float, float] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts the clock."""
        self._reset()
        self._waited_before = _seconds_waited(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Marks where the first batch of an epoch is fetched."""
        self._mark = time.perf_counter()

    def on_train_batch_start(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """The batch is here: what has passed since the mark was spent on it."""
        self._data += time.perf_counter() - self._mark

    def on_train_batch_end(
        self,
        trainer: L.Trainer,  # noqa: ARG002
        pl_module: L.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Marks where the next batch is fetched."""
        self._mark = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Stops counting for training."""
        self._evaluating_since = time.perf_counter(), _seconds_waited(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Counts the validation, less what was waited for an exchange in it."""
        if self._evaluating_since is None:
            return
        since, waited = self._evaluating_since
        self._mark = time.perf_counter()
        self._evaluation += self._mark - since - (_seconds_waited(trainer) - waited)
        self._evaluating_since = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Gathers the split of every rank; rank 0 writes it."""
        total = time.perf_counter() - self._start
        communication = _seconds_waited(trainer) - self._waited_before
        compute = total - self._data - communication - self._evaluation
        names = ["compute", "data", "communication", "evaluation", "total"]
        rows = _gather(trainer, [compute, self._data, communication, self._evaluation, total])
        self.seconds = [dict(zip(names, row, strict=True)) for row in rows]
        if trainer.is_global_zero and self.directory is not None:
            _write_csv(
                Path(self.directory) / TIME_FILE,
                ["rank", *names],
                ([rank, *row] for rank, row in enumerate(rows)),
            )


def ddp_bytes(gradient_bytes: int, steps: int, world_size: int) -> int:
    """Bytes that each rank sends when DDP all-reduces the gradients at every step.

    A ring all-reduce of b bytes over p ranks makes each of them send 2b(p - 1)/p.

    Args:
        gradient_bytes: Size of all gradients.
        steps: Optimizer steps.
        world_size: Number of ranks.
    """
    return 2 * gradient_bytes * steps * (world_size - 1) // world_size


def _own_weights(strategy: object) -> AbstractContextManager[Any]:
    return strategy.worker_weights() if isinstance(strategy, ElasticStrategy) else nullcontext()


def _seconds_waited(trainer: L.Trainer) -> float:
    strategy = trainer.strategy
    return strategy.communication.seconds_waited if isinstance(strategy, ElasticStrategy) else 0.0


def _gather(trainer: L.Trainer, values: Sequence[float]) -> list[list[float]]:
    """Returns the numbers of every rank, in order; all ranks have to call it."""
    # float64 holds counts of bytes exactly up to 2**53.
    row = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    gathered = trainer.strategy.all_gather(row)
    rows: list[list[float]] = gathered.reshape(-1, len(values)).tolist()
    return rows


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
