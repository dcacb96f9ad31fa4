r"""Synchronous EASGD: the center is replicated on all workers and moved by an all-reduce."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.astray import NonFiniteError, begin_anew
from lightning_easgd.averagers.averaged_parameters import AveragedParameters, Names, check_in_common
from lightning_easgd.averagers.averager import Averager
from lightning_easgd.averagers.common_values import differing
from lightning_easgd.averagers.exchange_order import ExchangeLine, Header
from lightning_easgd.averagers.sync.choice import MakeSum
from lightning_easgd.averagers.sync.copies import Copies
from lightning_easgd.averagers.sync.difference_sum import Restored
from lightning_easgd.averagers.sync.finiteness import make_finiteness
from lightning_easgd.averagers.sync.pull import Pull, PullToOld
from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.method.elastic import elastic_difference_, elastic_pull_
from lightning_easgd.method.position import ParameterPosition, Position
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.rules import CenterRule, PlainRule
from lightning_easgd.tensors.flat_tensors import FlatTensors, all_finite, as_parameter, center_dtype
from lightning_easgd.tensors.memory import origins_of
from lightning_easgd.tensors.shards import copies
from lightning_easgd.transport.staging import brought_near

__all__ = ["SynchronousAverager"]


@final
class SynchronousAverager(Averager):
    r"""Elastic averaging of one optimizer's parameters, every τ of its steps.

    .. math::
        x^i_{t+1} &= x^i_t - \eta g^i_t(x^i_t) - \alpha (x^i_t - \tilde x_t) \\
        \tilde x_{t+1} &= \tilde x_t + \tfrac{\beta}{p} \sum_i (x^i_t - \tilde x_t)

    (Zhang, Choromanska, LeCun 2015, eqs 3-6, in Jacobi form: both lines use the values of before the step). The second
    line is the :class:`~lightning_easgd.method.rules.PlainRule`; another rule makes something else of the sum. Around
    each step call :meth:`begin`, which takes the differences :math:`x^i_t - \tilde x_t` and starts their sum, and
    :meth:`finish`, which pulls the worker. The pull needs only the *old* center, which every worker holds, so it
    waits for nothing; the sum has τ steps to arrive and is waited for by the next exchange, or by a reader of the
    center. No staleness comes of it: the numbers are those of a blocking sum. Another :class:`Pull` needs the new
    center: then an exchange begins in :meth:`finish`, after each τ-th step.

    The step t = 0 makes no exchange: worker and center are equal there.

    Args:
        optimizer: The worker's optimizer; its :class:`AveragedParameters` are what is averaged, also those that come
            later.
        line: The exchanges' common order.
        make_sum: Makes what sums up the differences.
        number: This averager's place in the list given to :meth:`ExchangeLine.meet`.
        tau: τ, the communication period in optimizer steps.
        rates: α and β.
        rule: How the sum moves the center.
        pull: How the worker is pulled; for this averager alone.
        position: What the worker exchanges: its parameters, or the point before the look-ahead.
        center_device: Where the center and the differences are; None for where the parameters are.
        ignored: Parameters that stay each worker's own.
        trained: Parameters that have been trained before, frozen now or not.
        names: The module's parameters.

    Attributes:
        clock: t, the optimizer's steps so far.
        center: The center, bitwise the same on all workers. Up to date after :meth:`complete`.
        finiteness: What is known of this worker's differences.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        line: ExchangeLine,
        make_sum: MakeSum,
        *,
        number: int,
        tau: int,
        rates: MovingRates,
        rule: CenterRule | None = None,
        pull: Pull | None = None,
        position: Callable[[Optimizer], Position] = ParameterPosition,
        center_device: str | None = None,
        ignored: Collection[Tensor] = (),
        trained: Collection[Tensor] = (),
        names: Names = dict,
    ) -> None:
        self.center: ReplicatedCenter
        self._rule = rule or PlainRule()
        self._center_device = center_device
        self._optimizer = optimizer
        self._averaged = AveragedParameters(optimizer, ignored, trained, names)
        self._line = line
        everyones = differing(self._averaged.described, line.control)
        if everyones is not None:
            check_in_common(everyones, line.control.rank, line.strategy)
        self._number = number
        self._tau = tau
        self._rates = rates
        self._position = position(optimizer)
        self._header: Header | None = None  # of the exchange under way, unless this worker only joined it
        self._in_flight = False
        self._pull = pull or PullToOld()
        self._version = 0  # of the center before the exchange under way
        self._begun_at = 0  # the clock of the last exchange: a step may be tried again, its exchange not
        self._alphas: Sequence[float] = ()  # of the last pull
        self._distance: list[Tensor] = []  # norms of the last difference's groups
        self.clock = 0
        self._lay_out([])
        self._sum = make_sum(self.center)
        self.finiteness = make_finiteness(self.center.flat)

    @property
    @override
    def parameters(self) -> list[Tensor]:
        return self._averaged.flat

    @override
    @torch.no_grad()
    def begin(self) -> None:
        """Before an optimizer step, at the point where its gradient is taken: begin an exchange if one is due.

        Raises:
            ExchangeError: If the exchange before this one was never completed by all workers.
            NonFiniteError: If this worker's difference is not finite, and the run cannot go on with it.
        """
        self._averaged.watch()
        if not self._pull.follows_step:
            self._exchange_if_due()

    def _exchange_if_due(self) -> None:
        if self.clock == self._begun_at:
            return
        if not self._sum.is_due(self.clock, self._tau):
            if self.clock % self._tau == 0:  # the other workers have not come; the ranks of this one may have to stop
                self._line.hear_stop()
            return
        self._catch_up()
        self.complete()
        self._take_restored()
        if self._line.agree():  # nobody begins another exchange
            return
        self._begun_at = self.clock
        rates = self._rates_now()
        if self._averaged.have_changed:
            agreement = *self._averaged.changed, self._rates.common(rates), repr(self._rule)
            finite = self.is_finite()
            self._line.accept(self._line.announce(self._number, agreement, finite), self.clock)
            self._extend()
            finite = self._take_difference() and finite
        else:
            finite = self._take_difference()
            agreement = self._digest, 0, self._rates.common(rates), repr(self._rule)
            self._header = self._line.announce(self._number, agreement, finite)
        if not finite:
            self._start_again()
        self._start(rates)

    @torch.no_grad()
    def finish(self) -> None:
        """After an optimizer step: count it, and pull the worker by the exchange that is due.

        Raises:
            ExchangeError: As for :meth:`begin`, where the exchange begins here.
            NonFiniteError: As for :meth:`begin`.
        """
        self.clock += 1
        if self._pull.is_due(self.clock):
            self._pull_worker()
        self._sum.advance()
        self._sum.look_ahead(self.clock, self.complete)
        if self._pull.follows_step:
            self._exchange_if_due()
            if self._pull.is_due(self.clock):
                self._pull_worker()

    @torch.no_grad()
    def join(self) -> None:
        """Take part in an exchange that other workers announced, without a step of this worker's own."""
        self._catch_up()
        self._take_restored()
        finite = self.is_finite()
        if self._averaged.have_changed:
            self._extend()
        if not (self._take_difference() and finite):
            self._start_again()
        self._start(self._rates_now())
        self._pull_worker()
        self.complete()

    @property
    def is_expected(self) -> bool:
        """Whether other workers, which come and go, wait for this one's part in an exchange."""
        return self._sum.is_expected()

    @torch.no_grad()
    def enter(self) -> None:
        """Before the first step: come to workers that may be training already, and start at their center.

        Raises:
            ExchangeError: If they cannot be come to.
        """
        restored = None
        # Others whose center has not arrived may be ahead: this worker's first point would be far from it.
        while self._sum.enter(self.clock):
            restored = self._take_restored()
            if restored is not None:
                self.clock = restored.clock
            self._sum.make_room()
            self._sum.wire.flat.zero_()
            self._sum.start(self._shares(self._rates_now()))
            self._sum.finish()
            self._copies.join()
            if restored is not None or not self._sum.must_enter_again:
                break
        if restored is not None:
            self.start_at_center()

    @torch.no_grad()
    def complete(self) -> None:
        """Wait for the exchange under way, if any, and move the center.

        Raises:
            ExchangeError: If a worker is lost, or the workers' exchanges do not match.
        """
        if not self._in_flight:
            return
        while self._line.under_way[0] is not self:
            self._line.under_way[0].complete()
        self._pull.keep()
        started = time.monotonic()
        if self._header is not None:
            self._line.accept(self._header, self._begun_at)
            self._header = None
        self._sum.finish()
        self._in_flight = False
        self._line.under_way.remove(self)
        if self._sum.is_lost:
            self._revoke()
        elif self.center.version != self._version + 1:
            raise RuntimeError(
                f"{self._line.strategy}: {type(self._sum).__name__} has made an exchange, and the center's version has"
                f" gone from {self._version} to {self.center.version}; call center.end_exchange() once after all of its"
                " parts have been moved."
            )
        else:
            self._copies.join()
        self._line.statistics.seconds_waited += time.monotonic() - started

    @property
    @override
    def has_departed(self) -> bool:
        return self._averaged.have_changed and bool(self._averaged.departed)

    @override
    def follow(self, optimizer: Optimizer) -> None:
        self._optimizer = self._averaged.optimizer = optimizer
        self._position.follow(optimizer)

    @override
    def is_finite(self) -> bool:
        finite = self.finiteness.known() and all_finite(self.parameters) and self._position.is_finite()
        return self._line.worker.is_finite(finite)

    def center_checksum(self) -> int:
        """A checksum of the center, which is the same on all workers when no exchange is under way."""
        return self.center.checksum()

    @override
    def settle(self) -> None:
        self.complete()

    @override
    def center_values(self) -> list[Tensor]:
        pairs = zip(self.center.shown.views, self.parameters, strict=True)
        return [as_parameter(value, parameter) for value, parameter in pairs]

    @override
    def elastic_distance(self) -> float | None:
        if not self._distance:
            return None
        return self._line.worker.norm(float(torch.linalg.vector_norm(torch.stack(self._distance))))

    @override
    def state_dict(self) -> dict[str, Any]:
        position = self._position.state_dict(self.parameters)
        return {
            "clock": self.clock, "position": position, "sum": self._sum.state_dict(), "pull": self._pull.state_dict()
        }  # fmt: skip

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock = state["clock"]
        self._position.load_state_dict(state["position"], self.parameters)
        self._sum.load_state_dict(state.get("sum", {}))  # a checkpoint of version 0.1.0 has none
        self._pull.load_state_dict(state.get("pull", {}), self.center.values)

    @torch.no_grad()
    @override
    def start_at_center(self) -> None:
        self.complete()  # on a rank of a larger worker a part of the center may have moved already
        self.finiteness.forget()
        self._pull.forget()
        self.center.values.store(self.parameters)

    @torch.no_grad()
    @override
    def show_center(self) -> None:
        # An idle wire has the layout and is no narrower than the parameters: it holds them exactly. It is in use only
        # when an error cut an exchange short.
        self._kept = self._sum.wire if self._sum.has_room and not self._in_flight else self.center.values.like()
        self._kept.load_(self.parameters)
        self.center.shown.store(self.parameters)

    @torch.no_grad()
    @override
    def show_worker(self) -> None:
        self._kept.store(self.parameters)

    def start_again(self) -> None:
        """Start again at the center, with no exchange under way."""
        self.start_at_center()
        self._line.on_astray.reset(self._optimizer, self._line.control.rank, self.clock)

    def close(self) -> None:
        """Give back what the sum holds."""
        self._position.close()
        self._sum.close()

    def _take_difference(self) -> bool:
        """Write x - x̃ into the wire; False if this worker is known to have gone astray."""
        started = time.monotonic()
        self._sum.make_room()
        self._line.statistics.seconds_waited += time.monotonic() - started
        wire = self._sum.wire
        self._position.write(wire, self.parameters)
        elastic_difference_([wire.flat], [self.center.flat])
        self._distance = self._norms()
        finite = self._line.worker.is_finite(self.finiteness.judge(wire.flat, self._distance))
        if not finite:
            self.check_center()
        return finite

    def check_center(self) -> None:
        """Raise if the center, which is the same on all workers, is not finite; all ranks of a worker ask together.

        Raises:
            NonFiniteError: If it is not.
        """
        self._line.on_astray.check_center(self._line.worker.is_finite(all_finite([self.center.flat])))

    def _norms(self) -> list[Tensor]:
        """Norms of the difference's parts: together, over a sharded worker's ranks, that of the worker's difference."""
        ranks = self._line.worker.inside.size
        held = [copies(p, ranks) for p in self.parameters] if self._line.worker.is_sharded else []
        if not any(number > 1 for number in held):
            return self._sum.norms()
        norms = torch._foreach_norm(self._sum.wire.views)
        return [norm / math.sqrt(number) for norm, number in zip(norms, held, strict=True)]

    def _start_again(self) -> None:
        """Let a worker that has gone astray start again at the center; its difference counts as zero.

        Raises:
            NonFiniteError: If the run ends instead; all workers have heard of it then.
        """
        if self._header is not None:
            header, self._header = self._header, None
            self._line.accept(header, self.clock)
        self._sum.wire.flat.zero_()
        self.start_again()

    def _start(self, rates: list[tuple[float, float]]) -> None:
        wire = self._sum.wire
        alphas = [alpha for alpha, _ in rates]
        if self._rates.are_each_workers_own:  # workers may have different α: each one's own counts, on both sides
            for segment, alpha in zip(wire.segments, alphas, strict=True):
                segment.mul_(alpha)
            factors = [1.0] * len(rates)
        else:
            factors = alphas
        self._in_flight = self.has_exchanged = True
        self._version = self.center.version
        self._line.under_way.append(self)
        self._line.count(self._sum.nbytes, self._header)
        self._sum.start(self._shares(rates))
        self._pull.begin(
            self._sum, factors, lambda into: self._position.write(into, self.parameters), alphas, self.clock
        )

    def _catch_up(self) -> None:
        """Make the pull of an exchange that another follows before it is due: of others, or after a longer delay."""
        if self._pull.is_pending:
            self._pull_worker()

    @property
    def _workers(self) -> int:
        return self._sum.workers or self._line.worker.workers

    def _rates_now(self) -> list[tuple[float, float]]:
        return self._rates.of_groups(self._optimizer, self._workers, self.clock)

    def _shares(self, rates: list[tuple[float, float]]) -> list[float]:
        if self._rates.are_each_workers_own:
            return [1.0] * len(rates)
        return [beta / self._workers for _, beta in rates]

    def _pull_worker(self) -> None:
        if self._pull.waits_for_center:
            self.complete()
            if not self._pull.is_pending:  # the exchange is lost
                return
        groups, self._alphas = self._pull.take()
        self._pull_by(groups, self._alphas)

    def _pull_by(self, groups: Sequence[Sequence[Tensor]], alphas: Sequence[float]) -> None:
        for parameters, differences, alpha in zip(self._averaged.real, groups, alphas, strict=True):
            for near, of_near in brought_near(parameters, differences):
                elastic_pull_(near, of_near, alpha)

    def _revoke(self) -> None:
        """Take back the worker's part of an exchange that is lost: what was not added to the center stays here."""
        if self._pull.is_pending:
            self._pull.forget()
        elif not self._pull.waits_for_center:
            self._pull_by(self._sum.given, [-alpha for alpha in self._alphas])

    def _take_restored(self) -> Restored | None:
        restored = self._sum.take_restored()
        if restored is not None:
            self.has_exchanged = True
            if restored.restarts:
                self.start_at_center()
                begin_anew(self._optimizer)
        return restored

    def _extend(self) -> None:
        """Take in what has become of the optimizer's parameters; all workers do it at the same exchange."""
        self.complete()
        before = self.parameters
        self._averaged.take_in()
        origins = self._lay_out(before)
        self._sum = self._sum.renewed(self.center, origins)

    @torch.no_grad()
    def _lay_out(self, known: Sequence[Tensor]) -> list[int | None]:
        """Make the center anew: it stays for known parameters, and begins for the others where rank 0 has them.

        A parameter is known, too, that takes the part of another one of its memory.

        Returns:
            For each parameter its place among the known ones; None for another.
        """
        parameters = self.parameters
        self._digest = self._averaged.digest
        origins = origins_of(parameters, known)
        values = FlatTensors(self._averaged.real, center_dtype(parameters), self._center_device)
        values.load_([self._averaged.entered_with(parameter) for parameter in parameters])
        self._take_from_first_worker([v for v, origin in zip(values.views, origins, strict=True) if origin is None])
        center = ReplicatedCenter(values, self._rule)
        if known:
            center.take_over(self.center, origins)
        self.center = center
        self._copies = Copies(parameters, center, self._line.worker)
        return origins

    def _take_from_first_worker(self, values: list[Tensor]) -> None:
        if not values:
            return
        flat = torch.cat([value.flatten() for value in values]).cpu()
        self._line.worker.from_first_worker(flat)
        if not all_finite([flat]):
            raise NonFiniteError(
                f"{self._line.strategy}: the optimizer has parameters that are not finite on rank 0, where their center"
                " would begin."
            )
        for value, part in zip(values, torch.split(flat, [value.numel() for value in values]), strict=True):
            value.copy_(part.view(value.shape))
