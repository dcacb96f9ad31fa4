"""Which tensors lie in the memory of others: ``a.weight.data = b.weight.data`` makes two parameters of one memory."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from lightning_easgd.tensors.shards import local

__all__ = ["Memory", "once", "origins_of", "place"]


class _Span(NamedTuple):
    """The bytes from a tensor's first element to its last, and how its elements lie in them."""

    start: int
    stop: int
    lies: tuple[torch.dtype, torch.Size, tuple[int, ...]]
    is_dense: bool

    def holds(self, other: "_Span") -> bool:
        inside = self.start <= other.start and other.stop <= self.stop
        return inside and (self.is_dense or self == other)

    def touches(self, other: "_Span") -> bool:
        if not (self.start < other.stop and other.start < self.stop):
            return False
        (dtype, shape, strides), (other_dtype, other_shape, other_strides) = self.lies, other.lies
        distance, rest = divmod(other.start - self.start, dtype.itemsize)
        if (dtype, strides) != (other_dtype, other_strides) or 0 in strides or rest:
            return True  # as far as is looked
        return _meet(distance, sorted(zip(strides, shape, other_shape, strict=True), reverse=True))


@final
class Memory:
    """The memory of some tensors; those without any, and those that are no plain tensors, are in nobody's.

    Args:
        tensors: Those that it is of.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._spans: dict[int, set[_Span]] = {}  # by the address of their storage
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Take in another one."""
        found = _span(tensor)
        if found is not None:
            self._spans.setdefault(found[0], set()).add(found[1])

    def holds(self, tensor: Tensor) -> bool:
        """Whether all of a tensor lies in one of them: what is done to that one is done to it."""
        found = _span(tensor)
        return found is not None and any(each.holds(found[1]) for each in self._spans.get(found[0], ()))

    def touches(self, tensor: Tensor) -> bool:
        """Whether a tensor lies where one of them does, or, with other strides, between the elements of one."""
        found = _span(tensor)
        return found is not None and any(each.touches(found[1]) for each in self._spans.get(found[0], ()))


def once(*tensors: Iterable[Tensor]) -> set[int]:
    """The identities of those that are to be counted where each piece of memory counts once.

    Args:
        tensors: Those of the first come before those of the second; of each the larger ones, then the earlier ones.
    """
    memory, chosen = Memory(), set()
    for part in tensors:
        for tensor in sorted(part, key=lambda tensor: -tensor.numel()):
            if id(tensor) not in chosen and not memory.holds(tensor):
                chosen.add(id(tensor))
                memory.add(tensor)
    return chosen


def place(tensor: Tensor) -> tuple[object, ...] | None:
    """What only tensors have in common that are the same numbers in the same memory; None for one without any."""
    found = _span(tensor)
    return None if found is None else (found[0], *found[1])


def origins_of(tensors: Sequence[Tensor], known: Sequence[Tensor]) -> list[int | None]:
    """For each tensor its number among known ones, or that of a known one of its memory which is none of them any more.

    Args:
        tensors: The tensors.
        known: Those of before.
    """
    numbers = {id(tensor): number for number, tensor in enumerate(known)}
    stay = {id(tensor) for tensor in tensors}
    left = {place(tensor): number for number, tensor in enumerate(known) if id(tensor) not in stay}
    left.pop(None, None)
    return [numbers.get(id(tensor), left.get(place(tensor)) if left else None) for tensor in tensors]


def _meet(distance: int, dimensions: Sequence[tuple[int, int, int]]) -> bool:
    """Whether two tensors have an element in common.

    Args:
        distance: From the first one's first element to the second one's.
        dimensions: Of each its stride, and the sizes of the two; the largest stride first.
    """
    if not dimensions:
        return distance == 0
    (stride, size, other_size), *inner = dimensions
    before = sum(each * (n - 1) for each, _, n in inner)
    after = sum(each * (n - 1) for each, n, _ in inner)
    first, last = -((after - distance) // stride), (distance + before) // stride
    steps = range(max(1 - other_size, first), min(size - 1, last) + 1)
    return any(_meet(distance - step * stride, inner) for step in steps)


def _span(tensor: Tensor) -> tuple[int, _Span] | None:
    tensor = local(tensor).detach()
    if tensor.layout is not torch.strided or not tensor.numel():
        return None
    try:
        address = tensor.untyped_storage().data_ptr()
    except RuntimeError:  # one that only wraps others
        return None
    if not address:
        return None
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.itemsize
    lies = tensor.dtype, tensor.shape, tensor.stride()
    return address, _Span(start, start + reach * tensor.itemsize, lies, reach == tensor.numel())
