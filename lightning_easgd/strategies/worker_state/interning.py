"""What several workers' states have in common is one object, so that a file holds it once."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["interned"]


def interned(state: Any, first: Any) -> Any:
    """A state whose parts are those of another one wherever they are the same, bit for bit.

    Args:
        state: Tensors and primitives, in dicts, lists and tuples. Not changed.
        first: A state that may have parts in common with it, at the same places.

    Returns:
        An equal state. ``torch.save`` writes what it shares with ``first`` once for both.
    """
    if isinstance(state, Tensor):
        return first if isinstance(first, Tensor) and _same_bits(state, first) else state
    if type(state) is not type(first):
        return state
    if type(state) is dict:
        return {key: interned(value, first.get(key)) for key, value in state.items()}
    if type(state) is list:
        return [*map(interned, state, first)] if len(state) == len(first) else state
    if type(state) is tuple and _is_primitive(state):
        return first if repr(state) == repr(first) else state
    return state


def _same_bits(tensor: Tensor, other: Tensor) -> bool:
    alike = tensor.dtype == other.dtype and tensor.shape == other.shape and tensor.device == other.device
    if not alike or not (tensor.is_contiguous() and other.is_contiguous()):
        return False
    return torch.equal(tensor.detach().view(-1).view(torch.uint8), other.detach().view(-1).view(torch.uint8))


def _is_primitive(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_primitive, value))
    return value is None or type(value) in (bool, int, str)
