"""The DOWNPOUR family, the baselines of the EASGD paper: arguments and averaging, free of a class tree."""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch.optim import SGD, Optimizer

from lightning_easgd.averagers import Averaging, DownpourAverager
from lightning_easgd.method.rates import check_number
from lightning_easgd.method.rules import (
    AveragedRule,
    CenterRule,
    ConstantRate,
    NesterovRule,
    PlainRule,
    PolyakRate,
    PushExchange,
)
from lightning_easgd.strategies.center_method import (
    CenterMethod,
    OnNonFinite,
    OnWorkerLoss,
    Order,
    check_optimizer,
    check_period,
)
from lightning_easgd.strategies.ddp_arguments import DDPArguments, takes_ddp_arguments
from lightning_easgd.strategies.worker_arguments import DEFAULT_TIMEOUT, StartMethod
from lightning_easgd.strategies.worker_state.keeper import WorkerState

__all__ = ["DownpourMethod"]


class DownpourMethod(CenterMethod):
    r"""DOWNPOUR and its variants: every ``tau`` steps a worker adds its update to the center and takes it over.

    .. math:: \tilde x \leftarrow \tilde x + v^i, \qquad x^i \leftarrow \tilde x, \qquad v^i \leftarrow 0

    on each worker's own clock, :math:`v^i` being what its optimizer has added to :math:`x^i` since the last exchange
    (Dean et al. 2012, as stated by Zhang, Choromanska, LeCun 2015). It is a baseline: it needs a far smaller learning
    rate than EASGD and is unstable for large ``tau``. What a worker has added since its last exchange is not in the
    center, also at the end of training.

    ===============================  ==============================================================================
    DOWNPOUR                         the defaults
    MDOWNPOUR (``momentum``)         Nesterov's momentum at the center: v ← δv + u, x̃ ← x̃ + δv + u
    ADOWNPOUR (``average="polyak"``) the mean z of all centers is evaluated
    MVADOWNPOUR (``average=0.001``)  z ← (1 - a) z + a x̃ is evaluated
    ===============================  ==============================================================================

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        tau: Communication period τ ≥ 1, in steps of the worker's optimizer.
        momentum: δ in (0, 1): MDOWNPOUR, defined for ``tau=1`` and plain ``torch.optim.SGD``.
        average: None, "polyak", or the constant rate a in (0, 1] of a running average of the center, which is then
            what validation, checkpoints and the module after ``fit`` hold.
        order: "free": every worker on its own clock. "round_robin": turns pass from rank to rank.
        on_worker_loss: "fail" or "continue", when a worker dies.
        on_nonfinite: What happens when a worker's difference from the center is not finite: "fail" ends the run on all
            ranks, with the last finite center; "reset" lets that worker start again at the center. The center is never
            touched by such a difference.
        evaluate: Weights that validation during ``fit`` uses: "center" or "worker" (each rank its own).
        worker_state: Where checkpoints keep each worker's own parameters, optimizer state, clocks and random state,
            from which a resumed run goes on exactly: "embed" (inside), "sidecar" (files in ``<checkpoint>.easgd``,
            written by all ranks at once, for large models) or "none" (a resumed run starts at the center).
        process_group_backend: As for ``DDPStrategy``.
        timeout: How long a worker may give no sign of life before the others fail.
        start_method: As for ``DDPStrategy``: "popen", "spawn", "fork" or "forkserver".
        **ddp_arguments: As for ``EASGDStrategy``.

    Raises:
        TypeError: If ``tau`` is not an int, an argument is unknown, or ``momentum`` is given and the optimizer is not
            plain SGD.
        ValueError: If a value is out of its range, or ``momentum`` is given and ``tau`` > 1.
    """

    method = "DOWNPOUR"
    _alike: tuple[str, ...] = (*CenterMethod._alike, "momentum", "average")

    @takes_ddp_arguments
    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        tau: int = 1,
        momentum: float | None = None,
        average: Literal["polyak"] | float | None = None,
        order: Order = "free",
        on_worker_loss: OnWorkerLoss = "fail",
        on_nonfinite: OnNonFinite = "fail",
        evaluate: Literal["center", "worker"] = "center",
        worker_state: WorkerState = "embed",
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
        **ddp_arguments: Unpack[DDPArguments],
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            order=order,
            on_worker_loss=on_worker_loss,
            on_nonfinite=on_nonfinite,
            evaluate=evaluate,
            worker_state=worker_state,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **ddp_arguments,
        )
        name = type(self).__name__
        check_period(name, tau)
        check_number(name, "momentum", momentum)
        if momentum is not None and not 0 < momentum < 1:
            raise ValueError(
                f"{name}(momentum={momentum}): the center's momentum lies in (0, 1); leave it None for DOWNPOUR."
            )
        if momentum is not None and tau > 1:
            raise ValueError(
                f"{name}(momentum={momentum}, tau={tau}): momentum at the center is defined for tau=1 only;"
                " set tau=1, or momentum=None."
            )
        if average is not None and average != "polyak" and not (_is_number(average) and 0 < average <= 1):
            raise ValueError(
                f"{name}(average={average!r}): unknown average; use None, 'polyak', or a rate in (0, 1] such as 0.001."
            )
        self.tau = tau
        self.momentum = momentum
        self.average = average

    @property
    def _registered_name(self) -> str:
        return "downpour" if self.momentum is None else "mdownpour"

    @property
    def rule(self) -> CenterRule:
        """How the center moves."""
        rule: CenterRule = PlainRule() if self.momentum is None else NesterovRule(self.momentum)
        if self.average is None:
            return rule
        return AveragedRule(rule, PolyakRate() if self.average == "polyak" else ConstantRate(float(self.average)))

    @property
    def is_served(self) -> bool:
        """Whether the center is a served one."""
        return True

    def is_prepared(self, optimizer: Optimizer) -> bool:  # noqa: ARG002
        """Whether an optimizer still is what :meth:`prepare_optimizer` has made it."""
        return True

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Check an optimizer; for MDOWNPOUR only plain SGD will do, whose steps are gradients."""
        check_optimizer(type(self).__name__, optimizer)
        if self.momentum is None:
            return
        if not isinstance(optimizer, SGD) or any(group["momentum"] for group in optimizer.param_groups):
            raise TypeError(
                f"{type(self).__name__}(momentum={self.momentum}): the center has the momentum and the workers send"
                f" gradients; give torch.optim.SGD without momentum, not {type(optimizer).__name__}."
            )

    def make_averaging(self, optimizers: Sequence[Optimizer]) -> Averaging:  # noqa: ARG002
        """Make the averaging of one training; all ranks do it at the same point."""
        return self._served_averaging(PushExchange(self.rule), partial(DownpourAverager, tau=self.tau))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
