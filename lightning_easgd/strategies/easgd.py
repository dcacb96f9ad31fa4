"""Elastic averaging: arguments and averaging of the EASGD strategies, free of a class tree."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Unpack

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.distributed_c10d import _get_default_store
from torch.optim import Optimizer

from lightning_easgd.averagers import AsynchronousAverager, Averaging, SynchronousAveraging, elastic_exchange
from lightning_easgd.averagers.sync.choice import MakeSum, Setting, make_channel
from lightning_easgd.averagers.sync.pull import PullToNew, PullToOld
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.method.compression import WireDtype
from lightning_easgd.method.position import LookAheadPosition, ParameterPosition, Position, make_nesterov
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.rules import CenterRule, outer_rule
from lightning_easgd.method.schedules import Schedule
from lightning_easgd.stability import outer
from lightning_easgd.stability.spectra import is_contraction
from lightning_easgd.strategies.center_method import (
    CenterMethod,
    OnNonFinite,
    OnWorkerLoss,
    Order,
    check_optimizer,
    check_period,
)
from lightning_easgd.strategies.ddp_arguments import DDPArguments, takes_ddp_arguments
from lightning_easgd.strategies.easgd_arguments import (
    check_center_device,
    check_center_rule,
    check_elastic,
    check_mode,
    check_momentum,
    check_nccl,
    check_outer,
    check_pickled,
    check_pull,
    check_wire_dtype,
    check_worker,
)
from lightning_easgd.strategies.elastic_worker import ElasticWorker
from lightning_easgd.strategies.fault_tolerance import FaultTolerance, as_fault_tolerance
from lightning_easgd.strategies.worker_arguments import DEFAULT_TIMEOUT, DevicesPerWorker, StartMethod
from lightning_easgd.strategies.worker_state.keeper import WorkerState
from lightning_easgd.transport.channel import Channel

__all__ = ["EASGDMethod", "PullTo"]

PullTo = Literal["old", "new"]


class EASGDMethod(CenterMethod):
    r"""Elastic Averaging SGD: workers train on their own and are pulled together with a center every ``tau`` steps.

    .. math::
        x^i_{t+1} &= x^i_t - \eta\, g^i(x^i_t) - \alpha\,(x^i_t - \tilde x_t) \\
        \tilde x_{t+1} &= \tilde x_t + \tfrac{\beta}{p}\,\textstyle\sum_i (x^i_t - \tilde x_t)

    Rank i is worker :math:`x^i` with the user's own optimizer (the gradient step :math:`\eta g`); the elastic terms
    :math:`\alpha, \beta` are added at the steps t = ``tau``, 2·``tau``, … of the optimizer, with the values of before
    the step (Zhang, Choromanska, LeCun, *Deep learning with Elastic Averaging SGD*, 2015, eqs 3-6). The all-reduce of
    the workers' differences runs while the following steps compute. Each optimizer has a clock of its own.

    The center :math:`\tilde x` is the model: validation, checkpoints and the module after ``fit`` hold it. Floating
    point buffers (BatchNorm's statistics) of the center are the workers' mean, integer buffers are rank 0's. A callback
    that leaves an average of each rank's own worker in the module (``WeightAveraging``, SWA) has it replaced by the
    ranks' mean, which as averages are linear is that average of the workers' mean.

    The center is float32 (float64 for double parameters) and differences are taken in that dtype, so that no move of
    the center is lost. A worker whose parameters are bfloat16 (``precision="bf16-true"``) rounds its own pull as it
    rounds its gradient steps: one below half a unit in the last place u of :math:`x^i` leaves it where it is, so that
    it may stay up to :math:`u / 2\alpha` apart from the center. With ``bf16-mixed`` parameters are float32.

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        tau: Communication period τ ≥ 1, in steps of the worker's optimizer (not batches).
        beta: The center's moving rate β in (0, 2); 0.9 unless ``alpha`` or ``rho`` is given, then p·α.
        alpha: The worker's moving rate α in (-1, 1]; β/p unless given. It does not change with the learning rate. A
            :class:`~lightning_easgd.method.schedules.Schedule` is a function of the optimizer's own clock t.
        rho: Elastic penalty ρ > 0 in place of ``alpha``: α = lr·ρ follows the learning rate. It may be a schedule, too:
            replicated SGD is ``beta=1`` and a ``rho`` that grows.
        mode: "sync": all workers exchange at the same clock, by an all-reduce. "async": each worker exchanges on its
            own clock with a served center (Algorithms 1 and 2 of the paper); nobody waits for a slow worker.
        momentum: δ in (0, 1) makes this EAMSGD: the worker's ``torch.optim.SGD`` becomes Nesterov with this momentum
            (an SGD that has momentum keeps its own), and the point before the look-ahead is what is averaged.
        outer_momentum: μ in [0, 1): the center moves with momentum, v ← μ v + β D̄ and x̃ ← x̃ + v, where D̄ is the mean
            of the workers' differences (with mode="async", of one worker's, divided by p). See
            :mod:`lightning_easgd.method.outer` for the family of methods that this and ``pull_to`` make.
        outer_nesterov: With ``outer_momentum``, x̃ ← x̃ + β D̄ + μ v: Nesterov's, as in DiLoCo.
        pull_to: The center that a worker is pulled towards: "old", that of before the exchange (the paper), or "new",
            that of after it. Towards the new one an exchange is made after each τ-th step, and the next gradient is
            taken at the pulled point: with ``alpha=1, beta=1`` it is local SGD. A worker then waits for the exchange,
            unless it has a ``delay``, and keeps one more vector of the parameters' size in the center's dtype.
        delay: k, 0 ≤ k < τ: the pull of an exchange is applied k steps after it was begun, so that a slow link does not
            slow the steps. It needs mode="async" or ``pull_to="new"``: the old center is there without any waiting.
        center_rule: What the center does with the workers' differences, where it is not to move by them alone: a
            :class:`~lightning_easgd.method.rules.CenterRule`, the same on all ranks; in place of ``outer_momentum``.
        wire_dtype: What travels between ranks is rounded to: "bfloat16" (half the bytes) or "int8" (3.9 times fewer; a
            float32 scale for each 256 elements). What the rounding drops is added to the next exchange; the center is
            never rounded. With mode="sync" these are the differences in the process group, and the worker's own pull is
            exact. With mode="async" these are the messages between nodes, both ways, as changes of a reference that
            worker and serving node share (:mod:`lightning_easgd.served_center.compressed_link`); within a node nothing
            is sent. None sends all as it is.
        order: With mode="async", "free": every worker on its own clock; "round_robin": turns pass from rank to rank,
            for reproducible runs.
        on_worker_loss: With mode="async", what happens when a worker dies: "fail" ends the run with an error that
            names it, "continue" lets the others go on, where the launcher does.
        on_nonfinite: What happens when a worker's difference from the center is not finite: "fail" ends the run on all
            ranks, with the last finite center; "reset" lets that worker start again at the center. The center is never
            touched by such a difference.
        center_device: With mode="sync", where the center and the wire of an exchange are: None (where the
            parameters are), or "cpu", which frees two float32 copies of the parameters on a GPU; x then travels to
            pinned host memory and its difference back, and the workers' sum is made by gloo. The numbers are the same.
        evaluate: Weights that validation during ``fit`` uses: "center" or "worker" (each rank its own).
        recalibrate_batchnorm: Mini-batches of each worker from which BatchNorm's statistics are estimated wherever the
            center is shown, in place of the mean of the workers' statistics; 0 for that mean. It is the callback
            :class:`~lightning_easgd.callbacks.RecalibrateBatchNorm`, which manual optimization needs with ``forward``.
        worker_state: Where checkpoints keep each worker's own parameters, optimizer state, clocks and random state,
            from which a resumed run goes on exactly: "embed" (inside), "sidecar" (files in ``<checkpoint>.easgd``,
            written by all ranks at once, for large models) or "none" (a resumed run starts at the center).
        devices_per_worker: Ranks of one worker, or "node" for all of a node. DDP reduces their gradients at every step,
            and the elastic averaging is between the workers: p above is their number. Each rank exchanges its share of
            the parameters for its worker. Its ranks read :attr:`center` together.
        fault_tolerance: Workers that come, die and return: True, or a :class:`~lightning_easgd.FaultTolerance`. Each
            worker is then a launch of its own, of ``devices_per_worker`` ranks, and torchft's lighthouse brings those
            that live together; p is their number at each exchange. Validation, checkpoints, epochs and the end are each
            worker's own, and so are buffers. It needs mode="sync" and a Trainer.
        process_group_backend: As for ``DDPStrategy``. With mode="sync" and None, workers on one host announce
            exchanges through memory that they share, and on its CPUs they exchange there, too; CPUs of several nodes
            do both over direct connections. A name, such as "gloo", lets them do both through process groups.
        timeout: How long a collective operation may wait for the slowest rank before it fails.
        start_method: As for ``DDPStrategy``: "popen", "spawn", "fork" or "forkserver".
        **ddp_arguments: The further arguments of ``DDPStrategy``, by name. With ``broadcast_buffers=False`` each rank's
            buffers stay its own, and checkpoints hold rank 0's. Those of the DDP wrapper, such as
            ``find_unused_parameters`` and ``ddp_comm_hook``, have their effect inside of workers of several devices. A
            communication hook reduces over its state's process group, or over its state, where these are given. With
            workers of one device they have no effect, and warn; those that change how gradients are reduced
            (``ddp_comm_...``) are refused.

    Raises:
        TypeError: If ``tau`` is not an int, a rate is neither number nor schedule, an argument is unknown, changes how
            DDP reduces gradients, or ``momentum`` is given and the optimizer is not SGD.
        ValueError: If a value is out of its range, or ``alpha`` and ``rho`` are both given.
    """

    method = "elastic averaging"
    _alike: tuple[str, ...] = (
        *CenterMethod._alike, "mode", "momentum", "outer_momentum", "outer_nesterov", "pull_to", "delay", "center_rule",
        "wire_dtype", "center_device",
    )  # fmt: skip

    @takes_ddp_arguments
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
        alpha: float | Schedule | None = None,
        rho: float | Schedule | None = None,
        mode: Literal["sync", "async"] = "sync",
        momentum: float | None = None,
        outer_momentum: float | None = None,
        outer_nesterov: bool = False,
        pull_to: PullTo = "old",
        delay: int = 0,
        center_rule: CenterRule | None = None,
        wire_dtype: WireDtype | None = None,
        order: Order = "free",
        on_worker_loss: OnWorkerLoss = "fail",
        on_nonfinite: OnNonFinite = "fail",
        center_device: Literal["cpu"] | None = None,
        evaluate: Literal["center", "worker"] = "center",
        recalibrate_batchnorm: int = 0,
        worker_state: WorkerState = "embed",
        devices_per_worker: DevicesPerWorker = 1,
        fault_tolerance: bool | FaultTolerance | None = None,
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
            recalibrate_batchnorm=recalibrate_batchnorm,
            worker_state=worker_state,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            devices_per_worker=devices_per_worker,
            **ddp_arguments,
        )
        name = type(self).__name__
        check_period(name, tau)
        check_mode(name, mode, order, on_worker_loss)
        check_worker(name, devices_per_worker, mode)
        check_wire_dtype(name, wire_dtype)
        check_center_device(name, center_device, mode)
        settings = as_fault_tolerance(name, fault_tolerance)
        if settings is not None:
            check_elastic(name, mode, self.may_come_and_go)
            check_nccl(name, settings, center_device, wire_dtype)
            self.elastic = ElasticWorker(name, settings)
        check_momentum(name, momentum)
        check_center_rule(name, center_rule)
        check_outer(name, outer_momentum, outer_nesterov, center_rule)
        check_pull(name, pull_to, delay, mode, tau)
        self.tau = tau
        is_of_paper = center_rule is None and not outer_momentum and pull_to == "old" and not delay
        self.rates = MovingRates(alpha, beta, rho, in_turn=mode == "async", is_judged=is_of_paper, owner=name)
        if mode == "sync":  # a served center takes workers of any periods
            self._alike = (*self._alike, "tau")
        check_pickled(name, start_method, center_rule=center_rule, alpha=alpha, rho=rho)
        self.mode = mode
        self.momentum = momentum
        self.outer_momentum = outer_momentum
        self.outer_nesterov = outer_nesterov
        self.pull_to = pull_to
        self.delay = delay
        self.center_rule = center_rule
        self.wire_dtype = wire_dtype
        self.center_device = center_device

    def _warn_of_arguments(self) -> None:
        self._warn_of_rates(self.workers)

    def _warn_of_rates(self, workers: int) -> None:
        """Warn of rates with which so many workers are unstable at every learning rate."""
        problem = self.rates.instability(workers) or self._outer_instability(workers)
        if problem is not None:
            rank_zero_warn(problem)

    def _outer_instability(self, workers: int) -> str | None:
        """What is wrong with the rates at every learning rate, where the center or the pull is not the paper's."""
        rates = self.rates.largest(workers)
        if self.rates.is_judged or self.is_served or self.center_rule is not None or rates is None:
            return None
        alpha, beta = rates
        radius = outer.radius(0.0, alpha, beta, workers=workers, **self.family)
        if is_contraction(radius):
            return None
        return (
            f"{type(self).__name__}(alpha={alpha:g}, beta={beta:g}, outer_momentum={self.outer_momentum or 0:g},"
            f" pull_to={self.pull_to!r}) is unstable at every learning rate: an exchange multiplies the gap between"
            f" workers and center by up to {radius:.3g}. Lower beta or outer_momentum; see"
            " lightning_easgd.stability.outer.radius."
        )

    @property
    def family(self) -> outer.Family:
        """What this method is in :mod:`lightning_easgd.stability.outer`."""
        return {
            "tau": self.tau,
            "momentum": self.momentum or 0.0,
            "outer_momentum": self.outer_momentum or 0.0,
            "outer_nesterov": self.outer_nesterov,
            "pull_to": self.pull_to,
            "delay": self.delay,
        }

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Check an optimizer and the rates that follow from it, and for EAMSGD make it Nesterov."""
        check_optimizer(type(self).__name__, optimizer)
        self.rates.warn_of(optimizer, self.workers)
        if self.momentum is not None:
            make_nesterov(optimizer, self.momentum, type(self).__name__)

    @property
    def _registered_name(self) -> str:
        return ("easgd" if self.momentum is None else "eamsgd") + ("_async" if self.is_served else "")

    def is_prepared(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer still is what :meth:`prepare_optimizer` has made it: Nesterov, for EAMSGD."""
        groups = optimizer.param_groups
        return self.momentum is None or all(group.get("nesterov") and group.get("momentum") for group in groups)

    @property
    def rule(self) -> CenterRule:
        """How the center moves."""
        return self.center_rule or outer_rule(self.outer_momentum, self.outer_nesterov)

    @property
    def is_served(self) -> bool:
        """Whether the center is a served one."""
        return self.mode == "async"

    @property
    def synchronous(self) -> str:
        """This very strategy, for errors of a served center."""
        return f"{type(self).__name__}(mode='sync')"

    def make_averaging(self, optimizers: Sequence[Optimizer]) -> Averaging:
        """Make the averaging of one training; all ranks do it at the same point."""
        if self.is_served:
            to_new = self.pull_to == "new"
            averager = partial(
                AsynchronousAverager,
                tau=self.tau,
                rates=self.rates,
                position=self._position,
                to_new=to_new,
                delay=self.delay,
            )
            exchange = elastic_exchange(self.rates, self.rule, to_new)
            return self._served_averaging(exchange, averager, self.wire_dtype)
        assert self._timeout is not None
        if self.elastic is not None:
            return self._elastic_averaging(self.elastic, optimizers, self._timeout)
        assert self.process_group_backend is not None
        setting = Setting(
            self.root_device,
            self.process_group_backend,
            self.tau if self.pull_to == "old" else max(1, self.delay),
            len(optimizers),
            is_one_host=self.num_nodes == 1,
            is_worker_on_host=self.num_processes % self.layout.per_worker == 0,
            has_chosen_backend=self._given_backend is not None,
            wire_dtype=self.wire_dtype,
            center_device=self.center_device,
        )
        name = type(self).__name__
        control, make_sum, worker = make_channel(
            setting,
            _get_default_store(),
            self._timeout,
            name,
            self._groups.who_is_missing,
            layout=self.layout,
            rank=self.global_rank,
            is_sharded=self.is_sharded,
            judges_together=self._judges_together,
        )
        return self.synchronous_averaging(control, make_sum, worker)

    def _elastic_averaging(
        self, elastic: ElasticWorker, optimizers: Sequence[Optimizer], timeout: timedelta
    ) -> Averaging:
        if len(optimizers) != 1:
            raise ValueError(
                f"{type(self).__name__}(fault_tolerance=...): workers that come and go train with one optimizer so far,"
                f" and this module has {len(optimizers)}."
            )
        control, make_sum, worker = elastic.connect(
            self.tau,
            timeout,
            self.wire_dtype,
            in_common={name: f"{type(self).__name__}({name}={value})" for name, value in self._told_alike.items()},
            is_sharded=self.is_sharded,
            judges_together=self._judges_together,
            host=self.cluster_environment.main_address,
            device=self.root_device,
            judge=self._warn_of_rates,
            who_is_missing=self._groups.who_is_missing,
        )
        return self.synchronous_averaging(control, make_sum, worker)

    @property
    def _told_alike(self) -> dict[str, Any]:
        """What moves the center; of a schedule, which need not say what it is, the class."""
        rates = {name: getattr(self.rates, name) for name in ("alpha", "beta", "rho")}
        return {"tau": self.tau} | {
            name: type(rate).__name__ if callable(rate) else rate for name, rate in rates.items()
        }

    @property
    def _judges_together(self) -> bool:
        return self.is_sharded and self.on_nonfinite == "reset"

    @property
    def _position(self) -> Callable[[Optimizer], Position]:
        return ParameterPosition if self.momentum is None else LookAheadPosition

    def synchronous_averaging(
        self, control: Channel, make_sum: MakeSum, worker: WorkerRanks | None = None
    ) -> Averaging:
        """Make the averaging on these channels, with all else that this strategy was given.

        For ``make_averaging`` of a subclass with a transport of its own.

        Args:
            control: The channel of the announcements, of all ranks.
            make_sum: Makes what sums up the differences of an optimizer.
            worker: This worker's ranks; None where each rank is a worker.
        """
        elastic = self.elastic
        return SynchronousAveraging(
            control,
            make_sum,
            tau=self.tau,
            rates=self.rates,
            rule=self.rule,
            make_pull=PullToOld if self.pull_to == "old" else partial(PullToNew, self.delay),
            position=self._position,
            center_device=self.center_device if elastic is None else elastic.center_device(self.root_device),
            on_astray=self._astray_policy(),
            worker=worker,
            strategy=type(self).__name__,
        )
