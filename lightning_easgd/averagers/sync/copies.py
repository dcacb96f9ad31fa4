"""What several ranks of one worker hold of a sharded center: one rank's counts for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_easgd.averagers.common_values import differing
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.tensors.shards import copies, place

__all__ = ["Copies"]


@final
class Copies:
    """The parts of a sharded worker's parameters that several of its ranks hold.

    Each rank averages its own flat vector with the ranks of its coordinate. Where a part lies in that vector decides
    with what it shares a scale, who adds it up, and in which order: what one rank makes of it may differ from what
    another does, by what is rounded on the way or in the last bit. So the first of the ranks that hold a part gives it
    to the others.

    All ranks of a worker make it at the same point.

    Args:
        parameters: What is averaged, in the order of the center's views.
        center: The center.
        worker: The worker's ranks.
    """

    def __init__(self, parameters: Sequence[Tensor], center: ReplicatedCenter, worker: WorkerRanks) -> None:
        self._center = center
        self._inside = worker.inside
        self._messages: list[_Message] = []
        ranks = worker.inside.size
        held = [number for number, p in enumerate(parameters) if worker.is_sharded and copies(p, ranks) > 1]
        if held and ranks > 1:
            own = [[center.values.views[number].numel(), *place(parameters[number])] for number in held]
            everyones = differing(own, worker.inside) or [own] * ranks
            self._messages = [each for rank in range(ranks) if (each := self._of_rank(rank, held, everyones)).numel]

    def _of_rank(self, rank: int, held: Sequence[int], everyones: Sequence[Sequence[Sequence[int]]]) -> "_Message":
        parts, start = [], 0
        for number, part, own, *before in zip(
            held, everyones[rank], everyones[self._inside.rank], *everyones[:rank], strict=True
        ):
            if part not in before:
                stop = start + part[0]
                if part == own:
                    parts.append((number, slice(start, stop)))
                start = stop
        return _Message(rank, start, parts)

    @torch.no_grad()
    def join(self) -> None:
        """Let the center, and what else its rule keeps, be the same on all ranks that hold a part of it.

        All ranks of the worker call it at the same point, with no exchange under way.

        Raises:
            ExchangeError: If a rank is lost.
        """
        for store in self._center.stores:
            views = store.views
            for message in self._messages:
                values = torch.zeros(message.numel, dtype=store.flat.dtype)
                for number, at in message.parts:
                    values[at] = views[number].flatten()
                self._inside.share(values, message.rank).wait()
                for number, at in message.parts:
                    views[number].copy_(values[at].view(views[number].shape))


@final
@dataclass(frozen=True)
class _Message:
    """What a rank gives: its number of elements, and for each view of the receiver's that is in it, where."""

    rank: int
    numel: int
    parts: Sequence[tuple[int, slice]]
