"""What becomes common to all workers beside the parameters, such as BatchNorm's statistics: made when needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_easgd.averagers.channel import Channel

__all__ = ["KeptBuffer", "common_values", "keep_buffers", "load_buffers", "restore_buffers"]


def common_values(tensors: Sequence[Tensor], channel: "Channel") -> list[Tensor]:
    """One value of each tensor for all workers: the workers' mean, of integer tensors rank 0's value.

    The mean is taken in float64, so that a tensor of float32 or less that is the same everywhere keeps its bits.

    Args:
        tensors: As many and of the same shapes on every worker.
        channel: Reduces CPU tensors. All workers call this at the same point.

    Returns:
        One new tensor for each, of its shape, dtype and device.
    """
    values = [_as_real(tensor.detach()) for tensor in tensors]
    real = [value for value in values if value.is_floating_point()]
    whole = [value for value in values if not value.is_floating_point()]
    means = iter(_sum(real, torch.float64, channel))
    # Rank 0's integers plus the others' zeros.
    firsts = iter(_sum(whole if channel.rank == 0 else [torch.zeros_like(w) for w in whole], torch.int64, channel))
    return [
        _like(next(means) / channel.size if value.is_floating_point() else next(firsts), original)
        for value, original in zip(values, tensors, strict=True)
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
    """Put remembered buffers back, values and objects; buffers that have come since stay as they are."""
    for buffer in kept:
        buffer.buffer.copy_(buffer.value)
        buffer.owner._buffers[buffer.name] = buffer.buffer


@torch.no_grad()
def load_buffers(module: nn.Module, values: Sequence[Tensor]) -> None:
    """Copy values into the module's buffers, in the order of ``module.buffers()``."""
    for buffer, value in zip(module.buffers(), values, strict=True):
        buffer.copy_(value)


def _sum(tensors: list[Tensor], dtype: torch.dtype, channel: "Channel") -> list[Tensor]:
    """The sum of each tensor over all workers, in this dtype and on the CPU."""
    if not tensors:
        return []
    flat = torch.cat([tensor.to("cpu", dtype).flatten() for tensor in tensors])
    channel.sum(flat).wait()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(value: Tensor, original: Tensor) -> Tensor:
    value = torch.view_as_complex(value) if original.is_complex() else value
    return value.to(original.device, original.dtype)
