"""The singular vectors of spectral normalization: buffers that no mean of the workers' can stand for.

A singular vector has a length of one and no sign: the mean of the workers' may be next to nothing, and the weight is
divided by what comes of it. The center has those of its own weight.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_easgd.tensors.shards import is_shard

__all__ = ["finite_vector", "iterate_power_method", "singular_vectors"]

_ITERATIONS = 15
"""As many as torch makes from random vectors; these are a worker's, whose weight is near."""


def singular_vectors(module: nn.Module) -> frozenset[str]:
    """The names of the buffers that are singular vectors of weights."""
    return frozenset(name for vectors, _ in _norms(module) for name in vectors)


def finite_vector(vector: Tensor) -> Tensor:
    """The same vector, or, of a worker that is not finite, one of the same length to begin the iterations with."""
    return vector if bool(vector.isfinite().all()) else torch.full_like(vector, vector.numel() ** -0.5)


@torch.no_grad()
def iterate_power_method(module: nn.Module, names: Collection[str]) -> None:
    """Let the singular vectors among these buffers be those of the weights that the module holds now.

    Args:
        module: The module; of a weight that is a shard the vectors stay as they are.
        names: Of buffers.
    """
    for vectors, iterate in _norms(module):
        if not vectors.isdisjoint(names):
            for _ in range(_ITERATIONS):
                iterate()


def _norms(module: nn.Module) -> Iterator[tuple[frozenset[str], Callable[[], None]]]:
    """Of each weight that is normalized the names of its vectors, and what makes an iteration."""
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                yield frozenset(f"{prefix}{hook.name}_{side}" for side in "uv"), partial(_iterate_hook, part, hook)
        for number, norm in enumerate(part) if isinstance(part, ParametrizationList) else ():
            if isinstance(norm, _SpectralNorm) and hasattr(norm, "_u"):  # a vector is normalized without
                yield frozenset(f"{prefix}{number}._{side}" for side in "uv"), partial(_iterate, part, norm)


def _iterate_hook(part: nn.Module, hook: SpectralNorm) -> None:
    if not is_shard(getattr(part, f"{hook.name}_orig")):
        hook.compute_weight(part, do_power_iteration=True)


def _iterate(weight: ParametrizationList, norm: _SpectralNorm) -> None:
    if any(map(is_shard, weight.parameters())):
        return
    training, norm.training = norm.training, True
    weight()
    norm.training = training
