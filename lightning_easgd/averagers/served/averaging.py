"""The averaging of a fit with a served center: opening it, meeting, and noticing that a worker is lost."""

import contextlib
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate, count, pairwise
from types import MappingProxyType
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.astray import AstrayPolicy, FailIfAstray
from lightning_easgd.averagers.averaged_parameters import Names, check_in_common
from lightning_easgd.averagers.averager import Averaging, follow, versions_for
from lightning_easgd.averagers.common_values import CommonValues
from lightning_easgd.averagers.exchange_order import Header, Meeting, Statistics, WorkersStoppedError
from lightning_easgd.averagers.served.averager import CenterPart, ServedAverager, Surroundings
from lightning_easgd.averagers.served.loss_policy import FailOnLoss, LossPolicy
from lightning_easgd.averagers.served.parameters import ServedParameters
from lightning_easgd.averagers.served.turns import FreeOrder, RoundRobin, Turns
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.method.compression import WireDtype
from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.served_center import CenterTimeoutError, ServedCenter, WorkerLostError, open_center
from lightning_easgd.tensors.flat_tensors import as_real, center_dtype
from lightning_easgd.transport.channel import Channel, ExchangeError
from lightning_easgd.transport.discovery import Rendezvous
from lightning_easgd.transport.errors import StoreLostError
from lightning_easgd.transport.liveness import Presence
from lightning_easgd.transport.store_client import StoreClient, store_server

__all__ = ["ServedAveraging", "free_order", "round_robin"]

_fits = count()
_LONGEST_GOODBYE = 10.0
_LOSS_DELAY = 2.0
_GOODBYE_PAUSE = 0.005
_PATIENCE = 0.5  # between two looks at who lives and whether to stop

MakeAverager = Callable[..., ServedAverager]
MakeTurns = Callable[[StoreClient, ServedCenter, Channel, float, str], Turns]


def free_order(store: StoreClient, center: ServedCenter, channel: Channel, timeout: float, strategy: str) -> Turns:  # noqa: ARG001
    """Every worker on its own clock."""
    return FreeOrder()


def round_robin(store: StoreClient, center: ServedCenter, channel: Channel, timeout: float, strategy: str) -> Turns:
    """Turns that pass from rank to rank."""
    return RoundRobin(store, channel.rank, channel.size, timeout=timeout, control=center.control, strategy=strategy)


def exchange_thread(
    threads: int, device: torch.device | None, set_device: Callable[..., None] = torch.cuda.set_device
) -> ThreadPoolExecutor:
    """The thread that exchanges.

    Args:
        threads: What torch may use in it: a new thread would take all cores.
        device: The worker's CUDA device: a new thread has device 0, where a context takes some hundred megabytes.
        set_device: Makes a device the thread's own.
    """

    def begin() -> None:
        torch.set_num_threads(threads)
        if device is not None:
            set_device(device)

    return ThreadPoolExecutor(1, "easgd-exchange", initializer=begin)


@final
class ServedAveraging(Averaging):
    """All optimizers of a fit on one served center.

    Args:
        control: A channel of CPU tensors; all workers compare a few numbers on it when they meet.
        store: The ranks' store.
        node: This rank's node, any number that the ranks of one node share.
        timeout: How long a worker may be silent, a chunk held, or an answer under way.
        exchange: What an exchange does at the center.
        make_averager: Makes the averager of one optimizer, called as
            ``(optimizer, part, parameters=, layout=, store=, surroundings=)``.
        make_turns: Makes the order of the exchanges.
        on_loss: What to do when a worker dies.
        on_astray: What a worker at a non-finite point means to the run.
        strategy: The strategy's name, for errors.
        synchronous: As for :class:`ServedParameters`.
        wire_dtype: What messages between nodes are rounded to; None to send them as they are.
    """

    def __init__(
        self,
        control: Channel,
        store: Store,
        *,
        node: int,
        timeout: timedelta,
        exchange: ServedExchange,
        make_averager: MakeAverager,
        make_turns: MakeTurns = free_order,
        on_loss: LossPolicy | None = None,
        on_astray: AstrayPolicy | None = None,
        strategy: str = "EASGDStrategy",
        synchronous: str = "EASGDStrategy(mode='sync')",
        wire_dtype: WireDtype | None = None,
    ) -> None:
        self.control = control
        self._wire_dtype = wire_dtype
        self.worker = WorkerRanks.one(control)
        self.statistics = Statistics()
        self.strategy = strategy
        self._synchronous = synchronous
        self._node = node
        self._timeout = timeout.total_seconds()
        self._exchange = exchange
        self._make_averager = make_averager
        self._make_turns = make_turns
        self._on_loss = on_loss or FailOnLoss(strategy)
        self.on_astray = on_astray or FailIfAstray(strategy)
        # Keys of another fit in these processes must not be taken for those of this one.
        self._client = StoreClient(store, self._timeout, server=store_server())
        self._keys = self._client.under(f"easgd/fit/{next(_fits)}")
        self._presence = Presence(self._keys, control.rank)
        self._presence.enter()
        self._center: ServedCenter | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._turns: Turns = FreeOrder()
        self._served: list[ServedAverager] = []
        self._starts = 0
        self._meetings = 0
        self._assemblies = 0
        self._stop_agreed = False

    @override
    def start(
        self,
        optimizers: Sequence[Optimizer],
        ignored: Collection[Tensor] = (),
        trained: Collection[Tensor] = (),
        names: Names = dict,
    ) -> None:
        for averager in self._served:  # of the learning rate finder's fit
            averager.close()
        self._let_go()
        parameters = [
            ServedParameters(optimizer, ignored, trained, names, self.strategy, self._synchronous)
            for optimizer in optimizers
        ]
        dtype = center_dtype([p for every in parameters for segment in every.segments for p in segment])
        layouts = [every.layout(dtype) for every in parameters]
        sizes = [segment.numel() for layout in layouts for segment in layout.segments]
        timeout = self._timeout
        keys = self._keys.under(f"start/{self._starts}")
        self._starts += 1
        rank, size = self.control.rank, self.control.size
        rendezvous = Rendezvous(keys, self._presence, rank, size, timeout, user=self.strategy)
        groups = [segment for every in parameters for segment in every.described]
        if len(set(rendezvous.gather("layout", zlib.crc32(repr(groups).encode())))) > 1:
            check_in_common(rendezvous.gather("layouts", groups), self.control.rank, self.strategy)
        self._center = open_center(
            self._client,
            rank=self.control.rank,
            nodes=_ranks_of_nodes(rendezvous.gather("nodes", self._node)),
            segments=list(pairwise(accumulate(sizes, initial=0))),
            dtype=dtype,
            exchange=self._exchange,
            initial=torch.cat([torch.empty(0, dtype=dtype), *(layout.flat.cpu() for layout in layouts)]),
            timeout=timeout,
            presence=self._presence,
            wire_dtype=self._wire_dtype,
            user=self.strategy,
        )
        self._turns = self._make_turns(keys, self._center, self.control, timeout, self.strategy)
        devices = [layout.flat.device for layout in layouts if layout.flat.is_cuda]
        self._thread = exchange_thread(torch.get_num_threads(), devices[0] if devices else None)
        surroundings = Surroundings(
            self.control.rank,
            self._thread,
            self._check,
            self._living,
            turns=self._turns,
            statistics=self.statistics,
            on_astray=self.on_astray,
        )
        firsts = accumulate((len(layout.segments) for layout in layouts), initial=0)
        self._served = [
            self._make_averager(
                optimizer,
                CenterPart(self._center, range(first, last)),
                parameters=every,
                layout=layout,
                store=self._exchange.rule.shown,
                surroundings=surroundings,
            )
            for optimizer, every, layout, (first, last) in zip(
                optimizers, parameters, layouts, pairwise(firsts), strict=True
            )
        ]
        self.averagers = dict(zip(optimizers, self._served, strict=True))
        self._stop_agreed = False

    @override
    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        self.averagers = follow(dict(zip(self.averagers, self._served, strict=True)), optimizers, self.strategy)

    @property
    @override
    def reaches_all(self) -> bool:
        return not self._lost

    @override
    def center_state_dict(self) -> dict[str, Any]:
        center = self._opened
        stores = []
        for store in range(self._exchange.rule.stores):
            flat = torch.empty(sum(averager.numel for averager in self._served), dtype=center.dtype)
            versions = center.read_all(flat, store)
            stores.append(list(torch.split(flat, [averager.numel for averager in self._served])))
        return {"stores": stores, "versions": versions}

    @property
    @override
    def is_in_parameters(self) -> bool:
        parameters = [parameter for averager in self._served for parameter in averager.parameters]
        return not self._exchange.rule.has_memory and all(as_real(p).dtype == self._opened.dtype for p in parameters)

    @override
    def load_center_state_dict(self, state: dict[str, Any]) -> None:
        if self.control.rank == 0:
            versions = versions_for(state, len(self._opened.chunks))
            for number, store in enumerate(state["stores"][: self._exchange.rule.stores]):
                flat = torch.cat(store).to(self._opened.dtype)
                for (chunk, part), version in zip(enumerate(self._opened.chunks), versions, strict=True):
                    self._opened.write(chunk, flat[part], number, version)
        self._gather("resumed")

    @override
    def meet(self, meeting: Meeting) -> None:
        """Return when all living workers have come and each holds the same snapshot of the center.

        Others may be long in coming; they are waited for as long as they give a sign of life.
        """
        for averager in self._served:
            averager.receive()
        self._turns.leave()
        self._gather("come", may_stop=meeting is not Meeting.TRAINING_END)
        self._compare(meeting)
        if meeting not in (Meeting.EPOCH_END, Meeting.BATCH_END, Meeting.TEARDOWN):
            for averager in self._served:
                averager.take_snapshot()
        self._turns.come_back()  # before anybody goes on, else that one would not wait for this worker's turn
        self._gather("read")
        if meeting in (Meeting.TRAINING_END, Meeting.TEARDOWN):
            self._see_off()
        self._meetings += 1
        self._stop_agreed = self._opened.control.stop_requested

    @override
    def assemble(self) -> None:
        self._assemblies += 1
        self._gather(f"assembly/{self._assemblies}")

    @override
    def common_values(self, tensors: Mapping[str, Tensor]) -> CommonValues:
        if self._lost:  # there is no channel any more that reaches exactly the living
            return CommonValues()
        try:
            return super().common_values(tensors)
        except ExchangeError as error:
            if self._loss_explains():
                return self.common_values(tensors)
            self._blame(error)
            raise

    @override
    def check_finite(self) -> None:
        if not self._lost:  # as for common values
            super().check_finite()

    @override
    def request_stop(self) -> None:
        if self._center is not None:
            self._center.control.request_stop()
        self._stop_agreed = True

    @property
    @override
    def stop_agreed(self) -> bool:
        return self._stop_agreed or (self._center is not None and self._center.control.stop_requested)

    @override
    def note_progress(self) -> None:
        if self._center is not None:
            self._center.control.note_progress()

    @override
    def fail(self, reason: str = "") -> None:
        with contextlib.suppress(StoreLostError):
            self._presence.fail(reason)
        if self._center is not None:
            self._center.control.resign(reason)

    @override
    def close(self) -> None:
        for averager in self._served:
            averager.close()
        self._let_go()
        self._client.close()
        self.control.close()

    @property
    @override
    def waits_for_all(self) -> bool:
        # In a fixed order everyone waits for everyone's turn; and after a loss Lightning's collectives would fail.
        return self._make_turns is round_robin or (self._center is not None and bool(self._lost))

    @property
    def _opened(self) -> ServedCenter:
        assert self._center is not None
        return self._center

    @property
    def _lost(self) -> frozenset[int]:
        return self._opened.control.dead_ranks()

    def _living(self) -> int:
        return self.control.size - len(self._lost)

    def _check(self) -> None:
        """Called at each step and wherever this worker waits: its main thread gets on."""
        self.note_progress()
        lost, control = self._lost, self._opened.control
        if lost:
            if control.store_lost and self._client.server not in lost:  # they may have ended because of that
                self._blame()
            self._on_loss.notice(lost, self.control.size, control.reasons())

    def _compare(self, meeting: Meeting) -> None:
        """Make sure that all who have come mean the same meeting."""
        while not self._lost:
            header = Header(self.control, meeting=meeting, stop=self.stop_agreed, strategy=self.strategy)
            try:
                header.wait()
                return
            except ExchangeError as error:
                if not header.stop:
                    if self._loss_explains():
                        return
                    self._blame(error)
                    raise
                if meeting is not Meeting.TRAINING_END:
                    raise WorkersStoppedError from None
                # Another worker was at the meeting that the stop has called off; it comes to this one next.

    def _loss_explains(self) -> bool:
        """Whether a transfer failed because a worker is lost, which the control plane may be about to hear."""
        deadline = time.monotonic() + _LOSS_DELAY
        while not self._lost and time.monotonic() < deadline:
            time.sleep(0.05)
        self._check()
        return bool(self._lost)

    def _gather(self, what: str, may_stop: bool = False) -> None:
        """Wait for all that live; raise if one that must come has died, or does not get on for the timeout."""
        control = self._opened.control
        everyone = frozenset(range(self.control.size))
        deadline = time.monotonic() + self._timeout
        while True:
            self._check()
            if may_stop and self.stop_agreed:
                raise WorkersStoppedError
            patience = min(_PATIENCE, self._timeout)
            try:
                control.meet(f"{self._meetings}/{what}", among=everyone - self._lost, timeout=patience)
            except WorkerLostError:
                continue  # the policy decides
            except CenterTimeoutError as error:
                if control.store_lost:
                    self._loss_explains()
                if control.store_lost or time.monotonic() >= deadline:
                    self._blame(error)
                continue  # slow, but it gets on
            break
        if self._lost and dist.is_initialized():
            # Its members are not all there any more; without it Lightning and torchmetrics act on this rank alone.
            dist.destroy_process_group()

    def _blame(self, error: Exception | None = None) -> None:
        """Raise if this worker waits for one that will not come."""
        control = self._opened.control
        guilty = control.silent_ranks() | control.left_ranks()
        cause = self._client.problem or error
        if not guilty and self._client.problem is None:
            return
        who = f"workers {sorted(guilty)} do" if guilty else "the store does not answer, so that workers do"
        raise ExchangeError(
            f"{self.strategy}(timeout={self._timeout:g} s): {who} not come to where all meet"
            f"{f' ({control.describe(guilty)})' if guilty else ''}. Look for the first error among the ranks; a longer"
            f" timeout helps only if they are slow. Cause: {cause}"
        ) from error

    def _see_off(self) -> None:
        """Rank 0 may serve the store: it goes on only when the others have no more use for it."""
        living = frozenset(range(self.control.size)) - self._lost
        keys = {rank: f"seen/{self._meetings}/{rank}" for rank in living}
        deadline = time.monotonic() + min(self._timeout, _LONGEST_GOODBYE)
        with contextlib.suppress(StoreLostError):  # somebody died on the last yards
            self._keys.set(keys[self.control.rank], "")
            if self.control.rank == 0:
                while not self._keys.check(list(keys.values())) and time.monotonic() < deadline:
                    time.sleep(_GOODBYE_PAUSE)

    def _let_go(self) -> None:
        center, self._center = self._center, None
        thread, self._thread = self._thread, None
        self._turns.close()
        if center is not None:
            center.close()
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)
        self._turns, self._served, self.averagers = FreeOrder(), [], MappingProxyType({})


def _ranks_of_nodes(nodes: Sequence[int]) -> list[list[int]]:
    return [[rank for rank, name in enumerate(nodes) if name == node] for node in dict.fromkeys(nodes)]
