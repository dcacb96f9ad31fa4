"""The ranks of one worker, as its averaging sees them."""

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
    """

    across: Channel
    inside: Channel

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

    def from_first_worker(self, values: Tensor) -> None:
        """Replace CPU values by those that the rank of this coordinate has in worker 0."""
        self.across.share(values, 0).wait()
