"""The workers that are alive, as torchft's lighthouse counts them, and the exchanges that those of one count make."""

import math
import pickle
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    BroadcastOptions,
    TCPStore,
)

from lightning_easgd.transport.channel import Channel, ExchangeError, LoneChannel
from lightning_easgd.transport.daemon import Daemon
from lightning_easgd.transport.device_queue import make_queue
from lightning_easgd.transport.lighthouse import Heard, Lighthouse
from lightning_easgd.transport.manager import import_quietly, make_manager
from lightning_easgd.transport.member_groups import GroupKind, make_group
from lightning_easgd.transport.waiting import wait_until

__all__ = ["Membership"]

_FOR_EVER = timedelta(days=365)
_COMMIT = 4
_LOOK = 1.0  # seconds after which the ranks of a worker see that all are there: one that asks without the others waits
_MOST_UNHEARD = 5  # exchanges one after the other; with each, somebody's steps are taken to be twice as long
_NOBODY = -1  # in place of a replica_id
_CPU = torch.device("cpu")


class _State:
    """A part of the state."""

    def __init__(
        self,
        key: str,
        give: Callable[[], Any],
        load: Callable[[Any], None],
        prepare: Callable[[], None] | None,
        is_common: bool,
    ) -> None:
        self.key, self.give, self.load, self.prepare, self.is_common = key, give, load, prepare, is_common
        self.received: tuple[Any] | None = None  # for the request that has been made

    def keep(self, value: Any) -> None:
        """Keep what another worker has given; called by another thread."""
        self.received = (value,)


class _Present(NamedTuple):
    """A worker that takes part in an exchange, as it says itself."""

    replica_id: int
    common: int  # the checksum of what all must have in common
    behind: int
    pace: int  # milliseconds of a step


@final
class Membership:
    """This worker among those that live; torchft's ``Manager``, one on each of the worker's ranks.

    In this order, again and again: :meth:`request`, which returns at once; :meth:`has_come`; :meth:`exchange`;
    :meth:`commit`. A request is answered when all that live have made theirs, or the lighthouse goes on without those
    that have not. A worker that is behind the others then gets their state: what :meth:`add_state` has registered.

    All ranks of a worker call the same methods at the same point, and each is told the same. Each exchanges with the
    ranks of its coordinate in the other workers, and gets the state from one of them.

    Args:
        lighthouse: Its address.
        replica_id: This worker's number.
        min_replica_size: How many workers an exchange must have to count.
        timeout: Seconds that a transfer may take.
        patience: Seconds for which workers that are still in an earlier fit are waited for.
        fit: Which fit of the job this is, from 1 on; None for the one after the last that this process has come to.
        strategy: The strategy's name, for errors.
        inside: The channel of this worker's ranks; None for one rank.
        host: The host of its first rank.
        kind: What the vectors of an exchange travel through.
        device: Where this rank trains.

    Attributes:
        replica_id: As given.
        progress: How far this worker is. Of those that begin together, the one that is furthest gives its state.
        pace: Seconds of a step of this worker's. It may be in the middle of one when the others have come.
        living: The numbers of the workers of the last exchange that all came to; at first this worker's.
        missed: Requests that were not answered in time.
        failed: Exchanges that did not count.
        all_begin: Whether the request that has been answered was the first of all whom it has brought together.
        awaited: The number of a worker that lives and was not among them, so that they have not begun without it.
    """

    _last_fit: ClassVar[int] = 0  # of this process

    def __init__(
        self,
        lighthouse: str,
        replica_id: int,
        *,
        min_replica_size: int,
        timeout: float,
        strategy: str,
        patience: float = 0.0,
        fit: int | None = None,
        inside: Channel | None = None,
        host: str = "localhost",
        kind: GroupKind = "gloo",
        device: torch.device = _CPU,
    ) -> None:
        self._inside = inside or LoneChannel()
        self._host = host
        self._kind: GroupKind = kind
        self._queue = make_queue(device)
        self.replica_id = replica_id
        self._min_replica_size = min_replica_size
        self._timeout = timedelta(seconds=timeout)
        self._strategy = strategy
        self._patience = patience
        self._fit = fit or Membership._last_fit + 1
        own = Heard(replica_id, self._inside.size, self._fit, kind)
        self._lighthouse = Lighthouse(lighthouse, own, strategy)
        self._states: dict[str, _State] = {}
        self._manager: Any = None
        self._request: Future[None] | None = None
        self._under_way: Future[bool] | None = None
        self._counts = True  # the last exchange
        self._present: tuple[_Present, ...] = ()  # at the last exchange, if all have heard of all
        self.progress: Callable[[], int] = int
        self.pace = self._pace_of_others = 0.0
        self._unheard = 0  # exchanges, one after the other
        self._has_state = True  # which it was behind by
        self._is_settled = False  # whether all ranks have heard what has become of the request
        self._before: dict[str, int] = {}  # of the Manager, when the request was made
        self._met = 0  # the Manager's step after the last exchange with others; who is set back to 0 has made those
        self.living: tuple[int, ...] = (replica_id,)
        self.missed = self.failed = 0
        self._comes = False  # with the request that has been made
        self.all_begin = False
        self.awaited: int | None = None
        import_quietly()

    def is_first(self) -> bool:
        """Whether this worker is the one of the smallest number that lives.

        Of those that took part in the last exchange, one that the lighthouse has not heard of for two seconds is dead:
        it would be missed at the next exchange only, and after the last one never. Ranks of one worker, which save
        together, do not look.
        """
        before = {number for number in self.living if number < self.replica_id}
        if before and self.is_of_one_rank:
            heard = self._lighthouse.heard()
            if heard:  # else there is no lighthouse
                before &= {each.replica_id for each in heard if each.may_live}
        return not before

    def check(self) -> None:
        """Raise if there is nobody to find the others with, or a worker is alive that this one cannot be beside.

        Raises:
            ExchangeError: If it is so.
        """
        self._of_first(partial(self._lighthouse.check, self._patience))

    def open(self) -> None:
        """Come to the others: from now on they hear of this worker.

        Raises:
            ExchangeError: If another worker of this number has come, or one of another size.
        """
        Membership._last_fit = self._fit
        port = self._of_first(self._make_store)
        if self._inside.rank == 0:
            self._of_first(partial(self._make_manager, port))
        else:
            self._of_first(int)
            self._make_manager(port)
        self._thread = Daemon("easgd_membership")
        try:
            self._of_first(lambda: self._lighthouse.refuse_others(self._own_name()))
        except ExchangeError:
            self.close()
            raise

    def _make_store(self) -> int:
        # One's own for each attempt: torchrun starts ranks again with the store of before, and keys that are stale.
        self._store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False)
        return int(self._store.port)

    def _make_manager(self, port: int) -> None:
        self._group = make_group(self._kind, self._timeout)
        self._met = 0  # as the step of a new Manager
        self._manager = make_manager(
            self._group,
            self._lighthouse.address,
            self._lighthouse.own.name,
            min_replica_size=self._min_replica_size,
            timeout=self._timeout,
            rank=self._inside.rank,
            ranks=self._inside.size,
            store=(self._host, port),
        )
        for state in self._states.values():
            self._manager.register_state_dict_fn(state.key, state.keep, partial(self._give, state))

    def _give(self, state: _State) -> Any:
        with self._beside():
            return state.give()

    def _own_name(self) -> str:
        """What torchft has added to the name for this launch."""
        return str(self._store.get("replica_id").decode().partition(":")[2])

    def add_state(
        self,
        key: str,
        state: Callable[[], Any],
        load: Callable[[Any], None],
        *,
        prepare: Callable[[], None] | None = None,
        is_common: bool = False,
    ) -> None:
        """Register a part of the state that one who is behind gets from another; before :meth:`open`, and anew.

        Args:
            key: Its name, the same on all.
            state: Gives it; called by another thread between a request and the commit.
            load: Takes it, in :meth:`has_come`, once all ranks of this worker have got theirs.
            prepare: Called before, where :meth:`request` is.
            is_common: Whether all ranks of this worker take what the first one has got: they may have got it from
                different workers.
        """
        self._states[key] = _State(key, state, load, prepare, is_common)

    # The ranks of this worker

    def _all(self, holds: bool) -> bool:
        """Whether something holds on all ranks of this worker."""
        holding = torch.tensor([int(holds)])
        self._inside.sum(holding).wait()
        return int(holding) == self._inside.size

    def _of_first(self, act: Callable[[], int | None]) -> int:
        """What an action of this worker's first rank gives; if it fails, all of them do."""
        given, problem = 0, None
        if self._inside.rank == 0:
            try:
                given = act() or 0
            except Exception as error:
                problem = error
        said = torch.tensor([given, int(problem is not None)])
        self._inside.share(said, 0).wait()
        if problem is not None:
            raise problem
        if said[1]:
            raise ExchangeError(f"{self._strategy}: the first rank of this worker has failed; look for its error.")
        return int(said[0])

    def _from_first(self, value: Any) -> Any:
        """The first rank's value."""
        message = _packed(value)
        length = torch.tensor([len(message)])
        self._inside.share(length, 0).wait()
        if self._inside.rank != 0:
            message = torch.empty(int(length), dtype=torch.uint8)
        self._inside.share(message, 0).wait()
        return value if self._inside.rank == 0 else _unpacked(message)

    # An exchange

    def request(self, *, comes: bool = False) -> None:
        """Say that this worker is about to exchange.

        Args:
            comes: Whether it makes no step before it has been brought together with the others.
        """
        assert self._request is None
        self._comes, self.all_begin, self.awaited = comes, False, None
        self._follow()
        for state in self._states.values():
            state.received = None
            if state.prepare is not None:
                state.prepare()
        self._before = self._manager.state_dict()
        self._is_settled = False
        self._request = self._thread.submit(self._manager.start_quorum, timeout=_FOR_EVER)

    @property
    def is_requested(self) -> bool:
        """Whether there is a request that no exchange has been made for."""
        return self._request is not None

    def has_come(self, seconds: float) -> bool:
        """Whether the request has been answered, now or within so many seconds."""
        looks = max(1, math.ceil(seconds / _LOOK))
        if not any(self._all(self._is_answered(seconds / looks)) for _ in range(looks)):
            return False
        assert self._request is not None
        try:
            self._request.result()
        except (RuntimeError, TimeoutError) as error:
            raise ExchangeError(
                f"{self._strategy}: torchft could not find the other workers. Cause: {error}"
            ) from error
        if not self._is_settled:
            self._settle()
        return True

    def _is_answered(self, seconds: float) -> bool:
        assert self._request is not None
        return bool(wait([self._request], timeout=seconds).done)

    def _settle(self) -> None:
        """Take the state that has come, if all ranks have got theirs, else none: they are at one move of the center."""
        self._is_settled = True
        if self._manager.current_step() == 0:
            self._begin()
        self._has_state = self._have_succeeded()
        if not self._has_state:
            self._manager.load_state_dict(self._before)
            return
        if self._all(all(state.received is None for state in self._states.values())):
            return
        for state in self._states.values():
            assert state.received is not None
            (given,) = state.received
            state.load(self._from_first(given) if state.is_common else given)

    def _begin(self) -> None:
        """Before the first exchange of all, unless they have come between two exchanges of one that trains.

        They would begin anew beside it, as many as the lighthouse needs to go on without it.
        """
        own = torch.tensor([self.progress(), self.replica_id, int(self._comes)])
        everyones = own.new_zeros(self.size, len(own))
        self.all_gather(own, everyones)
        reached, numbers, comes = everyones.T.tolist()
        self.all_begin = all(comes)
        if self.all_begin:
            self.awaited = self._who_lives_beside(numbers)
        if self.awaited is not None:
            self._manager.report_error(ExchangeError(f"replica_id={self.awaited} lives, and has not come yet"))
        elif self.size > 1:
            self._begin_together(reached.index(max(reached)))

    def _who_lives_beside(self, numbers: Collection[int]) -> int | None:
        """The number of a living worker that is none of these; the same on all of them, whatever each has heard."""
        own = torch.tensor([self._of_first(lambda: min(self._lighthouse.living_beside(numbers), default=_NOBODY))])
        everyones = own.new_full((self.size, 1), _NOBODY)
        self.all_gather(own, everyones)
        found = self._of_first(lambda: int(everyones.max()))
        return None if found == _NOBODY else found

    def _begin_together(self, furthest: int) -> None:
        """Give the others the state of the one that is furthest.

        Left to torchft it would be another worker's for each coordinate.
        """
        gives = self.rank == furthest
        message = _packed({state.key: state.give() for state in self._states.values()} if gives else None)
        length = torch.tensor([len(message)])
        self._broadcast(length, furthest)
        if not gives:
            message = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(message, furthest)
        if not gives and self._manager.errored() is None:
            given = _unpacked(message)
            for state in self._states.values():
                state.keep(given[state.key])

    def _have_succeeded(self) -> bool:
        """Whether no rank of this worker has had an error; if one has, all of them have one."""
        has_succeeded = self._manager.errored() is None
        if self._all(has_succeeded):
            return True
        if has_succeeded:
            self._manager.report_error(ExchangeError("it has failed on another rank of this worker"))
        return False

    @property
    def behind(self) -> int:
        """How many moves of the center this worker had missed when its last request was answered."""
        return int(self._manager.current_step()) - max(self._before["step"], self._met)

    @property
    def size(self) -> int:
        """p, the number of workers of the request that has been answered."""
        return max(1, int(self._manager.num_participants()))

    @property
    def rank(self) -> int:
        """This worker's place among those p, 0 ≤ rank < p."""
        return int(self._manager.participating_rank() or 0)

    def exchange(self, add_up: Callable[[], None], common: Callable[[], int]) -> None:
        """Start to exchange, and return at once; :meth:`commit` says whether it counts.

        Workers that have each gone on alone, one after the other, are at one step of different centers, which torchft
        does not see. Where what they have in common differs the exchange does not count, and all but the first are as
        if they had never exchanged: with the next request they get its state.

        Args:
            add_up: Calls the operations, the same ones on all workers, in another thread. Those after one that has
                failed do nothing.
            common: Gives a checksum of what all workers must have in common, in the same thread, before the first.
        """
        self._request = None
        self._follow()
        self._under_way = self._thread.submit(self._exchange, add_up, common)

    def _follow(self) -> None:
        """Let what is done in :meth:`_beside` from here on come after what the device's current queue holds now."""
        self._queue.follow()
        self._queue.mark()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """Do what is in the block beside the steps, on the device, too."""
        self._queue.wait()  # no deadline of the exchange runs meanwhile
        with self._queue.beside():
            yield

    def _exchange(self, add_up: Callable[[], None], common: Callable[[], int]) -> bool:
        with self._beside():
            return self._exchange_beside(add_up, common)

    def _exchange_beside(self, add_up: Callable[[], None], common: Callable[[], int]) -> bool:
        problem = self._group.errored()  # of a group that was made before
        if problem is not None:
            self._manager.report_error(problem)
        lateness = self.longest * 2**self._unheard
        self._present = self._all_present(common(), self._timeout + timedelta(seconds=lateness))
        if len({each.replica_id for each in self._present}) < len(self._present):
            self._manager.report_error(ExchangeError("two workers have one replica_id"))
        elif self._differs:
            self._manager.report_error(ExchangeError("the workers' centers differ; they go on from the first one's"))
        add_up()
        self._await_device()
        try:
            # It brings the ranks of this worker together, of which one may have waited for each operation in vain.
            return bool(self._manager.should_commit(timeout=_COMMIT * self._timeout + timedelta(seconds=lateness)))
        except (RuntimeError, TimeoutError) as error:
            raise ExchangeError(
                f"{self._strategy}: the ranks of this worker have not come together after an exchange, within"
                f" {_COMMIT} times FaultTolerance(process_group_timeout={self._timeout.total_seconds():g}). Cause:"
                f" {error}"
            ) from error

    def _await_device(self) -> None:
        """Wait for the device's part of the exchange; one that does not end is ended."""
        self._queue.mark()
        seconds = self._timeout.total_seconds()
        error: Exception | None = TimeoutError(f"it has not ended on the GPU within {seconds:g} s")
        if wait_until(lambda: self._queue.has_come or self._group.errored() is not None, seconds):
            error = self._group.errored()
        if error is None:
            return
        if not self._abort():
            raise ExchangeError(
                f"{self._strategy}: an exchange that has been lost ({error}) does not end on the GPU; start this worker"
                " again, or give FaultTolerance(process_group='gloo')."
            )
        self._manager.report_error(error)

    def _abort(self) -> bool:
        """End what the device does with the others; whether it has ended, in the time of a transfer."""
        aborts = threading.Thread(target=self._group.abort, name="easgd_abort", daemon=True)
        aborts.start()
        return wait_until(lambda: self._queue.has_come and not aborts.is_alive(), self._timeout.total_seconds())

    def _all_present(self, common: int, timeout: timedelta) -> tuple[_Present, ...]:
        """Those that take part, by rank; none if one of them has not been heard."""
        own = torch.tensor([self.replica_id, common, self.behind, math.ceil(1000 * self.pace)])
        others = own.new_zeros(self.size, len(own))
        self._gather(own, others, timeout)
        if self._manager.errored() is not None:
            self._unheard = min(self._unheard + 1, _MOST_UNHEARD)
            return ()
        present = tuple(_Present(*row) for row in others.tolist())
        self._unheard = 0
        self._pace_of_others = max(each.pace for each in present) / 1000
        return present

    @property
    def longest(self) -> float:
        """Seconds of a step of the slowest worker's, as far as this one has heard."""
        return max(self.pace, self._pace_of_others)

    def expect(self, pace: float) -> None:
        """Hear how many seconds a step of the slowest worker's takes, before the first exchange with it."""
        self._pace_of_others = pace

    @property
    def _differs(self) -> bool:
        """Whether the others' center is another one."""
        return len({each.common for each in self._present}) > 1

    @property
    def _is_replaced(self) -> bool:
        """Whether this worker's number was given to another one while this one stood still."""
        twins = [(each.behind, rank) for rank, each in enumerate(self._present) if each.replica_id == self.replica_id]
        return len(twins) > 1 and max(twins)[1] == self.rank

    @property
    def is_of_one_rank(self) -> bool:
        """Whether no other rank of this worker has to do what this one does at the same point."""
        return self._inside.size == 1

    @property
    def has_ended(self) -> bool:
        """Whether the exchange that has been started is known to have ended; never of several ranks."""
        return self.is_of_one_rank and self._under_way is not None and self._under_way.done()

    def all_reduce(self, buffer: Tensor) -> None:
        """Replace a buffer by its sum over the workers, bitwise the same on all."""
        if not buffer.numel():
            return
        self._operate(lambda: self._group.allreduce([buffer], AllreduceOptions()))  # a sum by default

    def all_to_all(self, outgoing: Tensor, incoming: Tensor) -> None:
        """Send row r of ``outgoing`` to worker r, and receive what it sends as row r of ``incoming``."""
        self._operate(lambda: self._group.alltoall_base(incoming, outgoing, [], [], AllToAllOptions()))

    def all_gather(self, message: Tensor, messages: Tensor) -> None:
        """Send ``message`` to all, and receive that of worker r as row r of ``messages``."""
        self._gather(message, messages, self._timeout)

    def _gather(self, message: Tensor, messages: Tensor, timeout: timedelta) -> None:
        options = AllgatherOptions()
        options.timeout = timeout
        self._operate(lambda: self._group.allgather([list(messages)], [message], options))

    def _broadcast(self, buffer: Tensor, rank: int) -> None:
        """Replace a buffer by that of the worker of this rank."""
        options = BroadcastOptions()
        options.rootRank = rank
        self._operate(lambda: self._group.broadcast([buffer], options))

    def _operate(self, begin: Callable[[], Any]) -> None:
        """Wait for an operation, or do nothing after an error, which is kept for the commit."""
        if self._manager.errored() is not None:
            return
        try:
            begin().wait()
        except RuntimeError as error:
            self._manager.report_error(error)

    def commit(self) -> bool:
        """Wait for the exchange that has been started, and hear whether it counts.

        A state that was given away is not needed any more.
        """
        assert self._under_way is not None
        self._counts = self._under_way.result()
        self._under_way = None
        # Agreed on, where one rank may have heard of the others and another one not: who saves is the same on all.
        if self._counts or self._all(bool(self._present)):
            self._note_present()
        if self._counts and self.size > 1:
            self._met = int(self._manager.current_step())
        if not self._counts:
            self.failed += self.awaited is None
            differs = not self._all(not self._differs)  # of several ranks perhaps the slice of one alone
            if differs and self.rank != 0:
                self._manager.load_state_dict({**self._manager.state_dict(), "step": 0})
        return self._counts

    def _note_present(self) -> None:
        if self._is_replaced:
            raise ExchangeError(
                f"{self._strategy}: another worker with replica_id={self.replica_id} takes part, one that was started"
                " while this one stood still, or that was started at the same moment; this one ends."
            )
        self.living = tuple(sorted({each.replica_id for each in self._present}))

    @property
    def has_failed(self) -> bool:
        """Whether the last exchange does not count though there were enough workers for it.

        Or what this worker was behind by has not come.
        """
        return not self._counts and (not self._has_state or self.size >= self._min_replica_size)

    @property
    def problem(self) -> str:
        """Why the last exchange does not count."""
        error = self._manager.errored()
        if error is None:
            return "it has failed on another rank of this worker" if self.has_failed else "too few workers"
        return str(error.original_exception).partition("\n")[0]

    def close(self) -> None:
        """Leave the others, perhaps to :meth:`open` again; they are not waited for."""
        manager, self._manager, self._request = self._manager, None, None
        if manager is not None:
            manager.shutdown(wait=False)
            manager._manager = None  # its connections end with it alone
            self._thread.shutdown()
            if self._kind == "nccl":  # a kernel that waits for them would hold up all that is done on the device
                self._abort()


def _packed(value: Any) -> Tensor:
    """A value as bytes, shape (bytes,), uint8."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(message: Tensor) -> Any:
    """What :func:`_packed` has been given."""
    return pickle.loads(message.numpy().data)
