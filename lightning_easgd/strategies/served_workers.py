"""Workers that may have a served center: what EASGD and DOWNPOUR share, in every class tree."""

from collections.abc import Callable
from typing import Any, Literal

from torch.distributed.distributed_c10d import _get_default_store
from torch.optim import Optimizer

from lightning_easgd.averagers import (
    AstrayPolicy,
    Averaging,
    ContinueOnLoss,
    FailIfAstray,
    FailOnLoss,
    LossPolicy,
    ProcessGroupChannel,
    ResetIfAstray,
    ServedAverager,
    ServedAveraging,
    free_order,
    round_robin,
)
from lightning_easgd.method.rules import CenterRule, PlainRule, ServedExchange
from lightning_easgd.strategies.processes import WorkerProcesses
from lightning_easgd.tensors.buffers import FiniteValues

__all__ = ["OnNonFinite", "OnWorkerLoss", "Order", "ServedWorkers", "check_period"]

Order = Literal["free", "round_robin"]
OnWorkerLoss = Literal["fail", "continue"]
OnNonFinite = Literal["fail", "reset"]

_ORDERS = {"free": free_order, "round_robin": round_robin}
_POLICIES: dict[str, Callable[[str], LossPolicy]] = {"fail": FailOnLoss, "continue": ContinueOnLoss}


class ServedWorkers(WorkerProcesses):
    """Workers that may exchange with a served center, each on its own clock."""

    _ddp_arguments_with_effect = frozenset({"broadcast_buffers", "forward_sync_buffers"})
    _averaging: Averaging | None = None
    _finite_values: FiniteValues | None = None

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
        if order not in _ORDERS:
            raise ValueError(f"{name}(order={order!r}): unknown order; use 'free' or 'round_robin'.")
        if on_worker_loss not in _POLICIES:
            raise ValueError(f"{name}(on_worker_loss={on_worker_loss!r}): unknown; use 'fail' or 'continue'.")
        if on_nonfinite not in ("fail", "reset"):
            raise ValueError(f"{name}(on_nonfinite={on_nonfinite!r}): unknown; use 'fail' or 'reset'.")
        self.order = order
        self.on_nonfinite = on_nonfinite
        self.on_worker_loss = on_worker_loss

    @property
    def rule(self) -> CenterRule:
        """How the center moves."""
        return PlainRule()

    @property
    def is_served(self) -> bool:
        """Whether the center is a served one."""
        return True

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Check an optimizer, and make it what a worker trains with, in place.

        Raises:
            TypeError: If this strategy cannot work with it.
        """
        if hasattr(optimizer, "consolidate_state_dict"):
            raise TypeError(
                f"{type(self).__name__}: {type(optimizer).__name__} shards its state over ranks that have the same"
                " parameters, and workers do not; use the optimizer that it wraps."
            )

    def is_prepared(self, optimizer: Optimizer) -> bool:  # noqa: ARG002
        """Whether an optimizer still is what :meth:`prepare_optimizer` has made it."""
        return True

    def _serve(self, exchange: ServedExchange, averager: Callable[..., ServedAverager]) -> Averaging:
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
        )

    def _astray_policy(self) -> AstrayPolicy:
        name = type(self).__name__
        return FailIfAstray(name) if self.on_nonfinite == "fail" else ResetIfAstray(name, self._mend_worker)

    def _mend_worker(self) -> None:
        """Put right what of a worker that starts again is not one optimizer's: nothing of where it was may stay."""
        averaging: Averaging | None = self._averaging
        for optimizer, averager in averaging.averagers.items() if averaging is not None else ():
            if not averager.is_finite():
                averager.start_at_center()
                optimizer.state.clear()
            for parameter in averager.parameters:
                parameter.grad = None
        if self._finite_values is not None:
            self._finite_values.mend()


def check_period(strategy: str, tau: object) -> None:
    """Raise unless τ is an int of at least 1."""
    if not isinstance(tau, int) or isinstance(tau, bool):
        raise TypeError(
            f"{strategy}(tau={tau!r}): the communication period is a number of optimizer steps; give an int."
        )
    if tau < 1:
        raise ValueError(
            f"{strategy}(tau={tau}): the communication period is at least 1 optimizer step; for no communication use"
            " LocalStrategy."
        )
