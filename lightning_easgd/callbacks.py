"""Callbacks that watch a run through the strategy's public interface and write what they see to CSV files.

None of them runs a collective, or waits for an exchange in flight, while batches are trained. They gather
what the ranks have seen where all ranks meet anyway: at the end of a validation and at the end of training.
With strategies that have no center (DDP, one device, independent workers) they record what makes sense there.
"""

import csv
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeAlias, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

Score: TypeAlias = Callable[[L.LightningModule, Any], tuple[Tensor, int]]

ACCURACY_FILE = "accuracy.csv"
COMMUNICATION_FILE = "communication.csv"
ELASTIC_DIRECTORY = "elastic"
TIME_FILE = "time.csv"


class Communication(Protocol):
    """What a strategy has communicated so far, on this rank."""

    exchanges: int
    bytes_sent: int
    seconds_waited: float
    staleness: int


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
    """Logs the elastic distance ‖x_i - x̃‖ of this worker, exchanges, bytes sent, seconds waited and staleness.

    Staleness is the mean number of other workers' exchanges between two of this worker's; synchronous exchanges have
    none.

    Loggers and the progress bar show rank 0. With a `directory`, every rank also writes its own rows to
    `elastic/rank_<i>.csv` there, and the totals of all ranks go to `communication.csv` at the end of
    training.

    A record reads the distance from the device, which makes the host wait for all work in the device's queue. The
    counts are running totals: a record now and then loses none of them.

    Args:
        every_n_exchanges: Record every so many exchanges.
        directory: Where the files go; None writes none.
    """

    def __init__(self, every_n_exchanges: int = 10, directory: str | Path | None = None) -> None:
        if every_n_exchanges < 1:
            raise ValueError(
                f"ElasticMonitor(every_n_exchanges={every_n_exchanges}): at most every exchange can be "
                f"recorded; give 1 or more."
            )
        self.every_n_exchanges = every_n_exchanges
        self.directory = directory
        self._first_step = 0
        self._recorded = 0
        self._rows: list[list[Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Makes all ranks write where rank 0 does: ranks that torchrun started may have other names for a run."""
        self.directory = trainer.strategy.broadcast(self.directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts a new file, so that a second `fit` does not repeat the rows of the first."""
        self._first_step = trainer.global_step  # not 0 in a run that resumes another
        self._recorded = 0
        self._rows = []
        if self.directory is not None and isinstance(trainer.strategy, ElasticStrategy):
            header = ["step", "distance", "exchanges", "bytes_sent", "seconds_waited", "staleness"]
            write_csv(self._path(trainer), header, [])

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
            "elastic/exchanges": seen.exchanges,
            "elastic/bytes_sent": seen.bytes_sent,
            "elastic/seconds_waited": seen.seconds_waited,
            "elastic/staleness": seen.staleness / seen.exchanges,
        }
        self._rows.append([trainer.global_step, *values.values()])
        for name, value in values.items():
            if value is not None:
                pl_module.log(
                    name, float(value), rank_zero_only=True, prog_bar=name == "elastic/distance", batch_size=1
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
        if not isinstance(strategy, ElasticStrategy):
            return
        counts = strategy.communication
        gradient_bytes = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        steps = trainer.global_step - self._first_step
        ddp = ddp_bytes(gradient_bytes, steps, trainer.world_size)
        totals = gather(trainer, [steps, counts.exchanges, counts.bytes_sent, ddp, counts.seconds_waited])
        if trainer.is_global_zero:
            write_csv(
                Path(self.directory) / COMMUNICATION_FILE,
                ["rank", "steps", "exchanges", "bytes_sent", "ddp_bytes", "seconds_waited"],
                ([rank, *map(int, row[:-1]), row[-1]] for rank, row in enumerate(totals)),
            )

    def _path(self, trainer: L.Trainer) -> Path:
        assert self.directory is not None
        return Path(self.directory) / ELASTIC_DIRECTORY / f"rank_{trainer.global_rank}.csv"

    def _write(self, trainer: L.Trainer) -> None:
        if self.directory is None or not self._rows:
            return
        with self._path(trainer).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(self._rows)
        self._rows = []


class WorkerEvaluation(Callback):
    """Scores the center and each worker's own weights on the same data.

    Lightning's validation splits the data over the ranks, each of which would score another worker on another
    part. Here every worker sees the whole set; the center, which is the same everywhere, is scored in equal
    parts by all ranks. With a strategy without a center, the model that training returns (rank 0's) takes its
    place.

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
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
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
        gathered = gather(trainer, [*worker, *model])
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

    def _total(self, trainer: L.Trainer, module: L.LightningModule, batches: Sequence[Any]) -> tuple[float, int]:
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
            write_csv(Path(self.directory) / ACCURACY_FILE, ["stage", "step", "weights", "accuracy"], self._rows)


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
        self.seconds = [dict(zip(names, row, strict=True)) for row in rows]
        if trainer.is_global_zero and self.directory is not None:
            write_csv(
                Path(self.directory) / TIME_FILE,
                ["rank", *names],
                ([rank, *row] for rank, row in enumerate(rows)),
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


def gather(trainer: L.Trainer, values: Sequence[float]) -> list[list[float]]:
    """Returns the numbers of every rank, in order; all ranks have to call it.

    Args:
        trainer: The trainer.
        values: As many on every rank; they travel as float64.
    """
    # float64 holds counts of bytes exactly up to 2**53.
    rows = torch.zeros(trainer.world_size, len(values), dtype=torch.float64, device=trainer.strategy.root_device)
    rows[trainer.global_rank] = torch.tensor(values, dtype=torch.float64)
    reduced: list[list[float]] = trainer.strategy.reduce(rows, reduce_op="sum").tolist()
    return reduced


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file with a header, and the folders above it.

    Args:
        path: The file.
        header: Names of the columns.
        rows: The values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
