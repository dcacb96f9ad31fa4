"""Workers held together by elastic averaging: the body of the EASGD strategies, free of a class tree."""

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_easgd.averagers import Averaging, ProcessGroupChannel, SynchronousAveraging
from lightning_easgd.momentum import LookAheadPosition, ParameterPosition, make_nesterov
from lightning_easgd.rates import MovingRates
from lightning_easgd.strategies.center_workers import CenterWorkers
from lightning_easgd.strategies.workers import DEFAULT_TIMEOUT, StartMethod

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["ElasticWorkers"]


class ElasticWorkers(CenterWorkers):
    r"""Elastic Averaging SGD: workers train on their own and are pulled together with a center every ``tau`` steps.

    .. math::
        x^i_{t+1} &= x^i_t - \eta\, g^i(x^i_t) - \alpha\,(x^i_t - \tilde x_t) \\
        \tilde x_{t+1} &= \tilde x_t + \tfrac{\beta}{p}\,\textstyle\sum_i (x^i_t - \tilde x_t)

    Rank i is worker :math:`x^i` with the user's own optimizer (the gradient step :math:`\eta g`); the elastic terms
    :math:`\alpha, \beta` are added at the steps t = ``tau``, 2·``tau``, … of the optimizer, with the values of before
    the step (Zhang, Choromanska, LeCun, *Deep learning with Elastic Averaging SGD*, 2015, eqs 3-6). The all-reduce of
    the workers' differences runs while the following steps compute. Each optimizer has a clock of its own.

    The center :math:`\tilde x` is the model: validation, checkpoints and the module after ``fit`` hold it. Floating
    point buffers (BatchNorm's statistics) of the center are the workers' mean, integer buffers are rank 0's.

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        tau: Communication period τ ≥ 1, in steps of the worker's optimizer (not batches).
        beta: The center's moving rate β in (0, 2); 0.9 unless ``alpha`` or ``rho`` is given, then p·α.
        alpha: The worker's moving rate α in (-1, 1]; β/p unless given. It does not change with the learning rate.
        rho: Elastic penalty ρ > 0 in place of ``alpha``: α = lr·ρ follows the learning rate.
        mode: "sync": all workers exchange at the same clock, by an all-reduce.
        momentum: δ in (0, 1) makes this EAMSGD: the worker's ``torch.optim.SGD`` becomes Nesterov with this momentum
            (an SGD that has momentum keeps its own), and the point before the look-ahead is what is averaged.
        evaluate: Weights that validation during ``fit`` uses: "center" or "worker" (each rank its own).
        process_group_backend: As for ``DDPStrategy``.
        timeout: How long a collective operation may wait for the slowest rank before it fails.
        start_method: As for ``DDPStrategy``: "popen", "spawn", "fork" or "forkserver".
        **ddp_arguments: Arguments of the DDP wrapper. ``find_unused_parameters``, ``static_graph``,
            ``gradient_as_bucket_view`` and ``broadcast_buffers`` are accepted and have no effect.

    Raises:
        TypeError: If ``tau`` is not an int, an argument is unknown, changes how DDP reduces gradients, or
            ``momentum`` is given and the optimizer is not SGD.
        ValueError: If a value is out of its range, or ``alpha`` and ``rho`` are both given.
    """

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        tau: int = 10,
        beta: float | None = None,
        alpha: float | None = None,
        rho: float | None = None,
        mode: Literal["sync"] = "sync",
        momentum: float | None = None,
        evaluate: Literal["center", "worker"] = "center",
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
        **ddp_arguments: Any,
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            evaluate=evaluate,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **ddp_arguments,
        )
        _check_arguments(tau, mode, momentum)
        self.tau = tau
        self.rates = MovingRates(alpha=alpha, beta=beta, rho=rho)
        self.mode = mode
        self.momentum = momentum

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        problem = self.rates.instability(self.num_nodes * self.num_processes)
        if problem is not None:
            rank_zero_warn(problem)

    def setup_optimizers(self, trainer: "Trainer") -> None:
        """Create the optimizers; make them Nesterov for EAMSGD."""
        super().setup_optimizers(trainer)
        if self.momentum is not None:
            for optimizer in self.optimizers:
                make_nesterov(optimizer, self.momentum)

    def _make_averaging(self) -> Averaging:
        assert self._timeout is not None
        return SynchronousAveraging(
            control=ProcessGroupChannel("gloo", self._timeout),
            data=ProcessGroupChannel(self._get_process_group_backend(), self._timeout),
            tau=self.tau,
            rates=self.rates,
            position=ParameterPosition if self.momentum is None else LookAheadPosition,
        )


def _check_arguments(tau: object, mode: object, momentum: float | None) -> None:
    if not isinstance(tau, int) or isinstance(tau, bool):
        raise TypeError(
            f"EASGDStrategy(tau={tau!r}): the communication period is a number of optimizer steps; give an int."
        )
    if tau < 1:
        raise ValueError(
            f"EASGDStrategy(tau={tau}): the communication period is at least 1 optimizer step; for no communication"
            " use LocalStrategy."
        )
    if mode != "sync":
        raise ValueError(f"EASGDStrategy(mode={mode!r}): unknown mode; use 'sync'.")
    if momentum is not None and not 0 < momentum < 1:
        raise ValueError(
            f"EASGDStrategy(momentum={momentum}): Nesterov momentum lies in (0, 1); leave it None for plain EASGD."
        )
