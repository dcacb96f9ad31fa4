"""The process group of one worker's ranks, where it has several: what they do among themselves alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_easgd.strategies.outside_values import ignored_names, listed
from lightning_easgd.transport.channel import OwnGroup

__all__ = ["WorkerGroup"]


class WorkerGroup:
    """The process group of a worker's ranks: who communicates in it, and what DDP reduces in it.

    Args:
        owner: Name of the strategy with the argument that makes a worker of several ranks, for errors.
        group: The group.
    """

    def __init__(self, owner: str, group: OwnGroup) -> None:
        self._owner = owner
        self._own_group = group
        self._borrowers: list[Any] = []
        self._unreduced: dict[Tensor, str] = {}  # parameters that were frozen when DDP wrapped them

    @property
    def group(self) -> dist.ProcessGroup:
        """The group, for ``torch.distributed``."""
        return self._own_group.group

    @contextmanager
    def reducing(self, module: nn.Module, ddp_arguments: dict[str, Any]) -> Iterator[None]:
        """Context in which DDP wraps a module: its gradients are reduced over these ranks alone.

        Args:
            module: The module.
            ddp_arguments: Those of the wrapper, which get the group for as long as it takes.
        """
        self.synchronize(module)
        ddp_arguments["process_group"] = self.group
        try:
            yield
        finally:
            del ddp_arguments["process_group"]  # it cannot go to another process
        ignored = ignored_names(module)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad and name not in ignored:
                self._unreduced[parameter] = name

    def register_hook(
        self,
        model: DistributedDataParallel,
        hook: Callable[..., Any],
        state: Any = None,
        wrapper: Callable[..., Any] | None = None,
    ) -> None:
        """Register a communication hook of DDP's, which reduces over these ranks.

        Args:
            model: What DDP has wrapped.
            hook: The hook.
            state: Its state; None for the group. One without a process group is lent it.
            wrapper: Makes another hook of it.
        """
        state = self.group if state is None else state
        if hasattr(state, "process_group"):
            self.lend([state])
        model.register_comm_hook(state, hook if wrapper is None else wrapper(hook))

    @property
    def unfrozen(self) -> list[str]:
        """Names of the parameters that are to be trained now and that DDP, which skips frozen ones, does not reduce."""
        return [name for parameter, name in self._unreduced.items() if parameter.requires_grad]

    def check_reduced(self, remedy: str) -> None:
        """After a step: raise if it has moved these ranks apart.

        Args:
            remedy: What to do about it, for the error.

        Raises:
            RuntimeError: If a parameter that was frozen when DDP wrapped it has a gradient, of this rank's data alone.
        """
        names = [name for p, name in self._unreduced.items() if p.requires_grad and p.grad is not None]
        if names:
            raise RuntimeError(
                f"{self._owner}: {listed(names)} were frozen when DDP wrapped the module, so that nothing reduces their"
                f" gradients over the ranks of a worker; {remedy}."
            )

    def unwrap(self) -> None:
        """Take notice that no module is wrapped any more."""
        self._unreduced.clear()

    def synchronize(self, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        """Let a module's SyncBatchNorm layers communicate in a group, but for those that have one already.

        Args:
            module: The module.
            group: Some of these ranks; None for all.
        """
        self.lend((part for part in module.modules() if isinstance(part, nn.SyncBatchNorm)), group)

    def lend(self, borrowers: Iterable[Any], group: dist.ProcessGroup | None = None) -> None:
        """Give a group to those that have none, until :meth:`take_back`: they may outlive it.

        Args:
            borrowers: Objects with a ``process_group``.
            group: As for :meth:`synchronize`.
        """
        for borrower in borrowers:
            if borrower.process_group is None:
                borrower.process_group = group or self.group
                self._borrowers.append(borrower)

    def take_back(self) -> None:
        """Take back the groups that have been lent."""
        for borrower in self._borrowers:
            borrower.process_group = None
        self._borrowers.clear()

    def close(self) -> None:
        """Give the group back; nothing is wrapped any more."""
        self.unwrap()
        self.take_back()
        self._own_group.close()
