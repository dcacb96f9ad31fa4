r"""Compression of a flat vector of differences: what travels is rounded, what the rounding drops is sent later.

A codec rounds a vector to a message of fewer bytes. What the rounding drops is not lost when it is kept and added to
the vector that is sent next (F. Seide et al., *1-bit stochastic gradient descent*, Interspeech 2014; S. P. Karimireddy
et al., *Error feedback fixes SignSGD*, ICML 2019): with :math:`Q` the codec, :math:`d_t` what is to be sent and
:math:`e_t` the residual,

.. math:: m_t = Q(d_t + e_t), \qquad e_{t+1} = d_t + e_t - m_t, \qquad \sum_{s<t} m_s = \sum_{s<t} d_s + e_0 - e_t.

So the sum of all messages differs from the sum of all vectors by one residual, however long the run. In code::

    residual.add_(difference)
    codec.encode_rest_(residual, message)

Nothing here knows of processes: tensors in, bytes out, on any device. A call makes temporaries of one scale for each
block, and works through the vector in pieces, in one buffer that the codec keeps.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["BFloat16Codec", "Codec", "Int8Codec", "WireDtype", "make_codec"]

WireDtype = Literal["bfloat16", "int8"]

_LARGEST = 127  # of symmetric int8: -128 is not used, so that x and -x are encoded alike
_SCALE_BYTES = 4


class Codec(ABC):
    """Rounds vectors of float32 or float64 to messages of bytes.

    A codec keeps a buffer for its arithmetic: one thread uses it at a time.

    Attributes:
        block: Elements that are encoded together. The parts of a vector that is cut at multiples of it have the values
            of the whole when decoded.
    """

    block: int

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """The size in bytes of the message of a vector of so many elements."""

    @abstractmethod
    def encode(self, values: Tensor, message: Tensor) -> None:
        """Write the message of a vector.

        Args:
            values: Shape (numel,), float32 or float64, contiguous.
            message: Shape (nbytes(numel),), uint8, on the device of ``values``, contiguous, beginning at a multiple of
                4 bytes.
        """

    @abstractmethod
    def encode_rest_(self, values: Tensor, message: Tensor) -> None:
        """Write the message of a vector as :meth:`encode` does, and leave in ``values`` what the message lacks.

        That is values - decoded, rounded once: the residual of an error feedback.
        """

    @abstractmethod
    def decode(self, message: Tensor, out: Tensor) -> None:
        """Write the vector that a message stands for into ``out``, shape (numel,); bitwise the same on one device."""

    @abstractmethod
    def add_decoded_(self, message: Tensor, out: Tensor, alpha: float = 1.0) -> None:
        """Add α times the vector that a message stands for to ``out``, shape (numel,)."""

    def _pieces(self, values: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Cut a vector to pieces of ``size`` elements, each with a buffer of its shape and dtype."""
        needed = min(size, values.numel())
        if self._buffer.numel() < needed or (self._buffer.dtype, self._buffer.device) != (values.dtype, values.device):
            self._buffer = torch.empty(needed, dtype=values.dtype, device=values.device)
        for start in range(0, values.numel(), size):
            stop = min(start + size, values.numel())
            yield slice(start, stop), self._buffer[: stop - start]


@final
class BFloat16Codec(Codec):
    """Each element as bfloat16, rounded to nearest, ties to even: 8 bits of precision at float32's range.

    Infinities and NaN stay what they are; float32 values within half a percent of the largest become infinite. A
    float64 value is rounded to float32 first.
    """

    block = 2  # so that a part of a message begins at a multiple of 4 bytes

    @override
    def nbytes(self, numel: int) -> int:
        return 2 * numel

    @override
    def encode(self, values: Tensor, message: Tensor) -> None:
        message.view(torch.bfloat16).copy_(values)

    @override
    def encode_rest_(self, values: Tensor, message: Tensor) -> None:
        self.encode(values, message)
        self.add_decoded_(message, values, alpha=-1.0)

    @override
    def decode(self, message: Tensor, out: Tensor) -> None:
        out.copy_(message.view(torch.bfloat16))

    @override
    def add_decoded_(self, message: Tensor, out: Tensor, alpha: float = 1.0) -> None:
        rounded = message.view(torch.bfloat16)
        for piece, buffer in self._pieces(out, _piece_size(out.device)):
            out[piece].add_(buffer.copy_(rounded[piece]), alpha=alpha)


@final
class Int8Codec(Codec):
    r"""Each element as an integer of 8 bits, times a float32 scale that the elements of a block share.

    .. math:: s = \max_k |x_k| / 127, \qquad q_k = \mathrm{round}(x_k / s) \in [-127, 127], \qquad \hat x_k = s q_k

    rounded to nearest, ties to even, so :math:`|\hat x_k - x_k| \le s / 2` to the rounding of float32. A block of 256
    takes 260 bytes: 3.94 times fewer than float32.

    A block whose scale would be below the smallest normal float32 number (largest element below 1.5e-36) is decoded as
    zeros, exactly so if it is zero. A block that holds a NaN, an infinity, or a float64 value beyond float32's range
    is decoded as NaN throughout: what is not finite is never lost. Elements next to the largest float32 number may be
    decoded as infinite.

    The message is the scales of all blocks, then the integers.
    """

    block = 256

    @override
    def nbytes(self, numel: int) -> int:
        return _SCALE_BYTES * self._blocks(numel) + numel

    @override
    def encode(self, values: Tensor, message: Tensor) -> None:
        for part in self._parts(values, message):
            part.quantise()

    @override
    def encode_rest_(self, values: Tensor, message: Tensor) -> None:
        for part in self._parts(values, message):
            part.quantise()
            part.values.sub_(part.buffer.mul_(part.scales))

    @override
    def decode(self, message: Tensor, out: Tensor) -> None:
        for part in self._parts(out, message):
            part.values.copy_(part.integers).mul_(part.scales)

    @override
    def add_decoded_(self, message: Tensor, out: Tensor, alpha: float = 1.0) -> None:
        for part in self._parts(out, message):
            part.values.add_(part.buffer.copy_(part.integers).mul_(part.scales), alpha=alpha)

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def _parts(self, values: Tensor, message: Tensor) -> Iterator["_Blocks"]:
        """Pieces of whole blocks, then the shorter last block if there is one."""
        blocks = self._blocks(values.numel())
        scales = message[: _SCALE_BYTES * blocks].view(torch.float32)
        integers = message[_SCALE_BYTES * blocks :].view(torch.int8)
        whole = values.numel() // self.block * self.block
        for piece, buffer in self._pieces(values[:whole], _piece_size(values.device)):
            rows = slice(piece.start // self.block, piece.stop // self.block)
            shape = (-1, self.block)
            yield _Blocks(
                values[piece].view(shape), buffer.view(shape), scales[rows, None], integers[piece].view(shape)
            )
        for piece, buffer in self._pieces(values[whole:], self.block):
            rest = slice(whole, whole + piece.stop)
            yield _Blocks(values[rest][None], buffer[None], scales[-1:, None], integers[rest][None])


@final
@dataclass(frozen=True)
class _Blocks:
    """Blocks in rows: values and their buffer, shape (blocks, elements); scales, shape (blocks, 1); integers."""

    values: Tensor
    buffer: Tensor
    scales: Tensor
    integers: Tensor

    def quantise(self) -> None:
        """Write scales and integers; the integers are in ``buffer`` too, as floating-point numbers."""
        # Both reductions let a NaN through; of the absolute values it would be one pass more.
        peaks = torch.maximum(self.values.amax(1, keepdim=True), self.values.amin(1, keepdim=True).neg_())
        scales = peaks.div_(_LARGEST).float()
        # A reciprocal of less overflows: nothing of such a block is sent, and an error feedback keeps it all.
        scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 0.0)
        scales.masked_fill_(scales.isinf(), torch.nan)
        self.scales.copy_(scales)
        per_scale = torch.where(scales > 0, scales.reciprocal(), 0.0)
        torch.mul(self.values, per_scale, out=self.buffer).round_()
        self.integers.copy_(self.buffer)


def make_codec(wire_dtype: WireDtype) -> Codec:
    """The codec of this name."""
    codecs: dict[WireDtype, type[Codec]] = {"bfloat16": BFloat16Codec, "int8": Int8Codec}
    return codecs[wire_dtype]()


def _piece_size(device: torch.device) -> int:
    """Elements of a piece: its buffer stays in the cache of a CPU; elsewhere what counts is few kernels."""
    return 2**18 if device.type == "cpu" else 2**22
