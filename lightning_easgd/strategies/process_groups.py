"""The process groups of a rank: that of all ranks, that of its worker, and who is missing if one of them fails."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, final

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_group, _get_default_store

from lightning_easgd.strategies.failures import first_line, is_of_process_group
from lightning_easgd.strategies.worker_group import WorkerGroup
from lightning_easgd.transport.channel import ExchangeError, Failure, OwnGroup
from lightning_easgd.transport.errors import StoreLostError
from lightning_easgd.transport.liveness import ENDED
from lightning_easgd.transport.roll_call import RollCall
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = ["ProcessGroups", "unbind_group"]


def unbind_group(backend: str) -> None:
    """Take gloo's process group from the GPU that Lightning has bound it to.

    Of a bound one torch makes the groups of some ranks by splitting it, which gloo cannot (torch 2.11).

    Args:
        backend: That of the default group.
    """
    if dist.is_initialized() and "nccl" not in backend:
        _get_default_group().bound_device_id = None


@final
class ProcessGroups:
    """What the ranks of one launch communicate in, beside the exchanges.

    A copy in another process is of no run: it has no group, and no store to call the roll on.

    Args:
        strategy: Name of the strategy, for errors.
        timeout: How long an operation may wait for the slowest rank.
    """

    def __init__(self, strategy: str, timeout: timedelta) -> None:
        self._strategy = strategy
        self._timeout = timeout
        self._rank = 0
        self._roll_call: RollCall | None = None  # from enter to leave
        self._inside: WorkerGroup | None = None  # while something is wrapped or sharded

    def __reduce__(self) -> tuple[Any, ...]:
        return ProcessGroups, (self._strategy, self._timeout)

    # Who is missing

    def enter(self, rank: int, size: int) -> None:
        """Enter this rank on the roll, once there is the group of all; they do it at the same point.

        Args:
            rank: This one.
            size: How many there are.
        """
        self._rank = rank
        with suppress(StoreLostError):  # a run without it names nobody
            self._roll_call = RollCall(_get_default_store(), rank, size)

    def fail(self, exception: BaseException) -> None:
        """Tell the others that this rank has failed, and why; an error that knows no reason of another's gets it."""
        if self._roll_call is None:
            return
        is_foreign = is_of_process_group(exception)
        if is_foreign or ENDED in str(exception):
            known = self.who_is_missing()
            if is_foreign or ENDED not in known:
                exception.add_note(f"{self._strategy}: {known}")
        self._roll_call.fail(first_line(exception))

    def leave(self) -> None:
        """Forget the roll: the run is over."""
        self._roll_call = None

    def who_is_missing(self) -> str:
        """A sentence on who is to blame when a collective operation has failed; empty if nobody can tell."""
        return "" if self._roll_call is None else self._roll_call.explain()

    @contextmanager
    def naming_the_missing(self, what: str) -> Iterator[None]:
        """Context of a collective operation of Lightning's: its error says who was missing, and what to do.

        Raises:
            ExchangeError: If it failed.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_of_process_group(error):
                raise
            raise ExchangeError(
                f"{self._strategy}(timeout={self._timeout}): a {what} of Lightning's failed on rank {self._rank}."
                f" {self.who_is_missing()} Cause: {error}"
            ) from error

    # The groups

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, in the order of the ranks."""
        return self._gather(value, None)

    def gather_inside(self, value: Any) -> list[Any]:
        """What each rank of this worker, which has several, gives, in their order."""
        assert self._inside is not None
        return self._gather(value, self._inside.group)

    def _gather(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        everyones: list[Any] = [None] * dist.get_world_size(group)
        with self.naming_the_missing("gathering"):
            dist.all_gather_object(everyones, value, group)
        return everyones

    @property
    def inside(self) -> WorkerGroup | None:
        """The group of the worker's ranks, while there is one."""
        return self._inside

    def open_inside(self, owner: str, backend: str, layout: WorkerLayout) -> WorkerGroup:
        """Make the group of the worker's ranks, which is there from now on; all ranks do it at the same point.

        Args:
            owner: As for :class:`WorkerGroup`.
            backend: Of the group.
            layout: Which ranks make up which worker.
        """
        if self._inside is None:
            failure = Failure(self._timeout, self._strategy, self.who_is_missing)
            self._inside = WorkerGroup(owner, OwnGroup(backend, failure, layout.inside))
        return self._inside

    def close_inside(self) -> None:
        """Give that group back; nothing is wrapped any more."""
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.close()
