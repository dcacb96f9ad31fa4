"""What of a Trainer's callbacks does not go with a center: refused, or named in a warning."""

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.trainer.lightning_private import reads_common_clock

__all__ = [
    "check_callbacks",
    "check_sharded_callbacks",
    "warn_of_callbacks",
    "warn_of_layer_sync",
    "warn_without_exchange",
]


def check_callbacks(strategy: str, trainer: Any, synchronous: str) -> None:
    """Refuse callbacks that add parameters to an optimizer in mid-training, where the center is a served one.

    Args:
        strategy: Name of the strategy.
        trainer: Its trainer.
        synchronous: What has no served center: a strategy, and how it is asked for that.

    Raises:
        ValueError: If there is one.
    """
    _refuse(
        strategy,
        trainer,
        "BaseFinetuning",
        "a finetuning callback gives the optimizer parameters while it trains, and a served center has a fixed size."
        f" Use {synchronous}, or give the optimizer all parameters at the start and switch their requires_grad in a"
        " callback of your own.",
    )


def check_sharded_callbacks(strategy: str, trainer: Any) -> None:
    """Refuse a callback that would end the fit where its averaging begins, which may be late.

    Args:
        strategy: Name of the strategy, whose workers are sharded.
        trainer: Its trainer.

    Raises:
        ValueError: If there is one.
    """
    _refuse(
        strategy,
        trainer,
        "StochasticWeightAveraging",
        "its average is a copy of the module of before configure_model, and takes no shards; leave it out, as the"
        " center is an average already, or use EASGDStrategy.",
    )


def warn_of_layer_sync(strategy: str, *, per_worker: int, is_sharded: bool) -> None:
    """Warn of Lightning's synchronization of BatchNorm layers where it is none inside of each worker.

    Args:
        strategy: Name of the strategy.
        per_worker: Ranks of a worker.
        is_sharded: Whether each has its own part of the parameters.
    """
    if is_sharded:
        rank_zero_warn(
            f"{strategy} with Trainer(sync_batchnorm=True): it has no effect, as Lightning converts no layers of a"
            " module that configure_model parallelizes; call torch.nn.SyncBatchNorm.convert_sync_batchnorm in"
            " configure_model, before fully_shard. Such layers are synchronized inside of each worker."
        )
    elif per_worker == 1:
        rank_zero_warn(
            "Trainer(sync_batchnorm=True): SyncBatchNorm communicates in every forward pass, so that the workers"
            " run in lock-step; without it the center's statistics are the workers' mean."
        )


def warn_of_callbacks(strategy: str, trainer: Any, is_served: bool) -> None:
    """Warn of what keeps the workers in step, or makes the center something else than is meant."""
    if any(_is_a("ModelPruning", callback) for callback in trainer.callbacks):
        rank_zero_warn(
            f"{strategy} with ModelPruning: each worker prunes by its own weights, so that the center, their mean, is"
            " not sparse; prune the center after fit."
        )
    for callback in trainer.callbacks if is_served else ():
        if reads_common_clock(callback):
            rank_zero_warn(
                f"{strategy}: {type(callback).__name__} asks all ranks for the time after every batch, so that they"
                " run in step; leave out max_time and train_time_interval."
            )


def warn_without_exchange(strategy: str, tau: int, session: CenterSession) -> None:
    """Warn of a fit that ends before its first exchange."""
    apart = [steps for averager, steps in session.steps_made.items() if steps and not averager.has_exchanged]
    if not apart:
        return
    held = "the mean of their weights" if session.averaging.reaches_all else "what training began with"
    rank_zero_warn(
        f"{strategy}(tau={tau}): this fit ended after {max(apart)} optimizer steps, before the first exchange, so that"
        f" the workers have trained apart; the module holds {held}. Make more than {tau} steps of every optimizer, or"
        " lower tau."
    )


def _refuse(strategy: str, trainer: Any, kind: str, why: str) -> None:
    for callback in trainer.callbacks:
        if _is_a(kind, callback):
            raise ValueError(f"{strategy} with {type(callback).__name__}: {why}")


def _is_a(name: str, callback: Any) -> bool:
    return any(cls.__name__ == name for cls in type(callback).__mro__)
