"""The center variable: flat storage with a named view for each parameter."""

import math
from collections.abc import Container, Sequence
from itertools import chain
from typing import final

import torch
from torch import Tensor

from lightning_easgd.tensors.shards import local, sharded_like

__all__ = ["FlatTensors", "all_finite", "as_parameter", "as_real", "center_dtype"]


def center_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the center of these parameters: float32, or float64 if one of them, or its parts, is that wide.

    A center in bfloat16 would lose the differences α(x - x̃) to rounding.
    """
    return torch.float64 if any(as_real(tensor).dtype == torch.float64 for tensor in tensors) else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """A view of a complex tensor as a real one, whose last dimension is 2; a real tensor as it is.

    Of a shard it is this rank's part.
    """
    tensor = local(tensor)
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def as_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A value of the center in the parameter's form: for a complex parameter a complex copy, else the value itself."""
    value = torch.view_as_complex(value.contiguous().clone()) if parameter.is_complex() else value
    return sharded_like(value, parameter)


def all_finite(tensors: Sequence[Tensor], norms: Sequence[Tensor] | None = None) -> bool:
    """Whether all elements are finite; it waits for the tensors' device.

    Args:
        tensors: Floating-point or complex ones.
        norms: Norms of their parts, where they have been taken: if these are finite, the tensors are.
    """
    tensors = [as_real(tensor).detach() for tensor in tensors]
    if norms is None:
        norms = list(torch._foreach_norm(tensors)) if tensors else []
    if all(math.isfinite(norm) for norm in norms):
        return True
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)  # large squares may have been too large


@final
class FlatTensors:
    """One contiguous buffer, seen as one tensor for each parameter of an optimizer; complex ones as :func:`as_real`.

    The buffer is what travels and what whole-model arithmetic runs on: one kernel instead of one for each parameter.

    Args:
        groups: The parameters, in the optimizer's groups, real; there may be none. Only shapes and device are read.
        dtype: Dtype of the buffer.
        device: Where the buffer is; None for the parameters' device. Host memory beside a GPU is pinned.
        memory: A tensor to use as the buffer, of that dtype and size, instead of a new one, which is all zeros.

    Attributes:
        flat: The buffer, shape (number of elements,).
        groups: Views of it with the parameters' shapes, in the given groups.
        segments: For each group the part of ``flat`` that holds it, shape (elements of the group,).
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        device: str | None = None,
        memory: Tensor | None = None,
    ) -> None:
        sizes = [[parameter.numel() for parameter in group] for group in groups]
        if memory is None:
            first = next(chain.from_iterable(groups), None)
            place = torch.device("cpu") if first is None else first.device
            pinned = device == "cpu" and place.type == "cuda"
            memory = torch.zeros(sum(map(sum, sizes)), dtype=dtype, device=device or place, pin_memory=pinned)
        self.flat = memory
        self.segments = list(torch.split(self.flat, [sum(group) for group in sizes]))
        self.groups = [
            [part.view(parameter.shape) for part, parameter in zip(torch.split(segment, size), group, strict=True)]
            for segment, size, group in zip(self.segments, sizes, groups, strict=True)
        ]

    def like(self, memory: Tensor | None = None) -> "FlatTensors":
        """Another buffer of the same layout, dtype and device, pinned if this one is.

        Args:
            memory: As for the class.
        """
        if memory is None:
            memory = torch.zeros_like(self.flat, pin_memory=self.flat.is_pinned())
        return FlatTensors(self.groups, self.flat.dtype, memory=memory)

    def only(self, groups: Container[int]) -> "FlatTensors":
        """The same buffer without the views of the other groups, which are empty then."""
        part = FlatTensors(self.groups, self.flat.dtype, memory=self.flat)
        part.groups = [group if number in groups else [] for number, group in enumerate(part.groups)]
        return part

    @property
    def views(self) -> list[Tensor]:
        """The views of all groups in one list."""
        return list(chain.from_iterable(self.groups))

    def load_(self, tensors: Sequence[Tensor]) -> None:
        """Copy one tensor for each view into the buffer."""
        real = [as_real(tensor) for tensor in tensors]
        if real and real[0].is_cuda and not self.flat.is_cuda:  # one wait for all; together they would wait for each
            for view, tensor in zip(self.views, real, strict=True):
                view.copy_(tensor, non_blocking=True)
            torch.cuda.current_stream(real[0].device).synchronize()
        elif real:
            torch._foreach_copy_(self.views, real)

    def store(self, tensors: Sequence[Tensor]) -> None:
        """Copy the buffer out into one tensor for each view, rounding to their dtypes."""
        if self.views:
            torch._foreach_copy_([as_real(tensor) for tensor in tensors], self.views)
