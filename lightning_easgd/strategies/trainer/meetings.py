"""When the ranks of a Trainer wait for each other: where Lightning or one of its callbacks communicates."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, final

from lightning_easgd.averagers import Averaging, Meeting
from lightning_easgd.strategies.trainer.lightning_private import (
    communicates_at_epoch_end,
    evaluation_of,
    knows_batches,
    place_in_evaluation,
    reads_common_clock,
    saves_after_batch,
    saves_in_epoch,
    training_data,
    watch_evaluation,
)
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = ["Meetings", "check_even_evaluation"]

_AT_BARRIERS = {"train_dataloader()": Meeting.EPOCH_END, "val_dataloader()": Meeting.VALIDATION}


class _Ranks(Protocol):
    @property
    def layout(self) -> WorkerLayout: ...
    @property
    def ranks_inside(self) -> Sequence[int]: ...
    def gather(self, obj: Any) -> list[Any]: ...
    def gather_inside(self, obj: Any) -> list[Any]: ...


@final
class Meetings:
    """Says at which points of a fit ranks that run freely must meet, so that nobody waits for one that never comes.

    All ranks make it when training starts.

    Args:
        trainer: The Trainer.
        ranks: The strategy.

    Raises:
        ValueError: If ranks of one worker are known to have different numbers of batches.
    """

    def __init__(self, trainer: Any, ranks: _Ranks) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._look()

    def _look(self) -> None:
        self._fetcher = training_data(self._trainer)
        own = self._trainer.num_training_batches, knows_batches(self._trainer.fit_loop)
        batches, known = zip(*self._ranks.gather(own), strict=True)
        if len(batches) > 1:
            _check_even_inside(type(self._ranks).__name__, batches, self._ranks.layout)
        self._even_batches = len(set(batches)) == 1 and all(known)
        inside = self._ranks.ranks_inside
        self._counts_batches = len(inside) > 1 and not all(known[rank] for rank in inside)
        self._batches = 0
        callbacks = self._trainer.callbacks
        self._step_savers = tuple(filter(saves_in_epoch, callbacks))
        # Whether a callback asks for a common clock, and ranks may have different numbers of batches.
        self._has_common_clock = not self._even_batches and any(map(reads_common_clock, callbacks))

    def begin_epoch(self) -> None:
        """Look again whether ranks have equally many batches, where their data loaders are new.

        Raises:
            ValueError: If ranks of one worker are known to have different numbers.
        """
        if training_data(self._trainer) is not self._fetcher:
            self._look()

    def before_batch(self) -> None:
        """Raise if another rank of this worker has come to the end of its data, of which nobody knew how much it is.

        Raises:
            ValueError: On all ranks of the worker: their steps would wait for each other.
        """
        self._agree(True)
        self._batches += 1

    def after_batches(self) -> None:
        """Raise if another rank of this worker has a batch more.

        Raises:
            ValueError: As for :meth:`before_batch`.
        """
        self._agree(False)
        self._batches = 0

    def _agree(self, has_batch: bool) -> None:
        if not self._counts_batches:
            return
        inside = self._ranks.ranks_inside
        answers = dict(zip(inside, self._ranks.gather_inside(has_batch), strict=True))
        if len(set(answers.values())) > 1:
            ended = [rank for rank, has_one in answers.items() if not has_one]
            raise ValueError(
                f"{type(self._ranks).__name__}: the data of ranks {ended} have ended after {self._batches} batches of"
                f" the epoch, and ranks {sorted(set(inside) - set(ended))}, of the same worker, have more; ranks of one"
                " worker make their steps together: give them equally many (Trainer(limit_train_batches="
                f"{self._batches}), or a data set that ends at the same number on all)."
            )

    @staticmethod
    def at_barrier(name: str | None) -> Meeting | None:
        """The meeting before a barrier of Lightning's: where ranks make their data loaders anew, before any hook."""
        return None if name is None else _AT_BARRIERS.get(name)

    def after_batch(self) -> bool:
        """Whether to meet before a callback communicates in mid-epoch: where one never comes, all end with an error.

        Ranks with equally many batches read a common clock without it.
        """
        saves = any(saves_after_batch(callback, self._trainer.global_step) for callback in self._step_savers)
        return saves or self._has_common_clock

    def at_epoch_end(self, averaging: Averaging) -> bool:
        """Whether ranks that end an epoch at different times must meet before Lightning communicates, or may hang."""
        communicates = communicates_at_epoch_end(self._trainer)
        if averaging.waits_for_all:
            return communicates or not self._even_batches
        # Only to tell a rank that waits for all inside its epoch that this one is at the end.
        return communicates and (self._has_common_clock or bool(self._step_savers))


def check_even_evaluation(trainer: Any, ranks: _Ranks, limit: str, batches: Sequence[float]) -> None:
    """Raise where a rank would wait in a forward pass for one that has no batch any more, now or when it comes to that.

    Args:
        trainer: The trainer, whose evaluation begins.
        ranks: The strategy.
        limit: The Trainer's argument that limits these batches.
        batches: This rank's, of each data loader.

    Raises:
        ValueError: If the numbers differ.
    """
    loop, inside = evaluation_of(trainer), ranks.ranks_inside
    everyones, known = zip(*ranks.gather_inside((batches, knows_batches(loop))), strict=True)
    for numbers in zip(*everyones, strict=True):
        for rank, number in zip(inside, numbers, strict=True):
            if number != numbers[0]:
                raise ValueError(
                    f"{type(ranks).__name__}: a data loader has {numbers[0]} batches on rank {inside[0]} and {number}"
                    f" on rank {rank}, and these are ranks of one worker, whose forward passes wait for each other;"
                    f" give them equally many (Trainer({limit}={min(numbers)}), or with use_distributed_sampler=False a"
                    " DistributedSampler(dataset, **trainer.distributed_sampler_kwargs), which repeats samples)."
                )
    if len(inside) > 1 and not all(known):
        _EvaluationInStep(loop, ranks, limit)


@final
class _EvaluationInStep:
    """Sees that the ranks of a worker, whose data are of unknown length, have each batch of an evaluation together.

    Args:
        loop: That of the evaluation, which has begun.
        ranks: The strategy.
        limit: The Trainer's argument that limits these batches.
    """

    def __init__(self, loop: Any, ranks: _Ranks, limit: str) -> None:
        self._loop, self._ranks, self._limit = loop, ranks, limit
        self._loader = self._before = 0  # which one it is in, and what had been fetched before that one
        loader, _, ended = place_in_evaluation(loop)
        self._agree(loader, 0, ended)
        watch_evaluation(loop, self._fetched)

    def _fetched(self) -> None:
        self._agree(*place_in_evaluation(self._loop))

    def _agree(self, loader: int, fetched: int, ended: bool) -> None:
        inside = self._ranks.ranks_inside
        places = dict(zip(inside, self._ranks.gather_inside((loader, ended)), strict=True))
        last = min(places.values())
        ahead = [rank for rank, place in places.items() if place != last]
        if ahead:
            number = fetched - self._before
            raise ValueError(
                f"{type(self._ranks).__name__}: the data of ranks {ahead} have ended after {number} batches of a data"
                f" loader, and ranks {sorted(set(inside) - set(ahead))}, of the same worker, have more; the forward"
                f" passes of a worker's ranks wait for each other: give them equally many (Trainer({self._limit}="
                f"{number}), or a data set that ends at the same number on all)."
            )
        if loader != self._loader:
            self._loader, self._before = loader, fetched


def _check_even_inside(strategy: str, batches: Sequence[float], layout: WorkerLayout) -> None:
    """Raise where ranks that make their steps together would wait for one that has no batch any more."""
    for first, *others in layout.inside:
        for rank in others:
            if batches[rank] != batches[first] and math.isfinite(batches[rank]) and math.isfinite(batches[first]):
                raise ValueError(
                    f"{strategy}: an epoch has {batches[first]} batches on rank {first} and {batches[rank]} on rank"
                    f" {rank}, and these are ranks of one worker, which make their steps together; give them equally"
                    f" many (limit_train_batches={min(batches[first], batches[rank])}, or leave the sampler to"
                    " Lightning)."
                )
