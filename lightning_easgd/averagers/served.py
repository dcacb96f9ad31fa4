"""Averaging with a served center: what asynchronous EASGD and the DOWNPOUR family share."""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.base import Averager
from lightning_easgd.averagers.line import Statistics
from lightning_easgd.averagers.staging import Staging, make_staging
from lightning_easgd.averagers.turns import FreeOrder, Turns
from lightning_easgd.center import FlatTensors
from lightning_easgd.service import CenterService

__all__ = ["CenterPart", "ServedAverager"]


@final
class CenterPart:
    """The part of a served center that belongs to one optimizer: a contiguous run of its segments.

    Args:
        service: The center of all optimizers.
        segments: Numbers of this optimizer's segments, one for each parameter group.
    """

    def __init__(self, service: CenterService, segments: range) -> None:
        self._service = service
        self._chunks = [chunk for chunk in service.order if service.layout.segments[chunk] in segments]
        self._segments = segments
        self._start = min(service.chunks[chunk].start for chunk in self._chunks)
        self._next_versions: dict[int, int] = {}

    def exchange(self, messages: Tensor, rates: Sequence[float]) -> int:
        """Exchange every chunk; the messages are replaced by the answers.

        Args:
            messages: Flat vector of this part, on the CPU.
            rates: The rate of each of the segments.

        Returns:
            The staleness: how many exchanges of other workers a chunk has taken since this worker's last one, of
            the chunk that has taken most.
        """
        begun = {
            chunk: self._service.begin(
                chunk, self._slice(messages, chunk), rates[self._service.layout.segments[chunk] - self._segments.start]
            )
            for chunk in self._chunks
        }
        staleness = 0
        for chunk, pending in begun.items():
            version = pending.wait()
            staleness = max(staleness, version - self._next_versions.get(chunk, version))
            self._next_versions[chunk] = version + 1
        return staleness

    def read(self, into: Tensor, store: int) -> None:
        """Copy one store into a flat vector of this part; each chunk is consistent in itself."""
        for chunk in self._chunks:
            self._service.read(chunk, self._slice(into, chunk), store)

    def _slice(self, flat: Tensor, chunk: int) -> Tensor:
        part = self._service.chunks[chunk]
        return flat[part.start - self._start : part.stop - self._start]


@dataclass
class Surroundings:
    """What the averagers of one fit share.

    Attributes:
        thread: Runs the exchanges, one after the other.
        statistics: What this worker has spent on communication.
        turns: The order of the workers' exchanges.
        check: Raises if the run must end because a worker is lost.
        workers: The number of workers p that live.
    """

    thread: ThreadPoolExecutor
    check: Callable[[], None]
    workers: Callable[[], int]
    turns: Turns = field(default_factory=FreeOrder)
    statistics: Statistics = field(default_factory=Statistics)


class ServedAverager(Averager):
    """Exchanges one optimizer's parameters with a served center, every τ of its steps, on this worker's own clock.

    Args:
        optimizer: The worker's optimizer. Its parameters are fixed from here on.
        part: The optimizer's part of the center.
        store: The store of the center that is evaluated: 0 for the center itself.
        tau: τ, the communication period in optimizer steps.
        layout: A flat vector with the optimizer's layout, for the averager's own use.
        surroundings: What the averagers of one fit share.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        part: CenterPart,
        *,
        store: int,
        tau: int,
        layout: FlatTensors,
        surroundings: Surroundings,
    ) -> None:
        self._optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._part = part
        self._store = store
        self._tau = tau
        self._wire = layout
        self._staging: Staging = make_staging(layout.flat)
        self._shared = surroundings
        self._under_way: Future[int] | None = None
        self._snapshot: FlatTensors | None = None
        self._distance: Tensor | None = None
        self.clock = 0

    @property
    @override
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self._groups for parameter in group]

    @property
    def numel(self) -> int:
        """Elements of all parameters together."""
        return self._wire.flat.numel()

    def _is_due(self) -> bool:
        """Whether the clock says that an exchange is due, if the run can go on at all."""
        self._shared.check()
        self._snapshot = None
        if self.clock == 0 or self.clock % self._tau:
            return False
        self._check_parameters()
        return True

    @abstractmethod
    def _apply(self) -> None:
        """Apply the answers, which the wire holds."""

    @override
    @torch.no_grad()
    def complete(self) -> None:
        if self._under_way is None:
            return
        started = time.monotonic()
        exchange, self._under_way = self._under_way, None
        statistics = self._shared.statistics
        statistics.staleness += exchange.result()
        self._staging.arrive()
        statistics.seconds_waited += time.monotonic() - started
        self._apply()

    @override
    def center_values(self) -> list[Tensor]:
        return (self._read(self._store) if self._snapshot is None else self._snapshot).views

    @override
    def elastic_distance(self) -> float | None:
        return None if self._distance is None else float(self._distance)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"clock": self.clock}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock = state["clock"]

    @override
    @torch.no_grad()
    def start_at_center(self) -> None:
        self._read(store=0).store(self.parameters)

    @torch.no_grad()
    def take_snapshot(self) -> None:
        """Read the center that :meth:`show_center` will show."""
        self._snapshot = self._read(self._store)

    @override
    @torch.no_grad()
    def show_center(self) -> None:
        if self._snapshot is None:
            self.take_snapshot()
        assert self._snapshot is not None
        # An idle wire holds the worker exactly. It is in use only when an error cut an exchange short.
        self._kept = self._wire if self._under_way is None else self._like_wire()
        self._kept.load_(self.parameters)
        self._snapshot.store(self.parameters)

    @override
    @torch.no_grad()
    def show_worker(self) -> None:
        self._kept.store(self.parameters)
        self._snapshot = None  # the center moves on

    def _send(self, rates: Sequence[float]) -> None:
        """Send what the wire holds; :meth:`complete` waits for the answers."""
        self._staging.depart()
        self._shared.statistics.exchanges += 1
        self._shared.statistics.bytes_sent += 2 * self._wire.flat.nbytes
        self._under_way = self._shared.thread.submit(self._exchange, rates)

    def _exchange(self, rates: Sequence[float]) -> int:
        with self._shared.turns.turn():
            return self._part.exchange(self._staging.messages(), rates)

    def _read(self, store: int) -> FlatTensors:
        values = self._like_wire()
        on_host = torch.empty_like(values.flat, device="cpu")
        self._part.read(on_host, store)
        values.flat.copy_(on_host)
        return values

    def _like_wire(self) -> FlatTensors:
        return FlatTensors(self._groups, self._wire.flat.dtype)

    def _check_parameters(self) -> None:
        groups = self._optimizer.param_groups
        if [len(group["params"]) for group in groups] != [len(known) for known in self._groups]:
            raise RuntimeError(
                "EASGDStrategy(mode='async'): the optimizer has got or lost parameters since training started, and the"
                " served center has a fixed size. Give it all parameters at the start (those that are frozen first may"
                " have requires_grad=False), or use mode='sync'."
            )
