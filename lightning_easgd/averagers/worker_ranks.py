"""The ranks of one worker, as its averaging sees them."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_easgd.transport.channel import Channel, LoneChannel

__all__ = ["WorkerRanks"]


@final
@dataclass(frozen=True)
class WorkerRanks:
    """A worker of one rank or several, each of which averages with the ranks of its coordinate in other workers.

    Attributes:
        across: A channel of the ranks of this coordinate, one of each worker; it reduces CPU tensors.
        inside: A channel of this worker's ranks, likewise.
        is_sharded: Whether each of them has its own part of the parameters; else all have all of them.
        judges_together: Whether a worker with a part that is not finite is one on all of its ranks before they tell.
    """

    across: Channel
    inside: Channel
    is_sharded: bool = False
    judges_together: bool = False

    @classmethod
    def one(cls, channel: Channel) -> "WorkerRanks":
        """A worker of one rank.

        Args:
            channel: The workers' common one; it reduces CPU tensors.
        """
        return cls(channel, LoneChannel())

    @property
    def workers(self) -> int:
        """p, the number of workers."""
        return self.across.size

    def total(self, number: int) -> int:
        """The sum of an integer over this worker's ranks; all of them call it at the same point."""
        total = torch.tensor([number])
        self.inside.sum(total).wait()
        return int(total)

    def is_finite(self, finite: bool) -> bool:
        """Whether the worker is finite, as far as that is to be known of the other ranks' parts.

        Args:
            finite: Whether this rank's part is.
        """
        return self.total(int(not finite)) == 0 if self.judges_together else finite

    def norm(self, norm: float) -> float:
        """The norm of a vector of the worker's, given that of this rank's part; all of them call it together."""
        if not self.is_sharded:
            return norm
        square = torch.tensor([norm**2], dtype=torch.float64)
        self.inside.sum(square).wait()
        return math.sqrt(float(square))

    def from_first_worker(self, values: Tensor) -> None:
        """Replace CPU values by those that the rank of this coordinate has in worker 0."""
        self.across.share(values, 0).wait()
