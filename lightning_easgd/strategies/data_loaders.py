"""Which data loaders the ranks of a worker can draw from."""

from typing import Any

from lightning_easgd.sampling import DynamicShare

__all__ = ["check_loader"]


def check_loader(strategy: str, loader: Any, ranks: int, *, is_elastic: bool = False) -> None:
    """Refuse a loader that would give the ranks of a worker different numbers of batches, or all workers the same ones.

    Args:
        strategy: Name of the strategy, for errors.
        loader: What is to be drawn from.
        ranks: Ranks of one worker.
        is_elastic: Whether workers come and go.

    Raises:
        TypeError: If the loader's samples come from :class:`DynamicShare`, and the worker has several ranks or comes
            and goes.
    """
    if not _is_shared(getattr(loader, "sampler", None)) and not _is_shared(getattr(loader, "batch_sampler", None)):
        return
    if ranks > 1:
        raise TypeError(
            f"{strategy} with DynamicShare: it gives each rank as many samples as that rank asks for, and here a worker"
            f" is {ranks} ranks, which make their steps together; leave the sampler to Lightning, or make each rank a"
            " worker."
        )
    if is_elastic:
        raise TypeError(
            f"{strategy}(fault_tolerance=...) with DynamicShare: it shares data out between the ranks of one launch,"
            " and here each worker is a launch of its own, which would draw all of them in one order; leave the sampler"
            " to Lightning, with FaultTolerance(group_size=...) for shares."
        )


def _is_shared(sampler: Any) -> bool:
    """Whether a sampler, or one that it draws from, is a :class:`DynamicShare`."""
    while sampler is not None and not isinstance(sampler, DynamicShare):
        sampler = getattr(sampler, "sampler", None)
    return sampler is not None
