"""Flat vectors of a checkpoint, one part for each parameter, in a run whose parameters may have changed."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout", "merged"]

Layout = Sequence[tuple[str, int]]
"""The name and the number of elements of each part of a flat vector."""


def merged(saved: Any, fresh: Any, old: Layout, new: Layout, keep: Container[str]) -> Any:
    """A saved state in which every flat vector has the layout of this run.

    Args:
        saved: The state, of tensors, primitives, lists of a number for each part, and mappings of them.
        fresh: The state of a run that starts here. A part that is not kept, or was not there, is its; or zero, where
            this run has no such vector yet.
        old: The layout of the saved vectors.
        new: The layout of the fresh ones.
        keep: The names of the parts to keep.

    Returns:
        A state like ``saved``; tensors that are no such vectors and have another shape than the fresh ones are those.
    """
    if isinstance(saved, Mapping):
        others = fresh if isinstance(fresh, Mapping) else {}
        return {key: merged(value, others.get(key), old, new, keep) for key, value in saved.items()}
    if isinstance(saved, list) and isinstance(fresh, list) and (len(saved), len(fresh)) == (len(old), len(new)):
        values = {name: value for (name, _), value in zip(old, saved, strict=True) if name in keep}
        return [values.get(name, value) for (name, _), value in zip(new, fresh, strict=True)]
    if fresh is None and isinstance(saved, Tensor) and saved.numel() == _size(old):
        fresh = saved.new_zeros(_size(new))
    if not isinstance(saved, Tensor) or not isinstance(fresh, Tensor):
        return saved
    if saved.numel() != _size(old) or fresh.numel() != _size(new):
        return saved if saved.shape == fresh.shape else fresh
    parts = dict(zip((name for name, _ in old), torch.split(saved, [size for _, size in old]), strict=True))
    result = fresh.detach().clone()
    for (name, size), part in zip(new, torch.split(result, [size for _, size in new]), strict=True):
        if name in keep and name in parts and parts[name].numel() == size:
            part.copy_(parts[name])
    return result


def _size(layout: Layout) -> int:
    return sum(size for _, size in layout)
