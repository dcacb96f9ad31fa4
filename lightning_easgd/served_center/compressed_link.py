r"""Rounded messages between a worker and the node that serves a part of the center: what both ends remember.

Both ends share a reference r of each chunk: where the worker will be when it has taken the last answer, as far as the
messages tell. With :math:`Q` the codec, x what the worker sends and a what the center's exchange answers,

.. math::
    m &= Q(x - r), \quad r \leftarrow r + m && \text{to the server, which exchanges r in place of x} \\
    b &= Q(a + f), \quad f \leftarrow a + f - b, \quad r \leftarrow r - b && \text{to the worker, which takes b for a}

The center is never rounded, and moves by what its rule makes of r. What the first rounding drops is in the next
:math:`x - r` again; what the second drops is in the residual f, which is added to the next answer: all that the worker
has taken is, but for f, all that has been answered. The first exchange of a chunk is not rounded; it sets r.

So a worker keeps one reference of the center's size, a serving node one reference and one residual for each worker of
other nodes that it serves, of the chunks that it keeps.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from lightning_easgd.method.compression import Codec

__all__ = ["LinkState", "ServingEnd", "WorkersEnd"]

LinkState = tuple[Tensor, Tensor]
"""The reference r and the residual f of one chunk."""


class _End:
    """What one end of a connection remembers.

    Args:
        make_codec: Makes Q.
    """

    def __init__(self, make_codec: Callable[[], Codec]) -> None:
        self._codec = make_codec()
        self._references: dict[int, Tensor] = {}

    def knows(self, chunk: int) -> bool:
        """Whether there is a reference, so that messages can be rounded."""
        return chunk in self._references

    def message_buffer(self, numel: int) -> Tensor:
        """Memory for a rounded message of so many elements."""
        return torch.empty(self._codec.nbytes(numel), dtype=torch.uint8)

    def nbytes(self, numel: int) -> int:
        """The size of a rounded message."""
        return self._codec.nbytes(numel)

    def set_reference(self, chunk: int, values: Tensor) -> None:
        """Begin with these values, which the other end has, too."""
        self._references[chunk] = values.clone()

    def unrounded_answer(self, chunk: int, answer: Tensor) -> None:
        """The answer to what :meth:`set_reference` was given has been sent as it is."""
        self._references[chunk].sub_(answer)


@final
class WorkersEnd(_End):
    """The end that sends x."""

    def encode(self, chunk: int, values: Tensor) -> Tensor:
        """The message of x, and r of after it."""
        message = self.message_buffer(values.numel())
        reference = self._references[chunk]
        self._codec.encode(values - reference, message)
        self._codec.add_decoded_(message, reference)
        return message

    def decode(self, chunk: int, message: Tensor, into: Tensor) -> None:
        """Write an answer, and r of after it."""
        self._codec.decode(message, into)
        self._references[chunk].sub_(into)

    def reference(self, chunk: int) -> Tensor:
        """The reference r; with no exchange under way."""
        return self._references[chunk]


@final
class ServingEnd(_End):
    """The end that answers."""

    def __init__(self, make_codec: Callable[[], Codec]) -> None:
        super().__init__(make_codec)
        self._residuals: dict[int, Tensor] = {}

    def decode(self, chunk: int, message: Tensor, into: Tensor) -> None:
        """Write r of after a message, which is exchanged in place of x."""
        reference = self._references[chunk]
        self._codec.add_decoded_(message, reference)
        into.copy_(reference)

    def encode(self, chunk: int, answer: Tensor) -> Tensor:
        """The message of an answer; r and f of after it."""
        message = self.message_buffer(answer.numel())
        residual = self.residual(chunk).add_(answer)
        self._codec.encode_rest_(residual, message)
        self._codec.add_decoded_(message, self._references[chunk], alpha=-1.0)
        return message

    def residual(self, chunk: int) -> Tensor:
        """The residual f, zero at first."""
        if chunk not in self._residuals:
            self._residuals[chunk] = torch.zeros_like(self._references[chunk])
        return self._residuals[chunk]

    def set_residual(self, chunk: int, values: Tensor) -> None:
        """Go on with this f."""
        self.residual(chunk).copy_(values)
