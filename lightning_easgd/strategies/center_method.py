"""What the methods with a center have in common, under a Trainer and under Fabric."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from torch.optim import Optimizer

from lightning_easgd.averagers import (
    AstrayPolicy,
    Averager,
    Averaging,
    ContinueOnLoss,
    FailIfAstray,
    FailOnLoss,
    LossPolicy,
    ProcessGroupChannel,
    ResetIfAstray,
    ServedAverager,
    ServedAveraging,
    Statistics,
    free_order,
    round_robin,
)
from lightning_easgd.method.compression import WireDtype
from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.worker_process import WorkerProcess

__all__ = ["CenterMethod", "OnNonFinite", "OnWorkerLoss", "Order", "check_optimizer", "check_period"]

Order = Literal["free", "round_robin"]
OnWorkerLoss = Literal["fail", "continue"]
OnNonFinite = Literal["fail", "reset"]

_ORDERS = {"free": free_order, "round_robin": round_robin}
_POLICIES: dict[str, Callable[[str], LossPolicy]] = {"fail": FailOnLoss, "continue": ContinueOnLoss}


class CenterMethod(WorkerProcess):
    """A method with a center: its choices, and what users read of the averaging."""

    _alike: tuple[str, ...] = ("devices_per_worker", "order", "on_worker_loss", "on_nonfinite", "worker_state")
    _ddp_arguments_with_effect = frozenset({"broadcast_buffers", "forward_sync_buffers"})

    _session: CenterSession | None  # from setup, with Fabric from the first step, to the end
    _final_center: dict[str, Tensor] | None
    _statistics: Statistics
    _launched: Statistics | None = None  # what rank 0 of the ranks that this process spawned or forked has said

    def __init__(
        self,
        *arguments: Any,
        order: str = "free",
        on_worker_loss: str = "fail",
        on_nonfinite: str = "fail",
        **keywords: Any,
    ) -> None:
        super().__init__(*arguments, **keywords)
        name = type(self).__name__
        if order not in [*_ORDERS]:  # what cannot be hashed, too
            raise ValueError(f"{name}(order={order!r}): unknown order; use 'free' or 'round_robin'.")
        if on_worker_loss not in [*_POLICIES]:
            raise ValueError(f"{name}(on_worker_loss={on_worker_loss!r}): unknown; use 'fail' or 'continue'.")
        if on_nonfinite not in ("fail", "reset"):
            raise ValueError(f"{name}(on_nonfinite={on_nonfinite!r}): unknown; use 'fail' or 'reset'.")
        self.order = order
        self.on_nonfinite = on_nonfinite
        self.on_worker_loss = on_worker_loss

    # What users read

    @property
    def center(self) -> Mapping[str, Tensor]:
        """The center as it is now: read-only, parameter name → tensor of the parameter's shape.

        The tensors are float32 (float64 for double parameters). Reading waits for the exchange under way, for which all
        ranks of a worker read together; the next one may change the tensors. After ``fit``, with Fabric after
        ``finalize``, it is the final center. With several modules of Fabric's the names begin with a module's place in
        the order of their setup, as in ``"0.weight"``.

        Raises:
            RuntimeError: If training has not started in this process.
        """
        if self._session is not None and self._session.is_started:
            return self._session.settled_center()
        if self._final_center is None:
            raise RuntimeError(
                f"{type(self).__name__}.center: there is no center before the first optimizer step, nor in the process"
                " that only spawned the ranks; there, read the module's parameters after fit: they are the center."
            )
        return MappingProxyType(self._final_center)

    @property
    def communication(self) -> Statistics:
        """What this rank has spent on communication in the latest fit.

        In the process that only spawned or forked the ranks it is what rank 0 has spent.

        Raises:
            RuntimeError: If this process only spawns or forks the ranks, and they have not ended a fit.
        """
        if not self.only_launches:
            return self._statistics
        if self._launched is None:
            raise RuntimeError(
                f"{type(self).__name__}.communication: the ranks spend it, and this process only spawns or forks them;"
                " after Trainer.fit it is there, with Fabric return it from the launched function."
            )
        return self._launched

    def elastic_distance(self) -> float | None:
        r"""The distance :math:`\|x^i - \tilde x\|_2` of this worker at its last exchange, None before the first.

        It makes no communication and waits for none, except inside of a sharded worker, whose ranks ask together. With
        a served center and ``pull_to="new"`` it is the distance from the center of after the exchange.

        Raises:
            RuntimeError: If this process only spawns or forks the ranks.
        """
        if self.only_launches:
            raise RuntimeError(
                f"{type(self).__name__}.elastic_distance(): there is no worker in the process that only spawns or forks"
                " the ranks; read it in a callback."
            )
        return None if self._session is None else self._session.elastic_distance()

    def take_launched(self, statistics: Statistics | None) -> None:
        """Keep what rank 0 has spent, or forget it before ranks are launched for a fit."""
        self._launched = statistics

    # What the methods use

    @property
    def _averaging(self) -> Averaging | None:
        return None if self._session is None else self._session.averaging

    @property
    def _averagers(self) -> list[Averager]:
        return [] if self._session is None else self._session.averagers

    def _served_averaging(
        self, exchange: ServedExchange, averager: Callable[..., ServedAverager], wire_dtype: WireDtype | None = None
    ) -> Averaging:
        assert self._timeout is not None
        name = type(self).__name__
        return ServedAveraging(
            ProcessGroupChannel("gloo", self._timeout, name),
            _get_default_store(),
            node=self.node_rank,
            timeout=self._timeout,
            exchange=exchange,
            make_averager=averager,
            make_turns=_ORDERS[self.order],
            on_loss=_POLICIES[self.on_worker_loss](name),
            on_astray=self._astray_policy(),
            strategy=name,
            synchronous=self.synchronous,
            wire_dtype=wire_dtype,
        )

    def _astray_policy(self) -> AstrayPolicy:
        name = type(self).__name__
        return FailIfAstray(name) if self.on_nonfinite == "fail" else ResetIfAstray(name, self._mend_worker)

    def _mend_worker(self) -> None:
        if self._session is not None:
            self._session.mend()


def check_optimizer(strategy: str, optimizer: Optimizer) -> None:
    """Refuse an optimizer that no worker can have.

    Raises:
        TypeError: If it shards its state over the ranks.
    """
    if hasattr(optimizer, "consolidate_state_dict"):
        raise TypeError(
            f"{strategy}: {type(optimizer).__name__} shards its state over ranks that have the same parameters, and"
            " workers do not; use the optimizer that it wraps."
        )


def check_period(strategy: str, tau: object) -> None:
    """Raise unless τ is an int of at least 1."""
    if not isinstance(tau, int) or isinstance(tau, bool):
        raise TypeError(
            f"{strategy}(tau={tau!r}): the communication period is a number of optimizer steps; give an int."
        )
    if tau < 1:
        raise ValueError(
            f"{strategy}(tau={tau}): the communication period is at least 1 optimizer step; give 1 to exchange at every"
            " step, or more steps than training makes for no exchange."
        )
