"""The numbers in an optimizer's parameter groups, which may be tensors on a device."""

from typing import final

from torch import Tensor

__all__ = ["GroupNumbers"]


@final
class GroupNumbers:
    """Reads numbers; of a tensor each value once, as the host waits for the device to know it.

    A learning rate is a tensor where an optimizer is ``capturable`` or compiled; a scheduler writes into it.
    """

    def __init__(self) -> None:
        self._read: dict[int, tuple[Tensor, int, float]] = {}  # the tensors are kept: no other gets the identity of one

    def of(self, value: float | Tensor) -> float:
        """The number that a group holds."""
        if not isinstance(value, Tensor):
            return float(value)
        tensor, version, number = self._read.get(id(value), (None, -1, 0.0))
        if tensor is not value or version != value._version:
            number = float(value)
            self._read[id(value)] = value, value._version, number
        return number
