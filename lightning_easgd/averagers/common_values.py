"""What the workers' values have in common, of tensors that are in no exchange: buffers, teachers, frozen weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lightning_easgd.tensors.buffers import can_be_written
from lightning_easgd.tensors.checksums import checksum
from lightning_easgd.tensors.flat_tensors import as_real

if TYPE_CHECKING:
    from lightning_easgd.transport.channel import Channel

__all__ = ["CommonValues", "common_values", "differing"]

_PIECE = 2**22  # numbers that are added up at once: 32 MiB on the host


@final
@dataclass(frozen=True)
class CommonValues:
    """What is common to all workers of some named tensors.

    Attributes:
        values: Of those that differ between the workers: the mean, of integers rank 0's; on the tensor's device.
        same: Names of those that are the same on all workers.
        own: Names of those whose shape, dtype or presence differs between the workers, or that differ and cannot be
            written to: each worker keeps its own.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    same: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()


def common_values(tensors: Mapping[str, Tensor], channel: "Channel") -> CommonValues:
    """Compare named tensors of all workers, and find a common value for those that differ.

    The common value of a floating-point or complex tensor is the workers' mean, taken in float64; workers whose tensor
    is not finite are left out of it, unless all are. That of an integer tensor is rank 0's. Where all is the same
    everywhere three integers of each worker travel.

    Args:
        tensors: By name; workers may have different ones.
        channel: Reduces CPU tensors. All workers call this at the same point.
    """
    names = sorted(tensors)
    specifications = {name: _specification(tensors[name]) for name in names}
    checksums = [checksum(tensors[name]) for name in names]
    digests = _gather(channel, [_digest(specifications), _digest(checksums)])
    if all(digest == digests[0] for digest in digests):
        return CommonValues(same=frozenset(names))
    own: frozenset[str] = frozenset()
    if any(specification != digests[0][0] for specification, _ in digests):
        everyones = [json.loads(text) for text in _gather_bytes(channel, json.dumps(specifications).encode())]
        shared = [name for name in names if all(each.get(name) == specifications[name] for each in everyones)]
        own = frozenset(name for each in everyones for name in each) - set(shared)
        names = shared
    rows = _gather(channel, [number for name, number in zip(sorted(tensors), checksums, strict=True) if name in names])
    different = [name for name, column in zip(names, zip(*rows, strict=True), strict=True) if len(set(column)) > 1]
    unlike = frozenset(name for name in different if not can_be_written(tensors[name]))
    different = [name for name in different if name not in unlike]
    values = _common([tensors[name].detach() for name in different], channel)
    return CommonValues(
        dict(zip(different, values, strict=True)), frozenset(names) - set(different) - unlike, own | unlike
    )


def differing(value: object, channel: "Channel") -> list[Any] | None:
    """What the workers have in place of one another's value, in the order of the ranks; None if it is the same for all.

    Args:
        value: What JSON can hold.
        channel: Reduces CPU tensors. All workers call this at the same point.
    """
    text = json.dumps(value)
    if channel.size == 1 or len({digest for (digest,) in _gather(channel, [_digest(text)])}) == 1:
        return None
    return [json.loads(each) for each in _gather_bytes(channel, text.encode())]


def _common(tensors: Sequence[Tensor], channel: "Channel") -> list[Tensor]:
    """The common value of each tensor; as many and of the same shapes on every worker."""
    if not tensors:
        return []
    counted = [_counts(tensor, channel.rank) for tensor in tensors]
    numbers = [sum(column) for column in zip(*_gather(channel, [int(each) for each in counted]), strict=True)]
    return [
        _mean(tensor, here or number == 0, number or channel.size, channel)  # where none is finite the mean is not
        for tensor, here, number in zip(tensors, counted, numbers, strict=True)
    ]


def _counts(tensor: Tensor, rank: int) -> bool:
    """Whether this worker's tensor has a part in the common value."""
    return bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() or tensor.is_complex() else rank == 0


def _mean(tensor: Tensor, counts: bool, number: int, channel: "Channel") -> Tensor:
    """The sum of a tensor over the workers where it counts, divided by their number."""
    value = torch.empty_like(tensor)
    source, target = as_real(tensor.resolve_conj()).reshape(-1), as_real(value)
    dtype = torch.float64 if target.is_floating_point() else torch.int64
    pieces = []
    for piece in torch.split(source, _PIECE):
        total = piece.to("cpu", dtype, copy=True) if counts else torch.zeros(piece.shape, dtype=dtype)
        channel.sum(total).wait()
        pieces.append((total / number if target.is_floating_point() else total).to(target.dtype))
    target.copy_(torch.cat(pieces).view(target.shape))
    return value


def _specification(tensor: Tensor) -> list[object]:
    return [str(tensor.dtype), list(tensor.shape), str(tensor.layout)]


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def _gather(channel: "Channel", numbers: Sequence[int]) -> list[list[int]]:
    """As many integers of 64 bits of each worker, in the order of the ranks."""
    rows = torch.zeros(channel.size, len(numbers), dtype=torch.int64)
    rows[channel.rank] = torch.tensor(numbers, dtype=torch.int64)
    flat = rows.flatten()
    if flat.numel():
        channel.sum(flat).wait()
    return flat.view(rows.shape).tolist()


def _gather_bytes(channel: "Channel", message: bytes) -> list[bytes]:
    """A message of each worker, in the order of the ranks."""
    lengths = [length for (length,) in _gather(channel, [len(message)])]
    padded = list(message.ljust(max(lengths), b"\0"))
    return [bytes(row[:length]) for row, length in zip(_gather(channel, padded), lengths, strict=True)]
