r"""A checksum of a tensor's bits: the same on every device, and cheap beside a read of the tensor."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from lightning_easgd.tensors.shards import local

__all__ = ["checksum", "sum_of_bits"]

_WORD = 4
"""Bytes that are one number x; a weight has twice as many bits, so that no bit of x is lost modulo 2^64."""

_BLOCK = 1 << 17
"""Numbers that are summed up at once: what is allocated beside the tensor is 8 bytes for each."""

_BLOCK_FACTOR = 0x5851F42D4C957F2D


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    r"""A number that says whether two tensors are the same in dtype, shape and bits.

    .. math:: s = \sum_b f^{B - b} \sum_k w_k x_{bk} \bmod 2^{64}

    where :math:`x_{bk}` are the B blocks of the tensor's bytes as 32-bit integers, :math:`w_k` fixed odd 64-bit
    weights, and f a fixed factor; dtype and shape are added. It is a sum of integers, so that the order of summation
    does not count. Zeros of either sign, and NaNs of different bits, are different. It finds accidents, not forgeries.

    Args:
        tensor: Of any dtype, shape and layout (of a sparse one, indices and values count as they are stored), on any
            device; of a shard this rank's part counts. A tensor that is not contiguous is copied; else no more than a
            megabyte or two is allocated.

    Returns:
        An integer of 64 bits with sign. Asking for it waits for the tensor's device.
    """
    tensor = local(tensor)
    described = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} {tensor.layout}".encode(), digest_size=8)
    total = int.from_bytes(described.digest(), "little")
    for part in _dense_parts(tensor.detach()):
        total = total * _BLOCK_FACTOR + _sum_of_bits(part)
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@torch.no_grad()
def sum_of_bits(flat: Tensor) -> int:
    """The sum of a vector's bytes as 64-bit integers, modulo 2^64, in a twentieth of the time of :func:`checksum`.

    Two vectors that differ in one number have different ones; numbers in another order may have the same.

    Args:
        flat: Contiguous, of a dtype of 4 or 8 bytes.

    Returns:
        An integer of 64 bits with sign. Asking for it waits for the tensor's device.
    """
    if flat.storage_offset() % 2:  # where 64 bits cannot be looked at as one number
        flat = flat.clone()
    each = torch.split(flat, [flat.numel() // 2 * 2, flat.numel() % 2])
    return int(each[0].view(torch.int64).sum() + each[1].view(torch.int64 if flat.itemsize == 8 else torch.int32).sum())


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]


def _sum_of_bits(tensor: Tensor) -> int:
    flat = tensor.resolve_conj().resolve_neg().reshape(-1).contiguous()
    if not flat.numel():
        return 0
    octets = flat.view(torch.uint8)
    weights = _weights(flat.device, min(_BLOCK, 1 << (octets.numel() // _WORD).bit_length()))
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for block in torch.split(octets, _BLOCK * _WORD):
        words = _words(block)
        total.mul_(_BLOCK_FACTOR).add_((words * weights[: words.numel()]).sum())
    return int(total)


def _words(block: Tensor) -> Tensor:
    """Bytes as integers of 32 bits, filled up with zeros."""
    missing = -block.numel() % _WORD
    if missing or block.storage_offset() % _WORD:
        block = torch.cat([block, block.new_zeros(missing)])
    return block.view(torch.int32)


@lru_cache(maxsize=64)
def _weights(device: torch.device, count: int) -> Tensor:
    """Odd int64 numbers without a pattern, shape (count,): two rounds of multiplication and shift."""
    numbers = torch.arange(1, count + 1, dtype=torch.int64, device=device)
    for factor in (-0x61C8864680B583EB, -0x4B47D0C5A1A2C4E3):
        numbers = numbers * factor
        numbers = numbers ^ (numbers >> 29)
    return numbers | 1
