"""What a worker does when another one has died."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

from typing_extensions import override

from lightning_easgd.served_center import WorkerLostError

__all__ = ["ContinueOnLoss", "FailOnLoss", "LossPolicy"]

_log = logging.getLogger(__name__)


class LossPolicy(ABC):
    """What a worker does when another one has died."""

    @abstractmethod
    def notice(self, dead: frozenset[int], workers: int, reasons: Mapping[int, str]) -> None:
        """Take notice of the dead before each step and meeting; raise to end the run.

        Args:
            dead: The workers that are lost.
            workers: How many there were.
            reasons: Why, of those of which it is known.
        """


@final
class FailOnLoss(LossPolicy):
    """End the run with an error that names the dead.

    Args:
        strategy: The strategy's name, for errors.
    """

    def __init__(self, strategy: str = "EASGDStrategy") -> None:
        self.strategy = strategy

    @override
    def notice(self, dead: frozenset[int], workers: int, reasons: Mapping[int, str]) -> None:
        why = "; ".join(f"rank {rank}: {reasons[rank]}" for rank in sorted(dead & reasons.keys()))
        raise WorkerLostError(
            f"{self.strategy}(on_worker_loss='fail'): workers {sorted(dead)} of {workers} have died or raised an error"
            f"{f' ({why})' if why else ''}; look for the first error among the ranks. on_worker_loss='continue' lets"
            " the others go on.",
            dead,
        )


@final
class ContinueOnLoss(LossPolicy):
    """Go on with those that live; say so once for each that dies.

    Args:
        strategy: The strategy's name, for the warning.
    """

    def __init__(self, strategy: str = "EASGDStrategy") -> None:
        self.strategy = strategy
        self._known: frozenset[int] = frozenset()

    @override
    def notice(self, dead: frozenset[int], workers: int, reasons: Mapping[int, str]) -> None:
        if dead != self._known:
            self._known = dead
            _log.warning(
                "%s(on_worker_loss='continue'): workers %s of %d have died%s; %d go on, and what is divided by the"
                " number of workers is divided by that from now on. From the next meeting on each rank evaluates its"
                " own part of the data.",
                self.strategy,
                sorted(dead),
                workers,
                "".join(f" (rank {rank}: {reasons[rank]})" for rank in sorted(dead & reasons.keys())),
                workers - len(dead),
            )
