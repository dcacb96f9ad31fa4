"""Averaging with a served center: what asynchronous EASGD and the DOWNPOUR family share."""

import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.astray import AstrayPolicy, FailIfAstray
from lightning_easgd.averagers.averager import Averager
from lightning_easgd.averagers.exchange_order import Statistics
from lightning_easgd.averagers.served.parameters import ServedParameters
from lightning_easgd.averagers.served.turns import FreeOrder, Turns
from lightning_easgd.served_center import CenterService, LinkState
from lightning_easgd.tensors.flat_tensors import FlatTensors, all_finite, as_parameter
from lightning_easgd.transport.staging import Staging, make_staging

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
        self._start = min((service.chunks[chunk].start for chunk in self._chunks), default=0)
        self._next_versions: dict[int, int] = {}

    def exchange(self, messages: Tensor, rates: Mapping[int, float]) -> int:
        """Exchange every chunk of some segments; the messages are replaced by the answers.

        Args:
            messages: Flat vector of this part, on the CPU.
            rates: The rate of each segment that is exchanged, by its place in this part.

        Returns:
            The staleness: how many exchanges of other workers a chunk has taken since this worker's last one, of
            the chunk that has taken most.
        """
        begun = {
            chunk: self._service.begin(chunk, self._slice(messages, chunk), rates[self._segment(chunk)])
            for chunk in self._chunks
            if self._segment(chunk) in rates
        }
        staleness = 0
        for chunk, pending in begun.items():
            version = pending.wait()
            staleness = max(staleness, version - self._next_versions.get(chunk, version))
            self._next_versions[chunk] = version + 1
        return staleness

    def nbytes(self, segments: Collection[int]) -> int:
        """Bytes that the next messages of some segments have, and their answers."""
        return 2 * sum(self._service.nbytes(chunk) for chunk in self._chunks if self._segment(chunk) in segments)

    def link_state(self) -> dict[int, LinkState]:
        """What both ends of connections remember of rounded messages, by the chunk's place in this part."""
        states = ((place, self._service.link_state(chunk)) for place, chunk in enumerate(sorted(self._chunks)))
        return {place: state for place, state in states if state is not None}

    def load_link_state(self, state: Mapping[int, LinkState]) -> None:
        """Go on where :meth:`link_state` was taken; chunks that are cut otherwise begin anew."""
        for place, chunk in enumerate(sorted(self._chunks)):
            if place in state and len(state[place][0]) == self._service.layout.size(chunk):
                reference, residual = (part.to(self._service.dtype) for part in state[place])
                self._service.load_link_state(chunk, (reference, residual))

    def read(self, into: Tensor, store: int) -> bool:
        """Copy one store into a flat vector of this part; each chunk is consistent in itself.

        Returns:
            Whether any chunk has taken an exchange.
        """
        versions = [self._service.read(chunk, self._slice(into, chunk), store) for chunk in self._chunks]
        return any(versions)

    def _segment(self, chunk: int) -> int:
        return self._service.layout.segments[chunk] - self._segments.start

    def _slice(self, flat: Tensor, chunk: int) -> Tensor:
        part = self._service.chunks[chunk]
        return flat[part.start - self._start : part.stop - self._start]


@dataclass
class Surroundings:
    """What the averagers of one fit share.

    Attributes:
        rank: This worker's rank.
        thread: Runs the exchanges, one after the other.
        statistics: What this worker has spent on communication.
        turns: The order of the workers' exchanges.
        check: Raises if the run must end because a worker is lost.
        workers: The number of workers p that live.
        on_astray: What a worker at a non-finite point means to the run.
    """

    rank: int
    thread: ThreadPoolExecutor
    check: Callable[[], None]
    workers: Callable[[], int]
    turns: Turns = field(default_factory=FreeOrder)
    statistics: Statistics = field(default_factory=Statistics)
    on_astray: AstrayPolicy = field(default_factory=FailIfAstray)


class ServedAverager(Averager):
    """Exchanges one optimizer's parameters with a served center, every τ of its steps, on this worker's own clock.

    Args:
        optimizer: The worker's optimizer.
        part: The optimizer's part of the center.
        store: The store of the center that is shown: 0 for the center itself.
        tau: τ, the communication period in optimizer steps.
        parameters: The optimizer's parameters, which are fixed from here on.
        layout: A flat vector of them, for the averager's own use.
        surroundings: What the averagers of one fit share.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        part: CenterPart,
        *,
        store: int,
        tau: int,
        parameters: ServedParameters,
        layout: FlatTensors,
        surroundings: Surroundings,
    ) -> None:
        self._optimizer = optimizer
        self._served = parameters
        self._part = part
        self._store = store
        self._tau = tau
        self._layout = layout
        self._wire = self._layout.only(parameters.exchanged)
        self._staging: Staging = make_staging(self._layout.flat)
        self._shared = surroundings
        self._under_way: Future[int | None] | None = None
        self._is_answered = False  # the wire holds answers that are still to be applied
        self._begun_at = 0  # the clock of the last exchange: a step may be tried again, its exchange not
        self._snapshot: FlatTensors | None = None
        self._distance: Tensor | None = None
        self._is_measured = True  # whether the distance is that of the last exchange
        self.clock = 0

    @property
    @override
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self._groups for parameter in group]

    @property
    @override
    def laid_out(self) -> list[Tensor]:
        return [parameter for segment in self._served.segments for parameter in segment]

    @property
    def numel(self) -> int:
        """Elements of all parameters together, also of those that are frozen."""
        return self._layout.flat.numel()

    @property
    def _groups(self) -> list[list[Tensor]]:
        return self._served.averaged

    @override
    def follow(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @override
    def is_finite(self) -> bool:
        return all_finite(self.parameters)

    def _is_due(self) -> bool:
        """Whether an exchange is to be begun at this clock, if the run can go on at all."""
        self._shared.check()
        self._snapshot = None
        if self._is_idle and self._served.unfreeze():
            self._wire = self._layout.only(self._served.exchanged)
        if self.clock % self._tau or self.clock == self._begun_at:
            return False
        self._served.check(self._optimizer)
        self._begun_at = self.clock
        return bool(self._served.exchanged)

    @abstractmethod
    def _apply(self) -> None:
        """Apply the answers, which the wire holds."""

    @abstractmethod
    def _measure(self) -> Tensor | None:
        """The norm of the last difference, shape (), which the wire may hold; None before the first."""

    @override
    @torch.no_grad()
    def complete(self) -> None:
        self.receive()
        if self._is_answered:
            self._is_answered = False
            self._apply()
            self._is_measured = False

    @torch.no_grad()
    def receive(self) -> None:
        """Wait for the answers to the exchange under way, if any; :meth:`complete` applies them."""
        if self._under_way is None:
            return
        started = time.monotonic()
        exchange, self._under_way = self._under_way, None
        statistics = self._shared.statistics
        staleness = exchange.result()
        statistics.seconds_waited += time.monotonic() - started
        if staleness is None:
            self.start_at_center()
            self._shared.on_astray.reset(self._optimizer, self._shared.rank, self._begun_at)
            return
        statistics.staleness += staleness
        self._staging.arrive()
        self._is_answered = True

    @property
    def _is_idle(self) -> bool:
        """Whether the wire holds nothing that is needed."""
        return self._under_way is None and not self._is_answered

    @override
    def center_values(self) -> list[Tensor]:
        values = (self._read(self._store) if self._snapshot is None else self._snapshot).views
        return [as_parameter(value, parameter) for value, parameter in zip(values, self.parameters, strict=True)]

    @override
    def elastic_distance(self) -> float | None:
        self._keep_distance()
        return None if self._distance is None else float(self._distance)

    @torch.no_grad()
    def _keep_distance(self) -> None:
        """Measure the last difference, while the wire holds it."""
        if not self._is_measured:
            self._distance = self._measure()
            self._is_measured = True

    @override
    def state_dict(self) -> dict[str, Any]:
        link = self._part.link_state()
        return {"clock": self.clock, **({"link": link} if link else {})}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock = state["clock"]
        self._part.load_link_state(state.get("link", {}))

    @override
    @torch.no_grad()
    def start_at_center(self) -> None:
        self.receive()
        self._is_answered = False  # it was for where the worker was
        self._read(store=0).store(self.parameters)

    @torch.no_grad()
    def take_snapshot(self) -> None:
        """Read the center that :meth:`show_center` will show."""
        self._served.check(self._optimizer)
        self._snapshot = self._read(self._store)

    @override
    @torch.no_grad()
    def show_center(self) -> None:
        if self._snapshot is None:
            self.take_snapshot()
        assert self._snapshot is not None
        self._keep_distance()
        # An idle wire holds the worker exactly. It is in use only when an error cut an exchange short.
        self._kept = self._wire if self._is_idle else self._like_wire()
        self._kept.load_(self.parameters)
        self._snapshot.store(self.parameters)

    @override
    @torch.no_grad()
    def show_worker(self) -> None:
        self._kept.store(self.parameters)
        self._snapshot = None  # the center moves on

    def _send(self, rates: Sequence[float]) -> None:
        """Send what the wire holds; :meth:`complete` waits for the answers.

        Args:
            rates: The rate of each of the optimizer's groups.
        """
        self._staging.depart()
        statistics = self._shared.statistics
        statistics.exchanges += 1
        statistics.bytes_sent += self._part.nbytes(self._served.exchanged)
        of_segments = {number: rates[self._served.group_of(number)] for number in self._served.exchanged}
        self._under_way = self._shared.thread.submit(self._exchange, of_segments)

    def _exchange(self, rates: Mapping[int, float]) -> int | None:
        """Exchange on the thread; the staleness, or None if this worker has gone astray and starts at the center."""
        messages = self._staging.messages()
        parts = torch.split(messages, [segment.numel() for segment in self._wire.segments])
        finite = all_finite([parts[number] for number in rates])
        if not finite:
            self._read(store=0)  # which looks whether it is the center
            self._shared.on_astray.hear(f"rank {self._shared.rank}", self._begun_at)
        with self._shared.turns.turn():  # also without a message: the others wait for its turn
            return self._part.exchange(messages, rates) if finite else None

    def _read(self, store: int) -> FlatTensors:
        values = self._like_wire()
        on_host = torch.empty_like(values.flat, device="cpu")
        self.has_exchanged |= self._part.read(on_host, store)
        values.flat.copy_(on_host)
        self._shared.on_astray.check_center(all_finite(values.views))
        return values

    def _like_wire(self) -> FlatTensors:
        return self._layout.like().only(self._served.exchanged)
