"""The singular vectors of spectral normalization: buffers that no mean of the workers' can stand for.

A singular vector has a length of one and no sign: the mean of the workers' may be next to nothing, and the weight is
divided by what comes of it. The center has those of its own weight.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

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
    return frozenset(name for vectors, *_ in _norms(module) for name in vectors)


def finite_vector(vector: Tensor) -> Tensor:
    """The same vector, or, of a worker that is not finite, one of the same length to begin the iterations with."""
    return vector if bool(vector.isfinite().all()) else torch.full_like(vector, vector.numel() ** -0.5)


@torch.no_grad()
def iterate_power_method(module: nn.Module, names: Collection[str]) -> None:
    """Let the singular vectors among these buffers be those of the weights that the module holds now.

    Args:
        module: The module; of a weight that is a shard all ranks that have one call this at the same point.
        names: Of buffers.
    """
    for vectors, owners, iterate in _norms(module):
        if not vectors.isdisjoint(names):
            with _whole(owners):
                for _ in range(_ITERATIONS):
                    iterate()


@contextmanager
def _whole(owners: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which modules hold the whole of what they have shards of; singular vectors are of a whole weight."""
    shards: list[tuple[nn.Module, str, Any]] = [
        (owner, name, parameter)
        for owner in owners
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_shard(parameter)
    ]
    try:
        for owner, name, shard in shards:
            owner._parameters[name] = shard.full_tensor()
        yield
    finally:
        for owner, name, shard in shards:
            owner._parameters[name] = shard


def _norms(module: nn.Module) -> Iterator[tuple[frozenset[str], list[nn.Module], Callable[[], Any]]]:
    """Of each weight that is normalized the names of its vectors, what holds it, and what makes an iteration."""
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                vectors = frozenset(f"{prefix}{hook.name}_{side}" for side in "uv")
                yield vectors, [part], partial(hook.compute_weight, part, do_power_iteration=True)
        for number, norm in enumerate(part) if isinstance(part, ParametrizationList) else ():
            if isinstance(norm, _SpectralNorm) and hasattr(norm, "_u"):  # a vector is normalized without
                vectors = frozenset(f"{prefix}{number}._{side}" for side in "uv")
                yield vectors, list(part.modules()), partial(_iterate, part, norm)


def _iterate(weight: ParametrizationList, norm: _SpectralNorm) -> None:
    training, norm.training = norm.training, True
    weight()
    norm.training = training
