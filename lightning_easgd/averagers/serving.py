"""The averaging of a fit with a served center: opening it, meeting, and what happens when a worker is lost."""

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate, count, pairwise
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.astray import AstrayPolicy, FailIfAstray
from lightning_easgd.averagers.base import Averaging, follow
from lightning_easgd.averagers.channel import Channel, ExchangeError
from lightning_easgd.averagers.line import Header, Meeting, Statistics, WorkersStoppedError
from lightning_easgd.averagers.served import CenterPart, ServedAverager, Surroundings
from lightning_easgd.averagers.served_parameters import ServedParameters
from lightning_easgd.averagers.turns import FreeOrder, RoundRobin, Turns
from lightning_easgd.center import as_real, center_dtype
from lightning_easgd.common_values import CommonValues
from lightning_easgd.service import CenterRule, CenterTimeoutError, ServedCenter, WorkerLostError, open_center
from lightning_easgd.service.stores import own_client

__all__ = ["ContinueOnLoss", "FailOnLoss", "LossPolicy", "ServedAveraging", "free_order", "round_robin"]

_log = logging.getLogger(__name__)
_starts = count()
_LONGEST_GOODBYE = 10.0
_LOSS_DELAY = 2.0
_PATIENCE = 0.5  # between two looks at who lives and whether to stop

MakeAverager = Callable[..., ServedAverager]
MakeTurns = Callable[[Store, ServedCenter, Channel, float], Turns]


class LossPolicy(ABC):
    """What a worker does when another one has died."""

    @abstractmethod
    def notice(self, dead: frozenset[int], workers: int) -> None:
        """Called with the dead of ``workers`` workers, before each step and meeting; raises to end the run."""


@final
class FailOnLoss(LossPolicy):
    """End the run with an error that names the dead."""

    @override
    def notice(self, dead: frozenset[int], workers: int) -> None:
        raise WorkerLostError(
            f"EASGDStrategy(on_worker_loss='fail'): workers {sorted(dead)} of {workers} have died or raised an error;"
            " look for the first error among the ranks. on_worker_loss='continue' lets the others go on.",
            dead,
        )


@final
class ContinueOnLoss(LossPolicy):
    """Go on with those that live; say so once for each that dies."""

    def __init__(self) -> None:
        self._known: frozenset[int] = frozenset()

    @override
    def notice(self, dead: frozenset[int], workers: int) -> None:
        if dead != self._known:
            self._known = dead
            _log.warning(
                "EASGDStrategy(on_worker_loss='continue'): workers %s of %d have died; %d go on, with alpha = beta/%d"
                " unless alpha is given. From the next meeting on each rank evaluates its own part of the data.",
                sorted(dead),
                workers,
                workers - len(dead),
                workers - len(dead),
            )


def free_order(store: Store, center: ServedCenter, channel: Channel, timeout: float) -> Turns:  # noqa: ARG001
    """Every worker on its own clock."""
    return FreeOrder()


def round_robin(store: Store, center: ServedCenter, channel: Channel, timeout: float) -> Turns:
    """Turns that pass from rank to rank."""
    lost = center.control.dead_ranks
    return RoundRobin(store, channel.rank, channel.size, timeout=timeout, lost=lost)


@final
class ServedAveraging(Averaging):
    """All optimizers of a fit on one served center.

    Args:
        control: A channel of CPU tensors; all workers compare a few numbers on it when they meet.
        store: The ranks' store.
        node: This rank's node, any number that the ranks of one node share.
        timeout: How long a worker may be silent, a chunk held, or an answer under way.
        rule: What an exchange does at the center.
        make_averager: Makes the averager of one optimizer, called as
            ``(optimizer, part, parameters=, layout=, surroundings=)``.
        make_turns: Makes the order of the exchanges.
        on_loss: What to do when a worker dies.
        on_astray: What a worker at a non-finite point means to the run.
    """

    def __init__(
        self,
        control: Channel,
        store: Store,
        *,
        node: int,
        timeout: timedelta,
        rule: CenterRule,
        make_averager: MakeAverager,
        make_turns: MakeTurns = free_order,
        on_loss: LossPolicy | None = None,
        on_astray: AstrayPolicy | None = None,
    ) -> None:
        self.control = control
        self.statistics = Statistics()
        self._store = store
        self._node = node
        self._timeout = timeout.total_seconds()
        self._rule = rule
        self._make_averager = make_averager
        self._make_turns = make_turns
        self._on_loss = on_loss or FailOnLoss()
        self.on_astray = on_astray or FailIfAstray()
        self._center: ServedCenter | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._turns: Turns = FreeOrder()
        self._served: list[ServedAverager] = []
        self._meetings = 0
        self._stop_agreed = False

    @override
    def start(
        self,
        optimizers: Sequence[Optimizer],
        ignored: Collection[Tensor] = (),
        name_of: Callable[[Tensor], str] = lambda _: "",
    ) -> None:
        for averager in self._served:  # of the learning rate finder's fit
            averager.close()
        self._let_go()
        parameters = [ServedParameters(optimizer, ignored, name_of) for optimizer in optimizers]
        dtype = center_dtype([p for every in parameters for segment in every.segments for p in segment])
        layouts = [every.layout(dtype) for every in parameters]
        sizes = [segment.numel() for layout in layouts for segment in layout.segments]
        timeout = self._timeout
        # Keys of another fit in these processes must not be taken for those of this one.
        self._keys = PrefixStore(f"easgd/fit/{next(_starts)}", self._store)
        self._center = open_center(
            self._store,
            rank=self.control.rank,
            nodes=_ranks_of_nodes(self._node, self.control.size),
            segments=list(pairwise(accumulate(sizes, initial=0))),
            dtype=dtype,
            rule=self._rule,
            initial=torch.cat([torch.empty(0, dtype=dtype), *(layout.flat.cpu() for layout in layouts)]),
            timeout=timeout,
        )
        self._turns = self._make_turns(own_client(self._keys), self._center, self.control, timeout)
        threads = torch.get_num_threads()  # a new thread would take all cores
        self._thread = ThreadPoolExecutor(1, "easgd-exchange", initializer=torch.set_num_threads, initargs=(threads,))
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
        self.averagers = follow(dict(zip(self.averagers, self._served, strict=True)), optimizers)

    @property
    @override
    def has_exchanged(self) -> bool:
        return any(averager.has_seen_exchange for averager in self._served)

    @override
    def center_state_dict(self) -> dict[str, Any]:
        center = self._opened
        stores = []
        for store in range(self._rule.stores):
            flat = torch.empty(sum(averager.numel for averager in self._served), dtype=center.dtype)
            versions = center.read_all(flat, store)
            stores.append(list(torch.split(flat, [averager.numel for averager in self._served])))
        return {"stores": stores, "versions": versions}

    @property
    @override
    def is_in_parameters(self) -> bool:
        parameters = [parameter for averager in self._served for parameter in averager.parameters]
        return self._rule.stores == 1 and all(as_real(p).dtype == self._opened.dtype for p in parameters)

    @override
    def load_center_state_dict(self, state: dict[str, Any]) -> None:
        if self.control.rank == 0:
            versions = state.get("versions", [0] * len(self._opened.chunks))
            for number, store in enumerate(state["stores"][: self._rule.stores]):
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
            averager.complete()
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
    def common_values(self, tensors: Mapping[str, Tensor]) -> CommonValues:
        if self._lost:  # there is no channel any more that reaches exactly the living
            return CommonValues()
        try:
            return super().common_values(tensors)
        except ExchangeError:
            if self._loss_explains():
                return self.common_values(tensors)
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
    def fail(self) -> None:
        if self._center is not None:
            self._center.control.resign()

    @override
    def close(self) -> None:
        for averager in self._served:
            averager.close()
        self._let_go()
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
        if self._lost:
            self._on_loss.notice(self._lost, self.control.size)

    def _compare(self, meeting: Meeting) -> None:
        """Make sure that all who have come mean the same meeting."""
        while not self._lost:
            header = Header(self.control, meeting=meeting, stop=self.stop_agreed)
            try:
                header.wait()
                return
            except ExchangeError:
                if not header.stop:
                    if self._loss_explains():
                        return
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
        """Wait for all that live; raise if one that must come has died, or gives no sign of life."""
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
                if time.monotonic() < deadline and not control.store_lost:
                    continue
                silent = control.silent_ranks()
                if silent or control.store_lost or control.left_ranks():
                    raise ExchangeError(
                        f"EASGDStrategy(timeout={self._timeout:g} s): workers"
                        f" {sorted(silent | control.left_ranks()) or 'of the first rank'} do not come to where all"
                        f" meet; they are frozen, or ended early. Cause: {error}"
                    ) from error
                continue  # slow, but alive
            break
        if self._lost and dist.is_initialized():
            # Its members are not all there any more; without it Lightning and torchmetrics act on this rank alone.
            dist.destroy_process_group()

    def _see_off(self) -> None:
        """Rank 0 may serve the store: it goes on only when the others have no more use for it."""
        living = frozenset(range(self.control.size)) - self._lost
        keys = {rank: f"seen/{self._meetings}/{rank}" for rank in living}
        with contextlib.suppress(RuntimeError):  # somebody died on the last yards
            store = own_client(self._keys)
            store.set(keys[self.control.rank], "")
            if self.control.rank == 0:
                store.wait(list(keys.values()), timedelta(seconds=min(self._timeout, _LONGEST_GOODBYE)))

    def _let_go(self) -> None:
        center, self._center = self._center, None
        thread, self._thread = self._thread, None
        self._turns.close()
        if center is not None:
            center.close()
        if thread is not None:
            thread.shutdown(wait=False, cancel_futures=True)


def _ranks_of_nodes(node: int, size: int) -> list[list[int]]:
    nodes: list[int] = [0] * size
    dist.all_gather_object(nodes, node)
    return [[rank for rank in range(size) if nodes[rank] == name] for name in dict.fromkeys(nodes)]
