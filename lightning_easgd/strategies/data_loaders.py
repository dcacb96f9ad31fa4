"""Which data loaders the ranks of a worker can draw from."""

from typing import Any

from lightning_easgd.sampling import DynamicShare

__all__ = ["check_loader"]


def check_loader(strategy: str, loader: Any, ranks: int) -> None:
    """Refuse a loader that would give the ranks of a worker different numbers of batches.

    Args:
        strategy: Name of the strategy, for errors.
        loader: What is to be drawn from.
        ranks: Ranks of one worker.

    Raises:
        TypeError: If the worker has several ranks and the loader's samples come from :class:`DynamicShare`.
    """
    samplers = getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    if ranks > 1 and any(isinstance(sampler, DynamicShare) for sampler in samplers):
        raise TypeError(
            f"{strategy} with DynamicShare: it gives each rank as many samples as that rank asks for, and here a worker"
            f" is {ranks} ranks, which make their steps together; leave the sampler to Lightning, or make each rank a"
            " worker."
        )
