"""Which ranks make up which worker."""

from dataclasses import dataclass
from typing import final

__all__ = ["WorkerLayout"]


@final
@dataclass(frozen=True)
class WorkerLayout:
    """Ranks in workers of k neighbours: worker w is the ranks from w·k on, and rank r has the coordinate r mod k in it.

    Lightning numbers the ranks node by node, so that a worker lies within a node where k divides the node's devices.

    Args:
        ranks: Number of ranks.
        per_worker: k.

    Raises:
        ValueError: If k does not divide the number of ranks.
    """

    ranks: int
    per_worker: int = 1

    def __post_init__(self) -> None:
        if self.per_worker < 1 or self.ranks % self.per_worker:
            raise ValueError(f"{self.ranks} ranks cannot be cut into workers of {self.per_worker}")

    @property
    def workers(self) -> int:
        """p, the number of workers."""
        return self.ranks // self.per_worker

    def worker_of(self, rank: int) -> int:
        """The worker that a rank belongs to."""
        return rank // self.per_worker

    def coordinate_of(self, rank: int) -> int:
        """The place of a rank in its worker."""
        return rank % self.per_worker

    @property
    def inside(self) -> list[list[int]]:
        """The ranks of each worker."""
        return [list(range(first, first + self.per_worker)) for first in range(0, self.ranks, self.per_worker)]

    @property
    def across(self) -> list[list[int]]:
        """For each coordinate the ranks that have it, one of each worker: those that exchange with each other."""
        return [list(range(first, self.ranks, self.per_worker)) for first in range(self.per_worker)]
