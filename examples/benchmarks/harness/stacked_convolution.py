"""Convolutions that stay fast under vmap: patches of the images times the weights, one matrix product for each worker.

vmap makes a grouped convolution of p convolutions with weights of their own, for which cuDNN has few fast kernels.
"""

import copy
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

__all__ = ["with_patches"]

_REACHED = 2**31 - 1


def with_patches(network: nn.Module) -> nn.Module:
    """A copy of a network whose convolutions are matrix products; names and order of its parameters are the same."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, _PatchConvolution(child))
    return network


@final
class _PatchConvolution(nn.Module):
    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        assert convolution.groups == 1
        assert convolution.dilation == (1, 1)
        assert convolution.bias is not None
        self.weight, self.bias = convolution.weight, convolution.bias
        self._kernel = convolution.kernel_size[0]
        self._stride = convolution.stride[0]
        self._padding = convolution.padding[0]
        assert isinstance(self._padding, int)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, channels, H', W'), which lie in memory with the channels last."""
        if self._padding:
            images = F.pad(images, (self._padding,) * 4)
        patches: Tensor = _Patches.apply(images.permute(0, 2, 3, 1), self._kernel, self._stride)
        count, height, width = patches.shape[:3]
        weights = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        outputs = torch.addmm(self.bias, patches.reshape(count * height * width, -1), weights)
        return outputs.view(count, height, width, -1).permute(0, 3, 1, 2)


class _OfEachImage(torch.autograd.Function):
    """A function of each image for itself: under vmap the images of all workers are one batch.

    The derivative of ``Tensor.unfold`` has no rule for vmap, which would loop over the workers.
    """

    @staticmethod
    def flattened(function: Any, info: Any, in_dims: Any, tensor: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None:
            return function(tensor, *arguments), None  # type: ignore[return-value]
        tensor = tensor.movedim(in_dims[0], 0)
        return function(tensor.flatten(0, 1), *arguments).unflatten(0, tensor.shape[:2]), 0


@final
class _Patches(_OfEachImage):
    """Maps (N, H, W, C) to (N, H', W', k, k, C)."""

    @staticmethod
    def forward(images: Tensor, kernel: int, stride: int) -> Tensor:  # type: ignore[override]
        windows = images.unfold(1, kernel, stride).unfold(2, kernel, stride)
        return windows.permute(0, 1, 2, 4, 5, 3).contiguous()

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        images, ctx.kernel, ctx.stride = inputs  # type: ignore[attr-defined]
        ctx.extents = tuple(images.shape[1:3])  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return _Sums.apply(gradient, ctx.extents, ctx.kernel, ctx.stride), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _OfEachImage.flattened(_Patches.apply, info, in_dims, *arguments)


@final
class _Sums(_OfEachImage):
    """The derivative: maps (N, H', W', k, k, C) back to (N, H, W, C), adding what comes from one pixel."""

    @staticmethod
    def forward(gradient: Tensor, extents: tuple[int, int], kernel: int, stride: int) -> Tensor:  # type: ignore[override]
        def summed(part: Tensor) -> Tensor:
            windows = part.permute(0, 1, 2, 5, 3, 4)
            count, rows, _, channels = windows.shape[:4]
            backward = torch.ops.aten.unfold_backward
            windows = backward(windows, [count, rows, extents[1], channels, kernel], 2, kernel, stride)
            return backward(windows, [count, *extents, channels], 1, kernel, stride)

        # In parts that 32-bit offsets reach all of.
        images = max(1, _REACHED // (gradient[0].numel() * gradient.element_size()))
        parts = [summed(part) for part in gradient.split(images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        return _OfEachImage.flattened(_Sums.apply, info, in_dims, *arguments)
