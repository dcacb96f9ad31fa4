"""The center's buffers, such as BatchNorm's running statistics: common to all workers, made when they are needed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_easgd.averagers.channel import Channel

__all__ = ["common_buffers", "copy_buffers", "load_buffers"]


def common_buffers(module: nn.Module, channel: "Channel") -> list[Tensor]:
    """The values of the module's buffers at the center: the workers' mean, of integer buffers rank 0's value.

    The sum is taken in float64, so that a buffer which is the same everywhere keeps its bits.

    Args:
        module: The module; ``module.buffers()`` gives the order of the result.
        channel: Reduces a CPU tensor. All workers call this at the same point.

    Returns:
        One new tensor for each buffer, of its shape, dtype and device.
    """
    buffers = [_as_real(buffer.detach()) for buffer in module.buffers()]
    if not buffers:
        return []
    # Integers travel as rank 0's value plus the others' zeros: float64 holds them exactly up to 2^53.
    flat = torch.cat(
        [
            buffer.to("cpu", torch.float64).flatten() * (buffer.is_floating_point() or channel.rank == 0)
            for buffer in buffers
        ]
    )
    channel.sum(flat).wait()
    totals = torch.split(flat, [buffer.numel() for buffer in buffers])
    values = [
        total / channel.size if buffer.is_floating_point() else total
        for buffer, total in zip(buffers, totals, strict=True)
    ]
    return [
        _like(value.view(buffer.shape).to(buffer.device, buffer.dtype), original)
        for value, buffer, original in zip(values, buffers, module.buffers(), strict=True)
    ]


def copy_buffers(module: nn.Module) -> list[Tensor]:
    """Copies of the module's buffers, in the order of ``module.buffers()``."""
    return [buffer.detach().clone() for buffer in module.buffers()]


def load_buffers(module: nn.Module, values: Iterable[Tensor]) -> None:
    """Copy values into the module's buffers, in the order of ``module.buffers()``."""
    with torch.no_grad():
        for buffer, value in zip(module.buffers(), values, strict=True):
            buffer.copy_(value)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(value: Tensor, original: Tensor) -> Tensor:
    return torch.view_as_complex(value) if original.is_complex() else value
