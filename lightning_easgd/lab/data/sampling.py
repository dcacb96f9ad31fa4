"""How the workers share a training set."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
        """Return the samples of one batch, already collated; `DataLoader` prefers this method."""
        picked = list(indices)
        return tuple(tensor[picked] for tensor in self.tensors)


def keep_batch(batch: Iterable[Tensor]) -> list[Tensor]:
    """The `collate_fn` of `BatchedTensors`, whose batches need no collating."""
    return list(batch)


def check_sampling(owner: str, sampling: str) -> Sampling:
    """Return `sampling` when it is a known one, and raise otherwise."""
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
    """Build the shuffled loader of one worker.

    With `sampling="sharded"` the loader has an ordinary random sampler, which Lightning replaces by its
    `DistributedSampler` when the strategy is distributed.
    """
    if sampling == "sharded":
        return _loader(dataset, num_workers, batch_size=batch_size, shuffle=True, collate_fn=keep_batch)
    sampler = _worker_sampler(dataset, batch_size, sampling, rank, seed)
    return _loader(dataset, num_workers, batch_size=batch_size, sampler=sampler, collate_fn=keep_batch)


def augmenting_loader(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    sampling: Sampling,
    rank: int,
    shares: Mapping[str, Any],
    seed: int,
    num_workers: int,
    collate_fn: Callable[[Any], Any],
) -> DataLoader[Any]:
    """Build the shuffled loader of one worker for a data set that is indexed by :class:`EpochKeys`."""
    sampler: DistributedSampler[Any]
    if sampling == "sharded":
        # Lightning's own would not say in which epoch a sample is drawn.
        sampler = DistributedSampler(dataset, shuffle=True, **{"seed": seed, **shares})
    else:
        sampler = _worker_sampler(dataset, batch_size, sampling, rank, seed)
    keys = EpochKeys(sampler, len(dataset))  # type: ignore[arg-type]  # a Dataset may have no length; these have
    return _loader(dataset, num_workers, batch_size=batch_size, sampler=keys, collate_fn=collate_fn)


def worker_stream(rank: int, seed: int) -> int:
    """Number of a worker's stream of random words."""
    return seed + _RANK_STRIDE * rank


def _worker_sampler(
    dataset: Dataset[Any], batch_size: int, sampling: Sampling, rank: int, seed: int
) -> DistributedSampler[Any]:
    if sampling == "dynamic":  # chunks of 4 batches
        return DynamicShare(dataset, chunk=4 * batch_size, seed=seed)
    return WorkerSampler(dataset, rank, seed)


def evaluation_loader(
    dataset: Dataset[Any], *, batch_size: int, num_workers: int, collate_fn: Callable[[Any], Any] = keep_batch
) -> DataLoader[Any]:
    """Build the loader of a whole validation or test set, in its own order."""
    return _loader(dataset, num_workers, batch_size=batch_size, collate_fn=collate_fn)


def _loader(dataset: Dataset[Any], num_workers: int, **settings: Any) -> DataLoader[Any]:
    return DataLoader(dataset, num_workers=num_workers, persistent_workers=num_workers > 0, **settings)
