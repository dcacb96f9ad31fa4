"""The parameters and buffers of a module that no averager holds: teachers, frozen weights, BatchNorm's statistics."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import final

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.averagers import Averager
from lightning_easgd.checksums import checksum

__all__ = ["OutsideValues", "ignored_names", "ignored_parameters"]


def ignored_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that the module's author keeps out of ``DistributedDataParallel``."""
    return frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


def ignored_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters among them."""
    names = ignored_names(module)
    return [parameter for name, parameter in module.named_parameters() if name in names]


@final
class OutsideValues:
    """Finds the tensors of a module that belong to the center without an averager, and those that nobody averages.

    Args:
        module: The module.
        averagers: The averagers of its parameters.
        optimizers: Gives the optimizers that the strategy knows.
        with_buffers: Whether buffers belong to the center, or stay each worker's own.
        strategy: Name of the strategy, for errors.
    """

    def __init__(
        self,
        module: nn.Module,
        averagers: Sequence[Averager],
        optimizers: Callable[[], Iterable[Optimizer]],
        *,
        with_buffers: bool,
        strategy: str,
    ) -> None:
        self._module = module
        self._averagers = averagers
        self._optimizers = optimizers
        self._with_buffers = with_buffers
        self._strategy = strategy
        self._unknown: dict[Tensor, str] = {}  # what an unknown optimizer has stepped, and the optimizer's class
        self._at_start = {name: checksum(p) for name, p in self._parameters().items() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters that no averager holds, and buffers, by name."""
        ignored = ignored_names(self._module)
        parameters = {name: p.detach() for name, p in self._parameters().items() if name not in ignored}
        return parameters | self.buffers()

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the center, by name."""
        if not self._with_buffers:
            return {}
        ignored = ignored_names(self._module)
        return {name: buffer.detach() for name, buffer in self._module.named_buffers() if name not in ignored}

    def averaged(self) -> dict[str, Tensor]:
        """The module's parameters that averagers hold, by name."""
        held = self._held()
        return {name: p.detach() for name, p in self._module.named_parameters() if id(p) in held}

    def note_step(self, optimizer: Optimizer) -> None:
        """Take notice of a step of an optimizer that the strategy does not know."""
        for group in optimizer.param_groups:
            self._unknown.update((parameter, type(optimizer).__name__) for parameter in group["params"])

    def check(self) -> None:
        """Raise if parameters have been trained that no averager holds: each rank would end with its own.

        That is, they have changed since the start, and an unknown optimizer has stepped them or they have a gradient.
        Teachers and targets, which are written to without one, have a common value instead.

        Raises:
            RuntimeError: It names them.
        """
        ignored = ignored_names(self._module)
        known = {id(p) for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]}
        trained = [
            name
            for name, p in self._parameters().items()
            if name not in ignored and p.requires_grad and id(p) not in known and self._is_trained(name, p)
        ]
        if not trained:
            return
        optimizers = sorted({self._unknown[p] for p in self._parameters().values() if p in self._unknown})
        by = f"by an optimizer ({', '.join(optimizers)}) that this strategy does not know" if optimizers else "by hand"
        raise RuntimeError(
            f"{self._strategy}: {_listed(trained)} have been trained {by}, so that nothing averages them and each rank"
            " has its own. Return their optimizer from configure_optimizers (with Fabric: fabric.setup), also if its"
            " steps are made by hand; parameters that are to stay each rank's own are named in the module's"
            " _ddp_params_and_buffers_to_ignore."
        )

    def _is_trained(self, name: str, parameter: Tensor) -> bool:
        if name not in self._at_start:  # it has come later
            return parameter in self._unknown
        stepped = parameter in self._unknown or parameter.grad is not None
        return stepped and checksum(parameter) != self._at_start[name]

    def _parameters(self) -> Mapping[str, nn.Parameter]:
        held = self._held()
        return {name: p for name, p in self._module.named_parameters() if id(p) not in held}

    def _held(self) -> set[int]:
        return {id(parameter) for averager in self._averagers for parameter in averager.parameters}


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
