"""Workers around a served center: what the asynchronous strategies share, free of a class tree."""

from collections.abc import Callable
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.distributed_c10d import _get_default_store

from lightning_easgd._compat import reads_the_clock
from lightning_easgd.averagers import (
    Averaging,
    ContinueOnLoss,
    FailOnLoss,
    ProcessGroupChannel,
    ServedAverager,
    ServedAveraging,
    free_order,
    round_robin,
)
from lightning_easgd.service import CenterRule
from lightning_easgd.strategies.center_workers import CenterWorkers

__all__ = ["OnWorkerLoss", "Order", "ServedWorkers", "check_period"]

Order = Literal["free", "round_robin"]
OnWorkerLoss = Literal["fail", "continue"]

_ORDERS = {"free": free_order, "round_robin": round_robin}
_POLICIES = {"fail": FailOnLoss, "continue": ContinueOnLoss}


class ServedWorkers(CenterWorkers):
    """Workers that may exchange with a served center, each on its own clock."""

    def __init__(self, *arguments: Any, order: str = "free", on_worker_loss: str = "fail", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        name = type(self).__name__
        if order not in _ORDERS:
            raise ValueError(f"{name}(order={order!r}): unknown order; use 'free' or 'round_robin'.")
        if on_worker_loss not in _POLICIES:
            raise ValueError(f"{name}(on_worker_loss={on_worker_loss!r}): unknown; use 'fail' or 'continue'.")
        self.order = order
        self.on_worker_loss = on_worker_loss

    @property
    def is_served(self) -> bool:
        """Whether the center is a served one."""
        return True

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self.is_served and self._layer_sync is not None:
            raise ValueError(
                f"{type(self).__name__} with Trainer(sync_batchnorm=True): SyncBatchNorm communicates in every forward"
                " pass and asynchronous workers do not run in step; leave it out, the center's statistics are the"
                " workers' mean."
            )

    def setup(self, trainer: Any) -> None:
        """Set up as usual; name what would keep asynchronous ranks in step."""
        super().setup(trainer)
        if trainer.state.fn == "fit" and self.is_served:
            for callback in trainer.callbacks:
                if reads_the_clock(callback):
                    rank_zero_warn(
                        f"{type(self).__name__}: {type(callback).__name__} asks all ranks for the time after every"
                        " batch, so that they run in step; leave out max_time and train_time_interval."
                    )

    def _serve(self, rule: CenterRule, averager: Callable[..., ServedAverager]) -> Averaging:
        assert self._timeout is not None
        return ServedAveraging(
            ProcessGroupChannel("gloo", self._timeout),
            _get_default_store(),
            node=self.node_rank,
            timeout=self._timeout,
            rule=rule,
            make_averager=averager,
            make_turns=_ORDERS[self.order],
            on_loss=_POLICIES[self.on_worker_loss](),
        )


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
