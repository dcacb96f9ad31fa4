"""What the callbacks share: the part of a strategy that they read, and how they gather and write what they saw."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import RunningStage

from lightning_easgd.strategies.trainer.lightning_private import before_transfer
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = [
    "Communication",
    "ElasticStrategy",
    "ddp_bytes",
    "evaluating",
    "gather",
    "layout_of",
    "number_of",
    "own_part",
    "own_weights",
    "prepared",
    "ranks_that_draw_alike",
    "reached",
    "write_csv",
]


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


def ddp_bytes(gradient_bytes: int, steps: int, world_size: int) -> int:
    """Bytes that each rank sends when DDP all-reduces the gradients at every step.

    A ring all-reduce of b bytes over p ranks makes each of them send 2b(p - 1)/p.

    Args:
        gradient_bytes: Size of all gradients.
        steps: Optimizer steps.
        world_size: Number of ranks.
    """
    return 2 * gradient_bytes * steps * (world_size - 1) // world_size


def own_weights(strategy: object) -> AbstractContextManager[Any]:
    """Context in which the module holds this rank's own weights."""
    return strategy.worker_weights() if isinstance(strategy, ElasticStrategy) else nullcontext()


@contextmanager
def evaluating(module: L.LightningModule) -> Iterator[None]:
    """Context in which a module is in evaluation mode; afterwards each part is in its own, a frozen backbone in eval.

    Args:
        module: The module.
    """
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in training:
            if part.training != mode:
                part.train(mode)  # a method of its own may have done more, as merged what was adapted


def layout_of(trainer: L.Trainer) -> WorkerLayout:
    """Returns which ranks make up which worker; with a strategy that has no such workers each rank is one.

    Args:
        trainer: The trainer.
    """
    return getattr(trainer.strategy, "layout", None) or WorkerLayout(trainer.world_size)


def number_of(trainer: L.Trainer, worker: int) -> int:
    """Returns a worker's number in the job: where workers come and go each launch is one, and has been given its own.

    Args:
        trainer: The trainer.
        worker: The worker's place among those of this launch.
    """
    given: int | None = getattr(trainer.strategy, "replica_id", None)
    return worker if given is None else given


def ranks_that_draw_alike(trainer: L.Trainer) -> int:
    """Returns how many ranks draw the same data: those of tensor parallelism, each of which has a part of the layers.

    Args:
        trainer: The trainer; the strategies give its module the mesh that says so.
    """
    mesh = getattr(getattr(trainer, "lightning_module", None), "device_mesh", None)
    return 1 if mesh is None else int(mesh.size(mesh.mesh_dim_names.index("tensor_parallel")))


def reached(trainer: L.Trainer) -> Sequence[int]:
    """Returns the ranks that :func:`gather` hears of: after the loss of an asynchronous worker each of itself alone.

    Args:
        trainer: The trainer; the strategy has taken the process group away then.
    """
    alone = trainer.world_size > 1 and not dist.is_initialized()
    return [trainer.global_rank] if alone else range(trainer.world_size)


def own_part(trainer: L.Trainer) -> slice:
    """Returns which of the batches that all workers score together are this one's.

    The ranks of one worker score the same: they may have to compute together.

    Args:
        trainer: The trainer; asked when all ranks have met.
    """
    layout, rank = layout_of(trainer), trainer.global_rank
    if len(reached(trainer)) < trainer.world_size:
        return slice(None)
    return slice(layout.worker_of(rank), None, layout.workers)


def gather(trainer: L.Trainer, values: Sequence[float]) -> list[list[float]]:
    """Returns the numbers of every rank, in order, zeros for those not :func:`reached`; all ranks have to call it.

    Args:
        trainer: The trainer.
        values: As many on every rank; they travel as float64.
    """
    # float64 holds counts of bytes exactly up to 2**53.
    rows = torch.zeros(trainer.world_size, len(values), dtype=torch.float64, device=trainer.strategy.root_device)
    rows[trainer.global_rank] = torch.tensor(values, dtype=torch.float64)
    reduced: list[list[float]] = trainer.strategy.reduce(rows, reduce_op="sum").tolist()
    return reduced


def prepared(trainer: L.Trainer, batch: Any) -> Any:
    """Returns a batch of a loader's as a validation would give it to a step: converted, and through the same hooks.

    Args:
        trainer: The trainer; what its hooks ask it is answered as in a validation, so that they augment nothing.
        batch: The batch.
    """
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        batch = before_transfer(trainer, trainer.precision_plugin.convert_input(batch))
        return trainer.strategy.batch_to_device(batch, trainer.lightning_module.device)
    finally:
        trainer.state.stage = stage


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
