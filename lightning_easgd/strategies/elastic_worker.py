"""A worker among others that come, die and return, as a strategy of a Trainer sees it."""

import os
from functools import partial
from typing import Any, final

from lightning_easgd.averagers.sync.addition import ExactAddition
from lightning_easgd.averagers.sync.choice import MakeSum
from lightning_easgd.averagers.sync.compressed_addition import CompressedAddition
from lightning_easgd.averagers.sync.membership_sum import MembershipSum
from lightning_easgd.method.compression import WireDtype
from lightning_easgd.strategies.fault_tolerance import FaultTolerance
from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.trainer.lightning_private import clocks_of, go_on_at
from lightning_easgd.transport.membership import Membership

__all__ = ["ElasticWorker"]


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
        self._members: Membership | None = None
        self._trainer: Any = None  # of the fit
        self._now: dict[str, Any] = {}  # the clocks at the last step
        self._session: CenterSession | None = None
        # Of another worker, which this one is to go on at.
        self._clocks: dict[str, Any] | None = None
        self._values: dict[str, Any] | None = None

    def resolve(self, ranks: int) -> None:
        """Find out what the environment says; before anything starts.

        Args:
            ranks: Of this launch.

        Raises:
            ModuleNotFoundError: If torchft is not installed.
            ValueError: If something is missing, or there is more than one rank.
        """
        self._settings = self._settings.resolved()
        if ranks != 1:
            raise ValueError(
                f"{self._strategy}(fault_tolerance=...): a worker is a launch of one device so far, and this one has"
                f" {ranks}; use devices=1 and num_nodes=1, and start each worker by itself."
            )

    @property
    def replica_id(self) -> int:
        """This worker's number."""
        assert self._settings.replica_id is not None
        return self._settings.replica_id

    @property
    def membership(self) -> Membership | None:
        """Who lives, and what has been missed; None before the first fit."""
        return self._members

    @property
    def is_saver(self) -> bool:
        """Whether it writes checkpoints, as the living worker of the smallest number does."""
        return self._members is None or self.replica_id == min(self._members.living)

    def sampler_arguments(self, *, training: bool) -> dict[str, int]:
        """How data are shared out: each worker trains on its own share, or order, and validates on all."""
        size = self._settings.group_size
        if training and size is not None:
            return {"num_replicas": size, "rank": self.replica_id}
        if not training:
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": 1, "rank": 0, "seed": int(os.getenv("PL_GLOBAL_SEED", "0")) + self.replica_id}

    def make_sum(self, tau: int, timeout: float, wire_dtype: WireDtype | None) -> MakeSum:
        """Find the lighthouse, and make what makes the sum.

        Args:
            tau: τ.
            timeout: Seconds for which a worker that comes waits for the others.
            wire_dtype: What differences are rounded to on their way; None for nothing.

        Raises:
            ExchangeError: If there is no lighthouse, or a worker of this number is alive.
        """
        settings = self._settings
        assert settings.lighthouse is not None
        assert isinstance(settings.quorum_timeout, float)
        assert isinstance(settings.process_group_timeout, float)
        self._members = members = Membership(
            settings.lighthouse,
            self.replica_id,
            numbers=settings.group_size,
            min_replica_size=settings.min_replica_size,
            timeout=settings.process_group_timeout,
            strategy=self._strategy,
        )
        members.check()
        members.add_state("clocks", lambda: self._now, self._receive_clocks)
        members.add_state("values", self._hand_over, self._receive_values)
        return partial(
            MembershipSum,
            members=members,
            tau=tau,
            patience=settings.quorum_timeout,
            timeout=timeout,
            restart_after_missed=settings.restart_after_missed,
            make_addition=ExactAddition if wire_dtype is None else partial(CompressedAddition, wire_dtype=wire_dtype),
            strategy=self._strategy,
        )

    def _receive_clocks(self, clocks: dict[str, Any]) -> None:
        self._clocks = clocks  # by another thread

    def _receive_values(self, values: dict[str, Any]) -> None:
        self._values = values  # by another thread

    def _hand_over(self) -> dict[str, Any]:
        assert self._session is not None
        return self._session.hand_over()

    def enter(self, session: CenterSession, trainer: Any) -> None:
        """Before the first step: come to the others, and go on with their steps, epochs, schedules and buffers."""
        self._trainer, self._session = trainer, session
        self._clocks = self._values = None
        self.note_clocks()
        session.averaging.enter()
        if self._clocks is not None:
            go_on_at(trainer, self._clocks)
        if self._values is not None:
            session.take_over(self._values)
        self._values = None

    def note_clocks(self) -> None:
        """Before each step: keep how far this worker is, for one that comes.

        Read by another thread in the middle of a scheduler's step, rates and schedule would not belong together.
        """
        self._now = clocks_of(self._trainer)
