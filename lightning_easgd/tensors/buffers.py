"""A module's buffers as they were: kept while it shows others, and put back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from lightning_easgd.tensors.shards import local

__all__ = [
    "FiniteValues",
    "KeptBuffer",
    "can_be_written",
    "keep_buffers",
    "load_buffers",
    "make_writable",
    "restore_buffers",
]


@final
@dataclass(frozen=True)
class KeptBuffer:
    """A buffer as it was: the tensor object, where it hung, and its value."""

    owner: nn.Module
    name: str
    buffer: Tensor
    value: Tensor


def keep_buffers(module: nn.Module) -> list[KeptBuffer]:
    """Remember the module's buffers and their values."""
    return [
        KeptBuffer(owner, name, buffer, buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None
    ]


@torch.no_grad()
def restore_buffers(kept: Sequence[KeptBuffer]) -> None:
    """Put remembered buffers back, values and objects; buffers that have come since stay as they are.

    A buffer that has got another shape or dtype gets its old one back.
    """
    for each in kept:
        if (each.buffer.shape, each.buffer.dtype) != (each.value.shape, each.value.dtype):
            each.buffer.data = each.value.clone()
        elif can_be_written(each.buffer) or each.buffer.layout is not torch.strided:
            each.buffer.copy_(each.value)
        each.owner._buffers[each.name] = each.buffer


def make_writable(kept: Sequence[KeptBuffer]) -> None:
    """Make plain tensors of what inference mode has left in place of buffers: training may write to them."""
    made: dict[Tensor, Tensor] = {}  # two modules may have one buffer
    with torch.inference_mode(False):
        for each in kept:
            buffer = each.owner._buffers.get(each.name)
            if buffer is not None and buffer.is_inference():
                if buffer not in made:
                    made[buffer] = buffer.clone()
                each.owner._buffers[each.name] = made[buffer]


@torch.no_grad()
def load_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into the module's buffers of these names; of buffers that are shards these are this rank's parts."""
    buffers = dict(module.named_buffers())
    for name in buffers.keys() & values.keys():
        local(buffers[name]).copy_(values[name])


@final
class FiniteValues:
    """The last finite values of a worker's floating-point tensors that no averager holds.

    Args:
        tensors: Gives the tensors as they are now, by name; they are good when this is made.
    """

    def __init__(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        self._tensors = tensors
        self._values = {name: each.clone() for name, each in tensors().items() if each.is_floating_point()}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Remember other values of these names, whatever else is among them."""
        self._values |= {name: values[name] for name in self._values.keys() & values.keys()}

    @torch.no_grad()
    def mend(self) -> None:
        """Put the remembered values into tensors that are not finite any more."""
        for name, tensor in self._tensors().items():
            value = self._values.get(name)
            if value is not None and value.shape == tensor.shape and not torch.isfinite(tensor).all():
                tensor.copy_(value)


def can_be_written(tensor: Tensor) -> bool:
    """Whether values can be copied into a tensor: it is dense, and no elements share memory (``expand``)."""
    return tensor.layout is torch.strided and not any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
