"""The served center as its users see it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.served_center.compressed_link import LinkState
from lightning_easgd.served_center.layout import Layout

__all__ = ["CenterService", "Done", "Pending"]


class Pending(ABC):
    """An exchange under way. Its message belongs to the service until :meth:`wait` has returned."""

    @abstractmethod
    def wait(self) -> int:
        """Return the chunk's version before the exchange, once the message holds the answer.

        Raises:
            CenterError: If the answer does not come.
        """


@final
class Done(Pending):
    """An exchange that was complete when it was begun.

    Args:
        version: The chunk's version before it.
    """

    def __init__(self, version: int) -> None:
        self._version = version

    @override
    def wait(self) -> int:
        return self._version


class CenterService(ABC):
    """A center that every worker exchanges with on its own clock.

    The center is a flat vector cut into chunks. Each operation on one chunk is atomic, and may be called from several
    threads at once. Messages are contiguous CPU tensors of the center's dtype and of the chunk's size.

    Args:
        layout: The chunks.
        dtype: float32 or float64.

    Attributes:
        layout: As given.
        dtype: As given.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{type(self).__name__}(dtype={dtype}): the center is kept in float32 or float64.")
        self.layout = layout
        self.dtype = dtype

    @property
    def chunks(self) -> Sequence[slice]:
        """The part of the flat vector that each chunk is."""
        return self.layout.chunks

    @abstractmethod
    def exchange(self, chunk: int, message: Tensor, rate: float) -> int:
        """Apply a message to a chunk by the center's exchange, and replace it by the answer.

        Args:
            chunk: Number of the chunk.
            message: What the rule takes; on return, its answer. Undefined if the exchange fails.
            rate: The rate that the rule uses for this message.

        Returns:
            The chunk's version before this exchange: how many exchanges it had taken.

        Raises:
            CenterError: If the chunk cannot be reached within the timeout, its server is lost, or the rule raises.
        """

    def begin(self, chunk: int, message: Tensor, rate: float) -> Pending:
        """Begin an exchange; it may complete at once, or go on while the caller does something else."""
        return Done(self.exchange(chunk, message, rate))

    @abstractmethod
    def read(self, chunk: int, into: Tensor, store: int = 0) -> int:
        """Copy one store of a chunk, not torn by any exchange, and return the chunk's version."""

    @abstractmethod
    def write(self, chunk: int, value: Tensor, store: int = 0, version: int | None = None) -> None:
        """Set one store of a chunk, and its version if one is given (to initialise, and to resume)."""

    def keeps(self, chunk: int, store: int) -> bool:  # noqa: ARG002
        """Whether there is such a chunk and such a store of it here."""
        return 0 <= chunk < len(self.chunks)

    def nbytes(self, chunk: int) -> int:
        """Bytes of the next message for a chunk; its answer has as many."""
        return self.layout.size(chunk) * self.dtype.itemsize

    def link_state(self, chunk: int) -> LinkState | None:  # noqa: ARG002
        """What both ends of a connection remember of a chunk's rounded messages; None if there are none."""
        return None

    def load_link_state(self, chunk: int, state: LinkState) -> None:  # noqa: B027
        """Go on where :meth:`link_state` was taken, if the chunk's messages are rounded here, too."""

    @property
    def order(self) -> Sequence[int]:
        """The chunks in the order in which this rank does best to exchange them."""
        return range(len(self.chunks))

    def exchange_all(self, messages: Tensor, rates: Sequence[float]) -> list[int]:
        """Exchange every chunk of a flat vector, as many at a time as the transport carries.

        Args:
            messages: The whole flat vector; on return, the answers.
            rates: One rate for each segment.

        Returns:
            The version of each chunk before its exchange.
        """
        begun = {
            chunk: self.begin(chunk, messages[self.chunks[chunk]], rates[self.layout.segments[chunk]])
            for chunk in self.order
        }
        versions = {chunk: pending.wait() for chunk, pending in begun.items()}
        return [versions[chunk] for chunk in range(len(self.chunks))]

    def read_all(self, into: Tensor, store: int = 0) -> list[int]:
        """Copy one store of every chunk into a flat vector; each chunk is consistent in itself."""
        return [self.read(chunk, into[part], store) for chunk, part in enumerate(self.chunks)]

    def write_all(self, values: Tensor, store: int = 0, version: int | None = None) -> None:
        """Set one store of every chunk from a flat vector."""
        for chunk, part in enumerate(self.chunks):
            self.write(chunk, values[part], store, version)

    @abstractmethod
    def close(self) -> None:
        """Give back all that the service holds on this rank. A second call does nothing."""
