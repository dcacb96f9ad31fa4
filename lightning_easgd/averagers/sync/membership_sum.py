"""The sum over the workers that are alive, of which some may be lost in the middle of it, or come later."""

import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, final

from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.addition import ExactAddition, MakeAddition
from lightning_easgd.averagers.sync.difference_sum import DifferenceSum, Restored
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.transport.channel import ExchangeError
from lightning_easgd.transport.membership import Membership

__all__ = ["MembershipSum"]

_ATTEMPTS = 10  # to come to the others
_AHEAD = 0.1  # seconds before an exchange is due in which it may be asked for, if that is more than a step
_PAUSE = 0.2  # seconds between two looks at whether one that lives has come


@final
class MembershipSum(DifferenceSum):
    r"""A sum of those that are there: p is their number, and the center moves only where all of them have added up.

    Who takes part is asked before an exchange is due, beside the steps: one step before, and where steps are short as
    many as take a tenth of a second, τ / 2 at most, so that workers which are not quite abreast need not wait for each
    other. Where the answer is not there when it is due, the worker stands still for it, for ``patience`` seconds at
    most; then it trains on, and makes the exchange before the first step at which the answer is there. The sum runs in
    a thread beside the steps. If it is lost, with a worker that dies in it, the worker's own pull is taken back:
    neither side has moved, and nothing has been lost.

    A worker that was away gets the stores of the center, and their version, from another one: 4 bytes a parameter
    for the plain rule. Where workers have come together anew, all of them have the same center.

    The memory beside the center is the wire, and what the addition needs.

    Args:
        center: As for :class:`DifferenceSum`.
        members: The workers; the sum opens and closes them.
        tau: τ.
        patience: Seconds.
        timeout: Seconds for which a worker that comes waits for the others.
        restart_after_missed: How many moves of the center a worker may miss before it starts again there; None for any
            number.
        in_common: What all workers must be told alike, as a user gives it, by name.
        make_addition: Makes what adds up the differences of those that are there.
        judge: Is told p wherever there are more workers than before.
        strategy: Name of the strategy, for errors.
    """

    def __init__(
        self,
        center: ReplicatedCenter,
        members: Membership,
        tau: int,
        *,
        patience: float,
        timeout: float,
        restart_after_missed: int | None = None,
        in_common: Mapping[str, str] = MappingProxyType({}),
        make_addition: MakeAddition = ExactAddition,
        judge: Callable[[int], object] = bool,
        strategy: str = "EASGDStrategy",
    ) -> None:
        super().__init__(center, center.values.like())
        self._members = members
        self._addition = make_addition(center, self.wire, members)
        self._tau = tau
        self._patience, self._timeout = patience, timeout
        self._restart_after_missed = restart_after_missed
        self._strategy = strategy
        self._judge = judge
        self._most = 1  # workers of an exchange so far
        self._in_common = {
            **in_common,
            "rule": f"{strategy}(center_rule={center.rule})",
            "wire_dtype": f"{strategy}(wire_dtype={self._addition.wire_dtype!r})",
            "dtype": f"{strategy}(fault_tolerance=...) with a center of {center.flat.dtype}",
        }
        self._clock = self._entered = 0
        self._due_at = 0  # where the last exchange is or was due that has been asked for
        self._last_step = time.monotonic()
        self._pace = 0.0  # seconds of a step, unless there was a stop before it
        self._left = 0.0  # of the patience for the request that has been made
        self._is_under_way = False
        self._deadline = 0.0  # for a worker that lives, and that this one is to come to
        self._begun_as = uuid.uuid4().hex  # goes to all that come: who has another one has begun anew beside them
        self._is_in = False  # once it has entered
        self._received: dict[str, Any] | None = None
        self._received_clock = self._received_due_at = 0
        members.add_state("center", self._state, self._receive)
        members.add_state("clock", self._clocks, self._receive_clock, is_common=True)
        members.progress = lambda: self._clock
        members.open()

    @override
    def renewed(self, center: ReplicatedCenter, origins: Sequence[int | None]) -> "MembershipSum":
        raise RuntimeError(
            f"{self._strategy}(fault_tolerance=...): the optimizer's parameters have changed in training, and workers"
            " that come and go do not change theirs together. Give it all parameters at the start, unfrozen."
        )

    @property
    @override
    def given(self) -> list[list[Tensor]]:
        return self._addition.given

    @property
    @override
    def nbytes(self) -> int:
        return self._addition.nbytes

    @property
    @override
    def workers(self) -> int:
        return self._members.size

    # Before an exchange

    @override
    def look_ahead(self, clock: int, complete: Callable[[], None]) -> None:
        self._clock = clock
        now = time.monotonic()
        last_step, self._last_step = now - self._last_step, now
        self._members.pace, self._pace = min(self._pace, last_step), last_step
        reached = max(clock, self._due_at)  # an exchange that others had asked for counts as made
        next_due_at = reached + self._tau - reached % self._tau
        steps = next_due_at - clock
        if self._is_under_way and (steps == 1 or self._members.has_ended):
            complete()
        if self._is_under_way or self._members.is_requested:
            return
        # Ranks of one worker ask at the same step, and the time is each one's own.
        if steps == 1 or (self._members.is_of_one_rank and steps <= self._tau // 2 and steps * last_step <= _AHEAD):
            self._due_at = next_due_at
            self._left = self._patience
            self._members.request()

    @override
    def is_due(self, clock: int, tau: int) -> bool:
        self._clock = clock
        self._is_in = True
        if not self._members.is_requested or clock < self._due_at:
            return False
        return self._have_come()

    @override
    def is_expected(self) -> bool:
        return self._members.is_requested and self._have_come()

    def _have_come(self) -> bool:
        seconds, self._left = self._left, 0.0
        if self._members.has_come(seconds):
            return True
        self._members.missed += bool(seconds)
        return False

    @override
    def enter(self, clock: int) -> bool:
        self._clock = clock
        self._count_attempt()
        if self._entered > _ATTEMPTS:
            raise ExchangeError(
                f"{self._strategy}(fault_tolerance=...): the other workers are there, but {_ATTEMPTS} exchanges with"
                f" them have come to nothing ({self._members.problem}); give FaultTolerance a longer"
                " process_group_timeout."
            )
        self._members.request(comes=True)
        if not self._members.has_come(self._timeout):
            raise ExchangeError(
                f"{self._strategy}(timeout={self._timeout:.0f} s): the lighthouse has not brought this worker together"
                " with the others; look whether one of them stands still, and whether torchft_lighthouse waits for"
                " more workers (--min_replicas)."
            )
        if self._received is not None:
            self._due_at = self._received_due_at  # with the others
            self._addition.forget()  # of a checkpoint: the others have gone on without it
            if self._received_clock < clock:
                warnings.warn(
                    f"{self._strategy}(fault_tolerance=...): this worker was at step {clock}, and goes on at the"
                    f" others', {self._received_clock}; where all are started again, let the one whose checkpoint is"
                    " the furthest come first, or give all of them one folder.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return True

    def _count_attempt(self) -> None:
        """Count an attempt to come to the others, unless one of them has only not been there."""
        if self._members.awaited is None:
            self._entered += 1
            self._deadline = time.monotonic() + self._timeout
        elif time.monotonic() > self._deadline:
            raise ExchangeError(
                f"{self._strategy}(timeout={self._timeout:.0f} s): the worker with replica_id={self._members.awaited}"
                " lives, and has made no exchange that this one could begin with; look whether it stands still."
            )
        else:
            time.sleep(_PAUSE)

    @property
    @override
    def must_enter_again(self) -> bool:
        return self._members.has_failed

    # What one who is behind gets

    def _state(self) -> dict[str, Any]:
        state = self.center.state_dict()
        stores = [_alone_on_host(store) for store in state["stores"]]
        return {**state, "stores": stores, "in_common": self._in_common, "begun_as": self._begun_as}

    def _receive(self, state: dict[str, Any]) -> None:
        self._received = state

    def _clocks(self) -> tuple[int, int, float]:
        return self._clock, self._due_at, self._members.longest

    def _receive_clock(self, clocks: tuple[int, int, float]) -> None:
        self._received_clock, self._received_due_at, pace = clocks
        self._members.expect(pace)

    @override
    def take_restored(self) -> Restored | None:
        state, self._received = self._received, None
        if state is None:
            return None
        for name, given in state["in_common"].items():
            if given != self._in_common.get(name):
                raise ExchangeError(f"{self._in_common.get(name)}: the other workers have {given}; give all the same.")
        theirs, ours = ([tuple(store.shape) for store in each["stores"]] for each in (state, self.center.state_dict()))
        if theirs != ours:
            raise ExchangeError(
                f"{self._strategy}: the other workers average vectors of {theirs} elements and this one of {ours};"
                " give all workers the same model, optimizer and rule of the center."
            )
        missed = self._members.behind
        self.center.load_state_dict(state)
        restarts = self._restart_after_missed is not None and missed >= self._restart_after_missed
        if self._has_begun_beside(state["begun_as"]):
            restarts = True
            self._addition.forget()  # of a center that is no more
        return Restored(self._received_clock, restarts)

    def _has_begun_beside(self, begun_as: str) -> bool:
        """Whether this worker has trained, and none of it is in the center that it has got."""
        is_beside, self._begun_as = self._is_in and begun_as != self._begun_as, begun_as
        if is_beside:
            warnings.warn(
                f"{self._strategy}(fault_tolerance=...): this worker has begun anew where the others could not be"
                f" reached, and starts again at their center; they are at step {self._received_clock}, and its learning"
                " rate and epochs are those of its own steps. Start it once more to have it go on at theirs.",
                RuntimeWarning,
                stacklevel=2,
            )
        return is_beside

    # An exchange

    @override
    def start(self, shares: Sequence[float]) -> None:
        if self.workers > self._most:
            self._most = self.workers
            self._judge(self._most)
        self._addition.start(shares)
        self.is_lost = False
        self._is_under_way = True
        self._members.exchange(self._addition.add_up, self.center.sum_of_bits)

    @override
    def advance(self) -> None:
        pass

    @override
    def finish(self) -> None:
        self._is_under_way = False
        self.is_lost = not self._members.commit()
        if self._members.awaited is not None:
            return
        if self.is_lost:
            warnings.warn(
                f"{self._strategy}: an exchange has come to nothing ({self._members.problem}); worker and center are"
                " as if it had not been begun, and training goes on.",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        if not self._members.all_begin:  # nobody has given anything, and a rule with a memory would move by that alone
            self._addition.move()
            self.center.end_exchange()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._addition.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._addition.load_state_dict(state)

    @override
    def close(self) -> None:
        self._members.close()


def _alone_on_host(store: Tensor) -> Tensor:
    """A tensor that can be sent; a view would take all of its memory along."""
    store = store.cpu()
    return store.clone() if store.untyped_storage().nbytes() > store.nbytes else store
