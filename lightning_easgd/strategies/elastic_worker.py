"""A worker among others that come, die and return, as a strategy of a Trainer sees it."""

import itertools
import os
import pickle
from collections.abc import Callable, Mapping, Sized
from datetime import timedelta
from functools import partial
from itertools import zip_longest
from typing import Any, final

import torch
import torch.distributed as dist

from lightning_easgd.averagers.sync.addition import ExactAddition
from lightning_easgd.averagers.sync.choice import MakeSum, channel_joins, sliced_sums
from lightning_easgd.averagers.sync.compressed_addition import CompressedAddition
from lightning_easgd.averagers.sync.membership_sum import MembershipSum
from lightning_easgd.averagers.worker_ranks import WorkerRanks
from lightning_easgd.method.compression import WireDtype
from lightning_easgd.strategies.fault_tolerance import FaultTolerance
from lightning_easgd.strategies.handed_values import HandedValues
from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.trainer.lightning_private import begin_epoch_whole, clocks_of, go_on_at
from lightning_easgd.transport.channel import Channel, ExchangeError, LoneChannel, ProcessGroupChannel
from lightning_easgd.transport.membership import Membership
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = ["ElasticWorker"]

_LAUNCHES = itertools.count(1)  # of fits, whose ranks this process spawns or forks

_APART = 1_000_003
"""Between the seeds of two workers: more than a fit has epochs."""


@final
class ElasticWorker:
    """One launch, which has found out who it is before it starts.

    Args:
        strategy: The strategy's name, for errors.
        settings: What the user says.
    """

    def __init__(self, strategy: str, settings: FaultTolerance) -> None:
        self._strategy = strategy
        self._settings = settings
        self._launch: int | None = None
        self._members: Membership | None = None
        self._trainer: Any = None  # of the fit
        self._now: dict[str, Any] = {}  # the clocks at the last step
        self._session: CenterSession | None = None
        self._parameters: list[str] = []  # that are averaged
        # Of another worker, which this one is to go on at.
        self._clocks: dict[str, Any] | None = None
        self._values: dict[str, Any] | None = None
        self._to_hand_over: HandedValues | None = None

    def resolve(self, layout: WorkerLayout, as_one: str, device: torch.device) -> None:
        """Find out what the environment says; before anything starts.

        Args:
            layout: Of the ranks of this launch.
            as_one: The argument that makes them one worker, for the error.
            device: Where they train.

        Raises:
            ModuleNotFoundError: If torchft is not installed.
            ValueError: If something is missing, or there is more than one worker, or no GPU for NCCL.
        """
        self._settings = self._settings.resolved()
        if self._settings.process_group == "nccl" and (device.type != "cuda" or layout.per_worker > 1):
            raise ValueError(
                f"{self._strategy}(fault_tolerance=FaultTolerance(process_group='nccl')): NCCL is for workers of one"
                f" GPU so far, and this one has {layout.per_worker} of the type {device.type}; use 'gloo'."
            )
        if layout.workers != 1:
            raise ValueError(
                f"{self._strategy}(fault_tolerance=...): a launch is one worker, and this one has {layout.workers} of"
                f" {layout.per_worker} device{'s' if layout.per_worker > 1 else ''}; start each worker by itself, or"
                f" make all {layout.ranks} ranks one worker ({as_one})."
            )

    def count_launch(self) -> None:
        """Before a fit's ranks are spawned or forked: each of them begins to count fits anew."""
        self._launch = next(_LAUNCHES)

    def center_device(self, device: torch.device) -> str | None:
        """Where the center is of a worker that trains on this device; None for there.

        Other workers may be anywhere, and what goes through gloo is on the host.
        """
        return None if device.type == "cpu" or self._settings.process_group == "nccl" else "cpu"

    @property
    def replica_id(self) -> int:
        """This worker's number.

        Raises:
            RuntimeError: If it is not known yet.
        """
        if self._settings.replica_id is None:
            raise RuntimeError(
                f"{self._strategy}.replica_id: it is known once a Trainer has this strategy; before, only where"
                " FaultTolerance(replica_id=...) gives it."
            )
        return self._settings.replica_id

    @property
    def membership(self) -> Membership | None:
        """Who lives, and what has been missed; None before the first fit."""
        return self._members

    @property
    def is_saver(self) -> bool:
        """Whether it writes checkpoints, as the living worker of the smallest number does."""
        return self._members is None or self._members.is_first()

    def sampler_arguments(self, inside: Mapping[str, int], *, training: bool) -> dict[str, int]:
        """How data are shared out: each worker trains on its own share, or order, and validates on all.

        Args:
            inside: How they are shared out between the ranks of this worker.
            training: Whether they are trained on.
        """
        size, ranks = self._settings.group_size, inside["num_replicas"]
        if training and size is not None:
            return {"num_replicas": size * ranks, "rank": self.replica_id * ranks + inside["rank"]}
        if not training:
            return {**inside}
        # Samplers add the epoch: the next number's first order would be this one's second.
        return {**inside, "seed": int(os.getenv("PL_GLOBAL_SEED", "0")) + _APART * self.replica_id}

    def connect(
        self,
        tau: int,
        timeout: timedelta,
        wire_dtype: WireDtype | None,
        *,
        in_common: Mapping[str, str],
        is_sharded: bool,
        judges_together: bool,
        host: str,
        device: torch.device,
        judge: Callable[[int], object],
        who_is_missing: Callable[[], str],
    ) -> tuple[Channel, MakeSum, WorkerRanks]:
        """Find the lighthouse, and open the channels of this worker's ranks; all of them call it at the same point.

        Args:
            tau: τ.
            timeout: How long a worker that comes waits for the others, and a rank for another one of this worker.
            wire_dtype: What differences are rounded to on their way; None for nothing.
            in_common: What all workers must be told alike, as a user gives it, by name.
            is_sharded: As for :class:`WorkerRanks`.
            judges_together: As for :class:`WorkerRanks`.
            host: Of this worker's first rank.
            device: Where this rank trains.
            judge: As for :class:`MembershipSum`.
            who_is_missing: Finds a sentence on who is to blame, when an operation has failed.

        Returns:
            What ``SynchronousAveraging`` takes: the channel of the announcements, what makes the sum, the ranks.

        Raises:
            ExchangeError: If there is no lighthouse, or a worker of this number is alive.
        """
        settings = self._settings
        assert settings.lighthouse is not None
        assert isinstance(settings.quorum_timeout, float)
        assert isinstance(settings.process_group_timeout, float)
        is_alone = not dist.is_initialized() or dist.get_world_size() == 1

        def channel() -> Channel:
            return LoneChannel() if is_alone else ProcessGroupChannel("gloo", timeout, self._strategy, who_is_missing)

        inside = channel()
        self._members = members = Membership(
            settings.lighthouse,
            self.replica_id,
            min_replica_size=settings.min_replica_size,
            timeout=settings.process_group_timeout,
            strategy=self._strategy,
            patience=timeout.total_seconds(),
            fit=settings.fit or self._launch,
            inside=inside,
            host="localhost" if is_alone else host,
            kind=settings.process_group,
            device=device,
        )
        members.check()
        members.add_state("clocks", lambda: self._now, self._receive_clocks, is_common=True)
        members.add_state(
            "values", self._hand_over, self._receive_values, prepare=self._note_values, is_common=not is_sharded
        )
        make_sum: MakeSum = partial(
            MembershipSum,
            members=members,
            tau=tau,
            patience=settings.quorum_timeout,
            timeout=timeout.total_seconds(),
            restart_after_missed=settings.restart_after_missed,
            in_common={**in_common, "group_size": f"FaultTolerance(group_size={settings.group_size})"},
            make_addition=ExactAddition if wire_dtype is None else partial(CompressedAddition, wire_dtype=wire_dtype),
            judge=judge,
            strategy=self._strategy,
        )
        if not (is_alone or is_sharded):
            make_sum = sliced_sums(channel_joins(channel), make_sum)
        return channel(), make_sum, WorkerRanks(LoneChannel(), inside, is_sharded, judges_together)

    def _receive_clocks(self, clocks: dict[str, Any]) -> None:
        self._clocks = clocks

    def _receive_values(self, values: dict[str, Any]) -> None:
        self._values = values

    def _note_values(self) -> None:
        """Find the tensors, which another thread must not: it would touch a sharded module in the middle of a step."""
        assert self._session is not None
        self._to_hand_over = self._session.handed_values()

    def _hand_over(self) -> dict[str, Any]:
        assert self._to_hand_over is not None
        return self._to_hand_over.packed()

    def enter(self, session: CenterSession, trainer: Any) -> None:
        """Before the first step: come to the others, and go on with their steps, epochs, schedules and buffers."""
        self._trainer, self._session = trainer, session
        self._clocks = self._values = None
        self._parameters = session.described()
        begin_epoch_whole(trainer)
        self.note_clocks(begins=True)
        self._check_handed()
        session.averaging.enter()
        if self._clocks is not None:
            self._check_alike(self._clocks)
            go_on_at(trainer, self._clocks)
            for averager in session.averagers:
                averager.go_on_at(self._clocks["clock"])  # that of the exchange may be of a step later
        if self._values is not None:
            session.take_over(self._values)
        self._values = None

    def _check_handed(self) -> None:
        """Raise if no worker that comes could get the schedules: it would only hear that it has got nothing."""
        try:
            pickle.dumps(self._now)
        except Exception as error:
            raise TypeError(
                f"{self._strategy}(fault_tolerance=...): the state of a scheduler goes to workers that come, and cannot"
                f" be pickled ({error}); leave what is no number out of its state_dict()."
            ) from error

    def _check_alike(self, clocks: dict[str, Any]) -> None:
        for what, ours, theirs in (
            ("parameter groups", *([len(groups) for groups in each["rates"]] for each in (self._now, clocks))),
            ("schedulers", *(_number(each["schedulers"]) for each in (self._now, clocks))),
        ):
            if theirs is not None and ours != theirs:
                raise ExchangeError(
                    f"{self._strategy}(fault_tolerance=...): the other workers have {theirs} {what}, and this one"
                    f" {ours}; let configure_optimizers return the same in all workers."
                )
        for ours, theirs in zip_longest(self._parameters, clocks["parameters"], fillvalue="none"):
            if ours != theirs:
                raise ExchangeError(
                    f"{self._strategy}(fault_tolerance=...): the other workers average {theirs} where this one has"
                    f" {ours}; give all workers the same parameters, in the same groups."
                )

    def note_clocks(self, *, begins: bool = False) -> None:
        """Before each step: keep how far this worker is, for one that comes.

        Read by another thread in the middle of a scheduler's step, rates and schedule would not belong together, nor
        would the averager's clock and the trainer's steps after it.

        Args:
            begins: Whether there has been no batch yet.
        """
        assert self._session is not None
        (averager,) = self._session.averagers
        self._now = {**clocks_of(self._trainer, begins=begins), "clock": averager.clock, "parameters": self._parameters}


def _number(schedulers: Sized | None) -> int | None:
    return None if schedulers is None else len(schedulers)
