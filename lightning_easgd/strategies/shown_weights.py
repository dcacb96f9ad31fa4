"""Which weights the module shows: the worker's own, or the center's."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_easgd.averagers import Averager
from lightning_easgd.strategies.spectral_norm import iterate_power_method
from lightning_easgd.tensors.buffers import KeptBuffer, keep_buffers, load_buffers, make_writable, restore_buffers
from lightning_easgd.tensors.checksums import checksum
from lightning_easgd.tensors.shards import is_shard, local, reshard, sharded_like

__all__ = ["ShownWeights", "at_known_center"]

_SHOWN = itertools.count(2**30, 2**8)
"""What torch counts a tensor's writes from while it shows the center: more than there are in training."""


@final
class ShownWeights:
    """Switches a module between the worker's parameters and buffers and those of the center, by copying.

    The tensors keep their addresses, which compiled modules and CUDA graphs rely on. What FSDP2's modules have gathered
    is given up before each switch: a forward pass without a backward pass leaves whole parameters there, which would be
    computed with, and trained on, in place of what is switched to. What the worker has computed may be differentiated
    when it is back, bit for bit, as if nothing had been written; what was computed at the center may not.

    Args:
        module: The module.
        averagers: The averagers that hold its parameters' center.
        keeps_writes: Whether a buffer that is written to while the center is shown, such as a threshold that a
            validation sets, is the worker's from then on; else the worker's own comes back.

    Attributes:
        center: Whether the module shows the center.
    """

    def __init__(self, module: nn.Module, averagers: Sequence[Averager], *, keeps_writes: bool = False) -> None:
        self._module = module
        self._averagers = averagers
        self._keeps_writes = keeps_writes
        self._worker_buffers: list[KeptBuffer] = []
        self._sums: list[int | None] = []  # of what is shown in place of each
        self._written: list[KeptBuffer] = []  # since then
        self._not_common: frozenset[str] = frozenset()  # calibrated, or written to on another rank
        self._holds_center = True
        self._worker_parameters: dict[Tensor, Tensor] = {}  # beside those that the averagers keep
        self._common: Mapping[str, Tensor] = {}
        self._versions: list[tuple[Tensor, int]] = []  # of the worker's tensors
        self._show_again: Callable[[], None] = _do_nothing  # what is shown, inside of worker()
        self.center = False

    @torch.no_grad()
    def show_center(self, common: Mapping[str, Tensor]) -> None:
        """Show the center, with these values of buffers and parameters by their names, in place of the averagers'."""
        reshard(self._module)
        self._versions = _versions(self._module)
        self._worker_buffers = keep_buffers(self._module)  # first: one may be a view of a parameter
        # What has gone to another optimizer is shown by that one's averager: last.
        self._averagers = sorted(self._averagers, key=lambda averager: not averager.has_departed)
        for averager in self._averagers:
            averager.show_center()
        kept = {id(parameter) for averager in self._averagers for parameter in averager.parameters}
        self._common = common
        self._worker_parameters = {
            parameter: parameter.detach().clone() for parameter, _ in self._replaced() if id(parameter) not in kept
        }
        for parameter, value in self._replaced():
            local(parameter).copy_(local(value))
        load_buffers(self._module, common)
        iterate_power_method(self._module, common)
        self._count_writes_anew()
        self.center = True
        self._sums = self._sums_of_buffers()

    def note_calibration(self) -> None:
        """What has been written to buffers since :meth:`show_center` is the center's."""
        self._not_common = self.altered
        self._sums = self._sums_of_buffers()

    def note_writes_elsewhere(self, names: Collection[str]) -> None:
        """Take notice of buffers that other ranks have written to: this rank's is no common value any more."""
        self._not_common |= frozenset(names)

    @property
    def altered(self) -> frozenset[str]:
        """Names of the buffers whose values in the center are not those that workers had in common."""
        if self.center:
            self._look_for_writes()
        prefixes = {owner: f"{prefix}." if prefix else "" for prefix, owner in self._module.named_modules()}
        # A validation may have taken a module away.
        written = (each for each in self._written if each.owner in prefixes)
        return self._not_common | {prefixes[each.owner] + each.name for each in written}

    @property
    def holds_center(self) -> bool:
        """Whether the parameters still are the averagers' center: a forward pass may renormalize them, for one."""
        if self.center:
            self._holds_center = all(
                torch.equal(local(parameter), local(value).to(parameter.device, parameter.dtype))
                for averager in self._averagers
                for parameter, value in zip(averager.parameters, averager.center_values(), strict=True)
            )
        return self._holds_center

    def values(self) -> dict[Tensor, Tensor]:
        """What is shown of each parameter that has a center or a common value."""
        pairs = [pair for each in self._averagers for pair in zip(each.parameters, each.center_values(), strict=True)]
        return dict(pairs) | dict(self._replaced())

    def show_worker(self) -> None:
        """Show the worker's own values, bit for bit those of before :meth:`show_center`."""
        self._load_worker()

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        """Context in which the module shows the worker; afterwards exactly what it showed before."""
        if not self.center:
            yield
            return
        reshard(self._module)
        self._holds_center = self.holds_center
        shown = {parameter: parameter.detach().clone() for parameter in self.values()}
        buffers = keep_buffers(self._module)

        def show_again() -> None:
            reshard(self._module)
            restore_buffers(buffers)
            _load(shown)
            self._count_writes_anew()
            self.center = True

        self._load_worker()
        outer, self._show_again = self._show_again, show_again
        try:
            yield
        finally:
            show_again()
            self._show_again = outer  # a circle would keep a copy of the model

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Context in which the module shows what it does outside of :meth:`worker`, also inside of that."""
        if self.center:
            yield
            return
        self._show_again()
        try:
            yield
        finally:
            self._load_worker()

    def _replaced(self) -> list[tuple[Tensor, Tensor]]:
        parameters = dict(self._module.named_parameters())
        return [
            (parameters[name], sharded_like(value, parameters[name]))
            for name, value in self._common.items()
            if name in parameters
        ]

    def _sums_of_buffers(self) -> list[int | None]:
        buffers = [each.owner._buffers.get(each.name) for each in self._worker_buffers]
        return [None if buffer is None else checksum(buffer) for buffer in buffers]

    def _look_for_writes(self) -> None:
        now = zip(self._worker_buffers, self._sums, self._sums_of_buffers(), strict=True)
        self._written = [each for each, shown, value in now if value != shown]

    def _load_worker(self) -> None:
        reshard(self._module)
        self._look_for_writes()
        stay = {id(each) for each in self._written} if self._keeps_writes else set()
        restore_buffers([each for each in self._worker_buffers if id(each) not in stay])
        make_writable([each for each in self._worker_buffers if id(each) in stay])
        self.center = False
        for averager in reversed(self._averagers):  # a parameter that two optimizers share was kept twice
            averager.show_worker()
        _load(self._worker_parameters)
        written = {id(each.buffer) for each in self._worker_buffers if id(each) in stay}
        _set_versions([(tensor, version) for tensor, version in self._versions if id(tensor) not in written])

    def _count_writes_anew(self) -> None:
        start = next(_SHOWN)
        _set_versions([(tensor, start) for tensor, _ in self._versions])


def _do_nothing() -> None:
    """Where nothing is shown yet."""


@torch.no_grad()
def _load(values: Mapping[Tensor, Tensor]) -> None:
    for tensor, value in values.items():
        local(tensor).copy_(local(value))


def _versions(module: nn.Module) -> list[tuple[Tensor, int]]:
    """How often each parameter and buffer has been written to, by which torch knows what it cannot differentiate."""
    tensors = (*module.parameters(), *module.buffers())
    return [(tensor, tensor._version) for tensor in tensors if not (is_shard(tensor) or tensor.is_inference())]


def _set_versions(versions: Sequence[tuple[Tensor, int]]) -> None:
    if versions:
        torch._C._autograd._unsafe_set_version_counter(*zip(*versions, strict=True))


def at_known_center(averagers: Sequence[Averager], read: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A module's state at the center as this rank knows it, in the middle of anything; buffers are this rank's.

    The parameters only point to the center meanwhile, whatever the module makes of them in its state: a step that
    is under way has noted how often they were written to, and where.

    Args:
        averagers: Of the module's optimizers.
        read: Reads the module's state.

    Returns:
        A copy of it.
    """
    pairs = [
        (parameter, center.to(parameter.device, parameter.dtype, copy=True))
        for averager in averagers
        for parameter, center in zip(averager.parameters, averager.center_values(), strict=True)
    ]
    own = [parameter.data for parameter, _ in pairs]
    try:
        for parameter, center in pairs:
            parameter.data = center
        return copy.deepcopy(read())
    finally:
        for (parameter, _), value in zip(pairs, own, strict=True):
            parameter.data = value
