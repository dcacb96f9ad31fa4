"""The process group of one worker's ranks, where it has several: what they do among themselves alone."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_easgd.strategies.outside_values import ignored_names, listed
from lightning_easgd.transport.channel import OwnGroup

__all__ = ["Modules", "WorkerGroup", "forget_buckets"]


class Modules:
    """Modules in an order, as long as somebody else has them; a copy has none.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        self._modules = [ref(module) for module in modules]

    def __reduce__(self) -> tuple[type["Modules"], tuple[()]]:
        return Modules, ()

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for each in self._modules if (module := each()) is not None)


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
        # Nothing is kept for this: what Fabric has wrapped may be trained again, or be gone.
        self._unreduced: list[tuple[ref[Tensor], str]] = []  # parameters that were frozen when DDP wrapped them
        self._left_out: list[tuple[ref[Tensor], str]] = []  # the same, of modules that are not trained now
        self._wrapped = Modules()
        self._seen: dict[int, ref[Tensor]] = {}  # all parameters that DDP wrapped, by their identity

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
        self.forget([module])
        self._wrapped = Modules([*self._wrapped, module])
        self._see(module.parameters())
        ignored = ignored_names(module)
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad and name not in ignored:
                self._unreduced.append((ref(parameter), name))

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

    def lacks(self, optimizers: Iterable[Optimizer]) -> bool:
        """Whether a module has parameters to be trained now that DDP, which has wrapped it before, does not reduce.

        Args:
            optimizers: Those that may have parameters which have been made since.
        """
        if any(parameter.requires_grad for parameter, _ in self._frozen()):
            return True
        made = set(self._made_since(optimizers))
        return bool(made) and any(parameter in made for module in self._wrapped for parameter in module.parameters())

    def check_reduced(self, optimizers: Iterable[Optimizer], remedy: str) -> None:
        """After a step: raise if it has moved these ranks apart; warn if it may have, where nobody can tell.

        Args:
            optimizers: Those of the training.
            remedy: What to do about it, for the error.

        Raises:
            RuntimeError: If a parameter that was frozen when DDP wrapped its module, or not in it, has a gradient, of
                this rank's data alone.
        """
        frozen = [name for p, name in self._frozen() if p.requires_grad and p.grad is not None]
        made = dict.fromkeys(p for p in self._made_since(optimizers) if p.grad is not None)
        if not frozen and not made:
            return
        known: dict[Tensor, str] = {p: name for module in self._wrapped for name, p in module.named_parameters()}
        added = [name for parameter, name in known.items() if parameter in made]
        if frozen or added:
            what = f"{listed(frozen)} were frozen" if frozen else f"{listed(added)} were not in it"
            raise RuntimeError(
                f"{self._owner}: {what} when DDP wrapped the module, so that nothing reduces their gradients over the"
                f" ranks of a worker; {remedy}."
            )
        self._see(made)
        shapes = listed(str(tuple(parameter.shape)) for parameter in made)
        rank_zero_warn(
            f"{self._owner}: no module has some of the optimizers' parameters (of the shapes {shapes}): nothing reduces"
            " their gradients over the ranks of a worker, so that these train each its own, unless they are made of"
            " gradients that are reduced. Have the module hold them."
        )

    def _made_since(self, optimizers: Iterable[Optimizer]) -> list[Tensor]:
        """The parameters of optimizers that no module had when DDP wrapped it."""
        if not any(True for _ in self._wrapped):
            return []
        seen = self._seen  # looked into twice a step
        groups = (group["params"] for optimizer in optimizers for group in optimizer.param_groups)
        return [p for group in groups for p in group if (known := seen.get(id(p))) is None or known() is not p]

    def _see(self, parameters: Iterable[Tensor]) -> None:
        self._seen |= {id(parameter): ref(parameter) for parameter in parameters}

    def _frozen(self) -> Iterator[tuple[Tensor, str]]:
        return ((parameter, name) for each, name in self._unreduced if (parameter := each()) is not None)

    def forget(self, modules: Iterable[nn.Module]) -> None:
        """Take notice that some modules are about to be wrapped again."""
        gone = set(modules)
        if gone.isdisjoint(self._wrapped):
            return
        self._wrapped = Modules(module for module in self._wrapped if module not in gone)
        left = {parameter for module in self._wrapped for parameter in module.parameters()}
        self._unreduced = [(each, name) for each, name in self._unreduced if each() in left]
        self._left_out = [(each, name) for each, name in self._left_out if each() in left]
        self._seen = {number: each for number, each in self._seen.items() if each() in left}

    def leave_out(self, modules: Iterable[nn.Module]) -> None:
        """Take notice of which modules a training is not of; those of another one may be of it again."""
        others = set(modules)
        trained = {parameter for module in self._wrapped if module not in others for parameter in module.parameters()}
        without = {parameter for module in others for parameter in module.parameters()} - trained
        known = self._unreduced + self._left_out
        self._unreduced = [(each, name) for each, name in known if each() not in without]
        self._left_out = [(each, name) for each, name in known if each() in without]

    def unwrap(self) -> None:
        """Take notice that no module is wrapped any more."""
        self._unreduced.clear()
        self._left_out.clear()
        self._wrapped = Modules()
        self._seen.clear()

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


def forget_buckets(state: Any) -> None:
    """Let the state of a communication hook begin anew where DDP is about to cut other buckets: that of PowerSGD.

    It keeps by a bucket's number what is of the parameters in it. Its first steps reduce without it again, as torch
    cuts the buckets once more after the first one.

    Args:
        state: The state of any hook.
    """
    if isinstance(state, PowerSGDState):
        for kept in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            kept.clear()
        state.iter = 0
