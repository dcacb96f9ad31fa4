"""The modules that a training of Fabric's is of: the user sets them up, and may train them again."""

from collections.abc import Iterable, Sequence
from typing import final

from torch import nn
from torch.optim import Optimizer

from lightning_easgd.strategies.outside_values import ignored_names
from lightning_easgd.strategies.worker_group import Modules
from lightning_easgd.tensors.shards import reshard

__all__ = ["FabricModules"]


@final
class FabricModules:
    """The modules that have been set up for a training, and those of trainings before that it trains, too.

    Attributes:
        ended: Modules of trainings before; nothing is kept for them.
    """

    def __init__(self) -> None:
        self._trained: list[nn.Module] = []
        self.ended = Modules()

    def add(self, modules: Iterable[nn.Module]) -> bool:
        """Add modules that have been set up, unless those that are trained have all of it; whether there were any."""
        count = len(self._trained)
        for module in modules:
            if not _is_part(module, self._trained):
                self._trained.append(module)
        return len(self._trained) > count

    def take_up(self, optimizers: Sequence[Optimizer]) -> None:
        """Train modules of before, too, that these optimizers have, and that were not set up anew."""
        self._trained = self._trained_with(optimizers)
        self.ended = Modules(module for module in self.ended if module not in self._trained)

    def end(self) -> None:
        """End a training."""
        self.ended = Modules([*self.ended, *self._trained])
        self._trained = []

    def has(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> bool:
        """Whether a module is trained, as it was set up or as that returned it, where these optimizers are taken up.

        A part of one is, too.
        """
        module = getattr(module, "_orig_mod", module)  # torch.compile's, of which Fabric sets up what is inside
        trained = self._trained_with(optimizers)
        return getattr(module, "module", None) in trained or _is_part(module, trained)

    def whole(self) -> nn.Module:
        """The module, or all of them as one."""
        return self._trained[0] if len(self._trained) == 1 else nn.ModuleList(self._trained)

    @property
    def ignored_names(self) -> frozenset[str]:
        """What of :meth:`whole` the modules themselves have said to be ignored."""
        if len(self._trained) == 1:
            return ignored_names(self._trained[0])
        return frozenset(
            f"{number}.{name}" for number, each in enumerate(self._trained) for name in ignored_names(each)
        )

    def _trained_with(self, optimizers: Sequence[Optimizer]) -> list[nn.Module]:
        modules = [*self._trained]
        parameters = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        for module in self.ended if parameters else ():
            unknown = parameters - {id(parameter) for each in modules for parameter in reshard(each).parameters()}
            if any(id(parameter) in unknown for parameter in reshard(module).parameters()):
                modules.append(module)
        return modules


def _is_part(module: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Whether a module is one of these, or has nothing of its own beside them."""
    tensors, theirs = _tensors(module), set().union(*map(_tensors, modules))
    return module in modules or (bool(tensors) and tensors <= theirs)


def _tensors(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*reshard(module).parameters(), *module.buffers())}
