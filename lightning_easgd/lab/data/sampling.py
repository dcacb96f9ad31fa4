"""How the workers share a training set."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from lightning_easgd.lab.data.randomness import EpochKeys
from lightning_easgd.sampling import DynamicShare

Sampling: TypeAlias = Literal["full", "sharded", "dynamic"]

# Ranks and seeds are small integers: a large odd factor keeps (seed 0, rank 1) and (seed 1, rank 0) apart.
_RANK_STRIDE = 1_000_003


class WorkerSampler(DistributedSampler[Any]):
    """Draws a worker's own shuffle of the whole data set, as in the EASGD paper.

    It is a `DistributedSampler` of a world of one: Lightning neither replaces it nor forgets `set_epoch`,
    which gives every epoch another order.

    Args:
        dataset: The data set to draw from.
        rank: The worker's global rank; workers of different rank draw different orders.
        seed: The run's seed.
    """

    def __init__(self, dataset: Dataset[Any], rank: int, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=True, seed=worker_stream(rank, seed))


class BatchedTensors(TensorDataset):
    """A `TensorDataset` that is indexed once per batch, not once per sample."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Returns the samples of one batch, already collated; `DataLoader` prefers this method."""
        picked = list(indices)
        return tuple(tensor[picked] for tensor in self.tensors)


def keep_batch(batch: Iterable[Tensor]) -> list[Tensor]:
    """The `collate_fn` of `BatchedTensors`, whose batches need no collating."""
    return list(batch)


def check_sampling(owner: str, sampling: str) -> Sampling:
    """Returns `sampling` when it is a known one, and raises otherwise.

    Args:
        owner: Name of the class that was given the argument, for the message.
        sampling: The value to check.
    """
    for known in get_args(Sampling):
        if sampling == known:
            return known  # type: ignore[no-any-return]  # get_args is untyped
    raise ValueError(
        f"{owner}(sampling={sampling!r}): unknown sampling; choose 'full' (every worker draws from the whole "
        f"training set), 'sharded' (each worker has its own part) or 'dynamic' (workers draw from a common pool)."
    )


def training_loader(
    dataset: BatchedTensors, *, batch_size: int, sampling: Sampling, rank: int, seed: int, num_workers: int
) -> DataLoader[Any]:
    """Builds the shuffled loader of one worker.

    With `sampling="sharded"` the loader has an ordinary random sampler, which Lightning replaces by its
    `DistributedSampler` when the strategy is distributed.

    Args:
        dataset: The training set.
        batch_size: Samples in a batch of one worker.
        sampling: "full", "sharded" or "dynamic"; the last deals out chunks of 4 batches.
        rank: The worker's global rank.
        seed: The run's seed.
        num_workers: Processes that load data.
    """
    sampler: DistributedSampler[Any] | None = None
    if sampling != "sharded":
        sampler = _worker_sampler(dataset, batch_size, sampling, rank, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        shuffle=sampler is None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=keep_batch,
    )


def augmenting_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    sampling: Sampling,
    rank: int,
    world_size: int,
    seed: int,
    num_workers: int,
    collate_fn: Callable[[Any], Any],
) -> DataLoader[Any]:
    """Builds the shuffled loader of one worker for a data set that is indexed by :class:`EpochKeys`.

    Args:
        dataset: The training set; its samples depend on the epoch.
        batch_size: Samples in a batch of one worker.
        sampling: "full", "sharded" or "dynamic"; the last deals out chunks of 4 batches.
        rank: The worker's global rank.
        world_size: Number of workers.
        seed: The run's seed.
        num_workers: Processes that load data.
        collate_fn: Makes a batch of samples.
    """
    sampler: DistributedSampler[Any]
    if sampling == "sharded":
        # Lightning's own would not say in which epoch a sample is drawn.
        sampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
    else:
        sampler = _worker_sampler(dataset, batch_size, sampling, rank, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochKeys(sampler, len(dataset)),  # type: ignore[arg-type]  # a Dataset may have no length; these have
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate_fn,
    )


def worker_stream(rank: int, seed: int) -> int:
    """Number of a worker's stream of random words.

    Args:
        rank: The worker's global rank.
        seed: The run's seed.
    """
    return seed + _RANK_STRIDE * rank


def _worker_sampler(
    dataset: Dataset[Any], batch_size: int, sampling: Sampling, rank: int, seed: int
) -> DistributedSampler[Any]:
    if sampling == "dynamic":
        return DynamicShare(dataset, chunk=4 * batch_size, seed=seed)
    return WorkerSampler(dataset, rank, seed)


def evaluation_loader(
    dataset: Dataset[Any], *, batch_size: int, num_workers: int, collate_fn: Callable[[Any], Any] = keep_batch
) -> DataLoader[Any]:
    """Builds the loader of a whole validation or test set, in its own order.

    Args:
        dataset: The data to evaluate on.
        batch_size: Samples in a batch.
        num_workers: Processes that load data.
        collate_fn: Makes a batch of samples.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=collate_fn,
    )
