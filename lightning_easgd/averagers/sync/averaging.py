"""Synchronous EASGD of a fit: an averager for each optimizer, all on one line of exchanges."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.astray import AstrayPolicy, FailIfAstray
from lightning_easgd.averagers.averaged_parameters import Names
from lightning_easgd.averagers.averager import Averaging, follow, versions_for
from lightning_easgd.averagers.exchange_order import READ_AT, ExchangeLine, Header, Meeting
from lightning_easgd.averagers.sync.averager import SynchronousAverager
from lightning_easgd.averagers.sync.choice import MakeSum
from lightning_easgd.averagers.sync.pull import Pull, PullToOld
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.method.position import ParameterPosition, Position
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.rules import CenterRule, PlainRule
from lightning_easgd.tensors.flat_tensors import as_real
from lightning_easgd.transport.channel import Channel

__all__ = ["SynchronousAveraging"]


@final
class SynchronousAveraging(Averaging):
    """Synchronous EASGD of all optimizers of a fit, on one line of exchanges.

    Args:
        control: The channel of the headers, of all ranks.
        make_sum: Makes what sums up the differences.
        tau: τ, the communication period of each optimizer, in its own steps.
        rates: α and β.
        rule: How the sum of the differences moves the center.
        make_pull: Makes what pulls the worker; for each optimizer its own.
        position: What the workers exchange.
        center_device: Where the center and the differences are; None for where the parameters are.
        on_astray: What a worker whose difference is not finite means to the run.
        worker: This worker's ranks; None where each rank is a worker.
        strategy: Name of the strategy, for errors.
    """

    def __init__(
        self,
        control: Channel,
        make_sum: MakeSum,
        *,
        tau: int,
        rates: MovingRates,
        rule: CenterRule | None = None,
        make_pull: Callable[[], Pull] = PullToOld,
        position: Callable[[Optimizer], Position] = ParameterPosition,
        center_device: str | None = None,
        on_astray: AstrayPolicy | None = None,
        worker: WorkerRanks | None = None,
        strategy: str = "EASGDStrategy",
    ) -> None:
        self.strategy = strategy
        self.worker = worker or WorkerRanks.one(control)
        self._center_device = center_device
        self.control = control
        self.on_astray = on_astray or FailIfAstray(strategy)
        self._line = ExchangeLine(control, strategy, self.worker, on_astray=self.on_astray)
        self._make_sum = make_sum
        self.statistics = self._line.statistics
        self._tau = tau
        self._rates = rates
        self._rule = rule or PlainRule()
        self._make_pull = make_pull
        self._position = position
        self._synchronous: dict[Optimizer, SynchronousAverager] = {}

    @property
    @override
    def waits_for_all(self) -> bool:
        return True

    @override
    def start(
        self,
        optimizers: Sequence[Optimizer],
        ignored: Collection[Tensor] = (),
        trained: Collection[Tensor] = (),
        names: Names = dict,
    ) -> None:
        for averager in self._synchronous.values():  # of the learning rate finder's fit
            averager.close()
        self.averagers = self._synchronous = {}
        for number, optimizer in enumerate(optimizers):
            self._synchronous[optimizer] = SynchronousAverager(
                optimizer,
                self._line,
                self._make_sum,
                number=number,
                tau=self._tau,
                rates=self._rates,
                rule=self._rule,
                pull=self._make_pull(),
                position=self._position,
                center_device=self._center_device,
                ignored=ignored,
                trained=trained,
                names=names,
            )

    @override
    def enter(self) -> None:
        for averager in self._synchronous.values():
            averager.enter()

    @override
    def follow(self, optimizers: Sequence[Optimizer]) -> None:
        self._synchronous = follow(self._synchronous, optimizers, self.strategy)
        self.averagers = self._synchronous

    @override
    def center_state_dict(self) -> dict[str, Any]:
        states = [each.center.state_dict() for each in self._synchronous.values()]
        stores = [list(each) for each in zip(*(state["stores"] for state in states), strict=True)]
        return {"stores": stores, **({"versions": [s["version"] for s in states]} if self._rule.has_memory else {})}

    @property
    @override
    def is_in_parameters(self) -> bool:
        averagers = self._synchronous.values()
        wide = all(each.center.flat.dtype == as_real(p).dtype for each in averagers for p in each.parameters)
        return wide and not self._rule.has_memory

    @override
    def load_center_state_dict(self, state: dict[str, Any]) -> None:
        versions = versions_for(state, len(self._synchronous))
        for number, averager in enumerate(self._synchronous.values()):
            stores = [store[number] for store in state["stores"]]
            averager.center.load_state_dict({"stores": stores, "version": versions[number]})

    @override
    def meet(self, meeting: Meeting) -> None:
        averagers = list(self._synchronous.values())
        if meeting in READ_AT:  # a stop that may be long
            for averager in averagers:
                averager.complete()
                if averager.is_expected:
                    averager.join()
        self._line.meet(meeting, averagers)
        if meeting in READ_AT:
            for averager in averagers:
                averager.check_center()
        if any(averager.finiteness.learns_late for averager in averagers):
            self._hear_of_last(averagers)

    def _hear_of_last(self, averagers: Sequence[SynchronousAverager]) -> None:
        """Hear of differences that were not finite, and that no exchange after theirs has told of."""
        astray = [each for each in averagers if not self.worker.is_finite(each.finiteness.known())]
        header = Header(self.control, finite=not astray, strategy=self.strategy)
        header.wait()
        if header.astray is not None:
            self.on_astray.hear(header.astray, max(averager.clock for averager in averagers))
        for averager in astray:
            averager.start_again()

    @override
    def request_stop(self) -> None:
        self._line.stop_requested = True

    @property
    @override
    def stop_agreed(self) -> bool:
        return self._line.stop_agreed

    @override
    def close(self) -> None:
        for averager in self._synchronous.values():
            averager.close()
        for channel in dict.fromkeys((self.worker.across, self.worker.inside, self.control)):
            channel.close()
