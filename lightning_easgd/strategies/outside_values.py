"""The parameters and buffers of a module that no averager holds: teachers, frozen weights, BatchNorm's statistics."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from lightning_easgd.averagers import Averager, Averaging
from lightning_easgd.averagers.common_values import CommonValues
from lightning_easgd.strategies.spectral_norm import finite_vector, singular_vectors
from lightning_easgd.tensors.buffers import FiniteValues
from lightning_easgd.tensors.checksums import checksum
from lightning_easgd.tensors.memory import Memory
from lightning_easgd.tensors.shards import is_shard, reshard

__all__ = ["OutsideValues", "ignored_names", "listed"]


def ignored_names(module: nn.Module) -> frozenset[str]:
    """Names of the parameters and buffers that the module's author keeps out of ``DistributedDataParallel``."""
    return frozenset(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))


@final
class OutsideValues:
    """Finds the tensors of a module that belong to the center without an averager, and those that nobody averages.

    Args:
        module: The module.
        averagers: The averagers of its parameters.
        optimizers: Gives the optimizers that the strategy knows.
        ignored: Names of what stays each worker's own.
        with_buffers: Whether buffers belong to the center, or stay each worker's own.
        strategy: Name of the strategy, for errors.
    """

    def __init__(
        self,
        module: nn.Module,
        averagers: Sequence[Averager],
        optimizers: Callable[[], Iterable[Optimizer]],
        *,
        ignored: Collection[str],
        with_buffers: bool,
        strategy: str,
    ) -> None:
        self._module = module
        self._averagers = averagers
        self._known_optimizers = optimizers
        self._with_buffers = with_buffers
        self._strategy = strategy
        self._ignored = frozenset(ignored)
        self._unknown = WeakIdKeyDictionary()  # what an unknown optimizer has stepped, and the optimizer's class
        self._has_warned = False
        self._at_start = {name: checksum(p) for name, p in self._parameters().items() if p.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Parameters that no averager holds, and no memory of those that one holds, and buffers, by name."""
        parameters = {name: p.detach() for name, p in self._parameters().items() if name not in self._ignored}
        return parameters | self.buffers()

    def parameters(self) -> dict[str, Tensor]:
        """All parameters that do not stay each worker's own, by name."""
        return {name: p.detach() for name, p in reshard(self._module).named_parameters() if name not in self._ignored}

    def buffers(self) -> dict[str, Tensor]:
        """The buffers that belong to the center, by name; not those that lie in averaged parameters' memory."""
        if not self._with_buffers:
            return {}
        memory = self._memory()
        return {
            name: buffer.detach()
            for name, buffer in self._module.named_buffers()
            if name not in self._ignored and not memory.touches(buffer)
        }

    def apart(self) -> dict[str, Tensor]:
        """The module's parameters whose averagers have not exchanged yet, by name."""
        held = {id(p) for averager in self._averagers if not averager.has_exchanged for p in averager.parameters}
        return {name: p.detach() for name, p in reshard(self._module).named_parameters() if id(p) in held}

    def in_common(self, averaging: Averaging, finite: FiniteValues | None) -> CommonValues:
        """What belongs to the center beside what the averagers hold of it; all workers call this when they have met.

        Before the first exchange the center is where training began: the common value of the parameters is then the
        workers' mean.

        Args:
            averaging: That of the averagers.
            finite: Takes the common values as good ones.

        Raises:
            NonFiniteError: If the run ends because a worker that has not exchanged yet is not at a finite point.
        """
        tensors = self.tensors()
        if not averaging.has_exchanged:
            averaging.check_finite()
            tensors |= self.apart()
        common = self.common_values(averaging, tensors)
        if finite is not None:
            finite.update(common.values)
        if common.own and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{self._strategy}: {', '.join(sorted(common.own))} differ between the ranks in shape or dtype, or are"
                " not there on all of them. Each rank keeps its own, and checkpoints hold rank 0's."
            )
        return common

    def common_values(self, averaging: Averaging, tensors: Mapping[str, Tensor]) -> CommonValues:
        """What the workers' values of these tensors of the module have in common: of singular vectors rank 0's.

        Where rank 0's are not finite, others to begin with take their place, the same on all ranks.
        """
        names = {name for name in singular_vectors(self._module) & tensors.keys() if not is_shard(tensors[name])}
        vectors = {name: tensors[name].dtype for name in names}
        # Of integers, as which their bytes are seen, rank 0's are the common ones.
        seen = {name: tensors[name].contiguous().view(torch.uint8) for name in vectors}
        common = averaging.common_values({**tensors, **seen})
        values = {
            name: finite_vector(value.view(vectors[name])) if name in vectors else value
            for name, value in common.values.items()
        }
        return replace(common, values=values)

    def note_step(self, optimizer: Optimizer) -> None:
        """Take notice of a step of an optimizer that the strategy does not know."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._unknown[parameter] = type(optimizer).__name__

    def check(self) -> None:
        """Raise if parameters have been trained that no averager holds: each rank would end with its own.

        That is, they have changed since the start, and an unknown optimizer has stepped them or they have a gradient.
        Teachers and targets, which are written to without one, have a common value instead.

        Raises:
            RuntimeError: It names them.
        """
        groups = [group for optimizer in self._known_optimizers() for group in optimizer.param_groups]
        known = {id(parameter) for group in groups for parameter in group["params"]}
        trained = [
            name
            for name, p in self._parameters().items()
            if name not in self._ignored and id(p) not in known and self._is_trained(name, p)
        ]
        if not trained:
            return
        optimizers = sorted({self._unknown[p] for p in self._parameters().values() if p in self._unknown})
        by = f"by an optimizer ({', '.join(optimizers)}) that this strategy does not know" if optimizers else "by hand"
        raise RuntimeError(
            f"{self._strategy}: {listed(trained)} have been trained {by}, so that nothing averages them and each rank"
            " has its own. Return their optimizer from configure_optimizers (with Fabric: fabric.setup), also if its"
            " steps are made by hand. If they are no more than written to, such as a target network, make that clear by"
            " requires_grad_(False); those that are to stay each rank's own are named in the module's"
            " _ddp_params_and_buffers_to_ignore."
        )

    def _is_trained(self, name: str, parameter: Tensor) -> bool:
        if name not in self._at_start:  # it has come later, or was frozen
            return parameter in self._unknown
        stepped = parameter in self._unknown or (parameter.requires_grad and parameter.grad is not None)
        return stepped and checksum(parameter) != self._at_start[name]

    def _parameters(self) -> Mapping[str, nn.Parameter]:
        held, memory = self._held(), self._memory()
        named = reshard(self._module).named_parameters()
        return {name: p for name, p in named if id(p) not in held and not memory.touches(p)}

    def _held(self) -> set[int]:
        return {id(parameter) for averager in self._averagers for parameter in averager.parameters}

    def _memory(self) -> Memory:
        return Memory(parameter for averager in self._averagers for parameter in averager.parameters)


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
