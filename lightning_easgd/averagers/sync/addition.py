"""How workers that come and go add up their differences, once it is known who of them is there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

from torch import Tensor
from typing_extensions import override

from lightning_easgd.averagers.sync.replicated_center import ReplicatedCenter
from lightning_easgd.method.compression import WireDtype
from lightning_easgd.tensors.flat_tensors import FlatTensors
from lightning_easgd.transport.membership import Membership

__all__ = ["Addition", "ExactAddition", "MakeAddition"]


class Addition(ABC):
    """Adds up one exchange after the other, of other workers each time.

    An exchange is: the difference is written into the wire; :meth:`start`; :meth:`add_up`, in the workers' thread; and
    :meth:`move` if the exchange counts. Nothing of one that is lost is left, but in the wire.

    Args:
        center: The center.
        wire: Where the difference is.
        members: The workers.

    Attributes:
        wire_dtype: What differences are rounded to on their way; the same on all workers.
    """

    wire_dtype: WireDtype | None = None

    def __init__(self, center: ReplicatedCenter, wire: FlatTensors, members: Membership) -> None:
        self._center = center
        self._wire = wire
        self._members = members

    @property
    @abstractmethod
    def given(self) -> list[list[Tensor]]:
        """The difference of the last exchange, in groups, until the next one is written."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that this worker sends for an exchange with those that are there."""

    @abstractmethod
    def start(self, shares: Sequence[float]) -> None:
        """Take what is in the wire.

        Args:
            shares: s for each group.
        """

    @abstractmethod
    def add_up(self) -> None:
        """Add it up with the others'."""

    @abstractmethod
    def move(self) -> None:
        """Move the center by the sum; bitwise the same on all workers."""

    def forget(self) -> None:  # noqa: B027 - most have no memory
        """Begin anew, as a worker that nobody knows yet."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed worker must know, in tensors and primitives."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have no memory
        """Go on where :meth:`state_dict` was taken."""


MakeAddition: TypeAlias = Callable[[ReplicatedCenter, FlatTensors, Membership], Addition]


@final
class ExactAddition(Addition):
    """A sum of the differences as they are. The memory beside the wire is a copy of it."""

    def __init__(self, center: ReplicatedCenter, wire: FlatTensors, members: Membership) -> None:
        super().__init__(center, wire, members)
        self._kept = wire.like()
        self._shares: Sequence[float] = ()

    @property
    @override
    def given(self) -> list[list[Tensor]]:
        return self._kept.groups

    @property
    @override
    def nbytes(self) -> int:
        return round(2 * (self._members.size - 1) / self._members.size * self._wire.flat.nbytes)

    @override
    def start(self, shares: Sequence[float]) -> None:
        self._kept.flat.copy_(self._wire.flat)
        self._shares = shares

    @override
    def add_up(self) -> None:
        self._members.all_reduce(self._wire.flat)

    @override
    def move(self) -> None:
        starts = 0
        for segment, share in zip(self._wire.segments, self._shares, strict=True):
            part = slice(starts, starts + segment.numel())
            self._center.move_(part, segment, share)
            starts = part.stop
