"""The center variable: flat storage with a named view for each parameter."""

from collections.abc import Sequence
from itertools import chain
from typing import final

import torch
from torch import Tensor

__all__ = ["FlatTensors", "center_dtype"]


def center_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the center of these parameters: float32, or float64 if one of them is that wide.

    A center in bfloat16 would lose the differences α(x - x̃) to rounding.

    Raises:
        TypeError: If a parameter is not real floating-point.
    """
    dtype = torch.float32
    for tensor in tensors:
        if not tensor.is_floating_point():
            raise TypeError(
                f"EASGDStrategy: a parameter of dtype {tensor.dtype} and shape {tuple(tensor.shape)} cannot be"
                " averaged; keep it out of the optimizer, or store it as real floating-point numbers."
            )
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@final
class FlatTensors:
    """One contiguous buffer, seen as one tensor for each parameter of an optimizer.

    The buffer is what travels and what whole-model arithmetic runs on: one kernel instead of one for each parameter.

    Args:
        groups: The parameters, in the optimizer's groups. Only shapes and device are read.
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
            place = next(chain.from_iterable(groups)).device
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

    @property
    def views(self) -> list[Tensor]:
        """The views of all groups in one list."""
        return list(chain.from_iterable(self.groups))

    def load_(self, tensors: Sequence[Tensor]) -> None:
        """Copy one tensor for each view into the buffer."""
        torch._foreach_copy_(self.views, list(tensors))

    def store(self, tensors: Sequence[Tensor]) -> None:
        """Copy the buffer out into one tensor for each view, rounding to their dtypes."""
        torch._foreach_copy_(list(tensors), self.views)
