"""The elastic distances and the communication of a run."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lightning_easgd.callbacks.recording import (
    ElasticStrategy,
    ddp_bytes,
    gather,
    layout_of,
    number_of,
    reached,
    write_csv,
)

__all__ = ["COMMUNICATION_FILE", "ELASTIC_DIRECTORY", "ElasticMonitor"]

COMMUNICATION_FILE = "communication.csv"
ELASTIC_DIRECTORY = "elastic"


class ElasticMonitor(Callback):
    """Logs the elastic distance ‖x_i - x̃‖ of this worker, exchanges, bytes sent, seconds waited and staleness.

    Staleness is the mean number of other workers' exchanges between two of this worker's; synchronous exchanges have
    none. Where workers come and go, also how many took part in the last exchange, for how many exchanges the others
    were not there in time, and how many came to nothing.

    Loggers and the progress bar show rank 0. With a `directory`, every rank also writes its own rows to
    `elastic/rank_<i>.csv` there (where workers come and go `rank_<worker>.csv`, of several ranks
    `rank_<worker>.<rank>.csv`), and the totals of all ranks go to `communication.csv` at the end of training,
    with the worker of each.

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
        self._step: int | None = None  # so far; at first that of others to whom a worker comes
        self._steps: Counter[int] = Counter()  # of this worker, by the number of ranks that there were in all workers
        self._recorded = 0
        self._rows: list[list[Any]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Makes all ranks write where rank 0 does: ranks that torchrun started may have other names for a run."""
        self.directory = trainer.strategy.broadcast(self.directory)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Starts a new file, so that a second `fit` does not repeat the rows of the first."""
        self._step = None
        self._steps.clear()
        self._recorded = 0
        self._rows = []
        if self.directory is not None and isinstance(trainer.strategy, ElasticStrategy):
            header = ["step", "distance", "exchanges", "bytes_sent", "seconds_waited", "staleness"]
            write_csv(self._path(trainer), [*header, *_of_membership(trainer.strategy)], [])

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Notes where this worker's own steps begin: not at 0 in a run that resumes another."""
        if self._step is None:
            self._step = trainer.global_step

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
        if self._step is None:  # Lightning leaves out the start of a batch that is None
            self._step = trainer.global_step
        workers = _of_membership(strategy).get("participants", 1)  # where they come and go; else there is one launch
        self._steps[workers * trainer.world_size] += trainer.global_step - self._step
        self._step = trainer.global_step
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
            **{f"elastic/{name}": value for name, value in _of_membership(strategy).items()},
        }
        self._rows.append([trainer.global_step, *values.values()])
        for name, value in values.items():
            if value is not None:
                shown = name in ("elastic/distance", "elastic/participants")
                pl_module.log(name, float(value), rank_zero_only=True, prog_bar=shown, batch_size=1)

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
        ddp = sum(ddp_bytes(gradient_bytes, steps, ranks) for ranks, steps in self._steps.items())
        totals = gather(trainer, [self._steps.total(), counts.exchanges, counts.bytes_sent, ddp, counts.seconds_waited])
        if trainer.is_global_zero:
            layout = layout_of(trainer)
            write_csv(
                Path(self.directory) / COMMUNICATION_FILE,
                ["rank", "worker", "steps", "exchanges", "bytes_sent", "ddp_bytes", "seconds_waited"],
                (
                    [rank, number_of(trainer, layout.worker_of(rank)), *map(int, totals[rank][:-1]), totals[rank][-1]]
                    for rank in reached(trainer)
                ),
            )

    def _path(self, trainer: L.Trainer) -> Path:
        assert self.directory is not None
        number = getattr(trainer.strategy, "replica_id", None)
        rank: object = trainer.global_rank
        if number is not None:  # launches of their own, which have a rank 0 each
            rank = number if trainer.world_size == 1 else f"{number}.{rank}"
        return Path(self.directory) / ELASTIC_DIRECTORY / f"rank_{rank}.csv"

    def _write(self, trainer: L.Trainer) -> None:
        if self.directory is None or not self._rows:
            return
        with self._path(trainer).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(self._rows)
        self._rows = []


def _of_membership(strategy: object) -> dict[str, int]:
    elastic = getattr(strategy, "elastic", None)
    members = None if elastic is None else elastic.membership
    if members is None:
        return {}
    return {"participants": len(members.living), "missed": members.missed, "failed": members.failed}
