"""The numbers in an optimizer's parameter groups, which may be tensors on a device."""

from typing import final

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["GroupNumbers"]


@final
class GroupNumbers:
    """Reads numbers; of a tensor each value once, as the host waits for the device to know it.

    A learning rate is a tensor where an optimizer is ``capturable`` or compiled; a scheduler writes into it, and others
    put a new one there at every step. A copy has read nothing.
    """

    def __init__(self) -> None:
        self._read = WeakIdKeyDictionary()  # of each tensor that lives its version, and the number

    def __reduce__(self) -> tuple[type["GroupNumbers"], tuple[()]]:
        return GroupNumbers, ()

    def of(self, value: float | Tensor) -> float:
        """The number that a group holds."""
        if not isinstance(value, Tensor):
            return float(value)
        if value not in self._read or self._read[value][0] != value._version:
            self._read[value] = value._version, float(value)
        return float(self._read[value][1])
