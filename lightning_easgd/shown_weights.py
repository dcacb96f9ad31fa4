"""Which weights the module shows: the worker's own, or the center's."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn

from lightning_easgd.averagers import Averager
from lightning_easgd.buffers import KeptBuffer, keep_buffers, load_buffers, restore_buffers

__all__ = ["ShownWeights"]


@final
class ShownWeights:
    """Switches a module between the worker's parameters and buffers and those of the center, by copying.

    The tensors keep their addresses, which compiled modules and CUDA graphs rely on.

    Args:
        module: The module.
        averagers: The averagers that hold its parameters' center.

    Attributes:
        center: Whether the module shows the center.
    """

    def __init__(self, module: nn.Module, averagers: Sequence[Averager]) -> None:
        self._module = module
        self._averagers = averagers
        self._worker_buffers: list[KeptBuffer] = []
        self.center = False

    def show_center(self, buffers: Sequence[Tensor]) -> None:
        """Show the center, with these values of the module's buffers."""
        for averager in self._averagers:
            averager.show_center()
        self._worker_buffers = keep_buffers(self._module)
        load_buffers(self._module, buffers)
        self.center = True

    def is_center(self, buffers: Sequence[Tensor]) -> bool:
        """Whether the module holds the center and these buffers, bit for bit: nobody has written to it since."""
        values = [value for averager in self._averagers for value in averager.center_values()]
        held = [parameter.detach() for averager in self._averagers for parameter in averager.parameters]
        pairs = zip([*values, *buffers], [*held, *self._module.buffers()], strict=True)
        return self.center and all(
            torch.equal(value.to(tensor.device, tensor.dtype), tensor) for value, tensor in pairs
        )

    def show_worker(self) -> None:
        """Show the worker's own values, bit for bit those of before :meth:`show_center`."""
        self._load_worker()
        self.center = False

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        """Context in which the module shows the worker; afterwards exactly what it showed before."""
        if not self.center:
            yield
            return
        parameters = [parameter for averager in self._averagers for parameter in averager.parameters]
        values = [parameter.detach().clone() for parameter in parameters]
        buffers = keep_buffers(self._module)
        self._load_worker()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, values)
            restore_buffers(buffers)

    def _load_worker(self) -> None:
        for averager in reversed(self._averagers):  # a parameter that two optimizers share was kept twice
            averager.show_worker()
        restore_buffers(self._worker_buffers)
