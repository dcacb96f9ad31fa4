"""An optimizer's parameters as a served center holds them: fixed when it is opened, frozen ones apart."""

from collections.abc import Callable, Collection, Sequence
from typing import final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.center import FlatTensors, as_real

__all__ = ["NameOf", "ServedParameters"]

NameOf = Callable[[Tensor], str]


@final
class ServedParameters:
    """The floating-point and complex parameters of an optimizer, in two segments of each group: trained, and frozen.

    A served center has room for all of them from the start, as it cannot grow. A frozen segment is the same everywhere
    and travels only from the moment at which one of its parameters is unfrozen.

    Args:
        optimizer: The worker's optimizer.
        ignored: Parameters that stay each worker's own.
        name_of: A parameter's name in its module, empty if it has none there; for errors.
        strategy: Name of the strategy, for errors.

    Attributes:
        segments: All parameters; those of group g are in segments 2 g (trained) and 2 g + 1 (frozen).
        exchanged: Numbers of the segments that travel.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ignored: Collection[Tensor] = (),
        name_of: NameOf = lambda _: "",
        strategy: str = "EASGDStrategy",
    ) -> None:
        self._name_of = name_of
        self._strategy = strategy
        self._known = [list(group["params"]) for group in optimizer.param_groups]
        leave_out = {id(parameter) for parameter in ignored}
        self.segments: list[list[Tensor]] = []
        for group in self._known:
            numbers = [p for p in group if (p.is_floating_point() or p.is_complex()) and id(p) not in leave_out]
            self.segments.append([parameter for parameter in numbers if parameter.requires_grad])
            self.segments.append([parameter for parameter in numbers if not parameter.requires_grad])
        self.exchanged: set[int] = {number for number in range(0, len(self.segments), 2) if self.segments[number]}

    @property
    def averaged(self) -> list[list[Tensor]]:
        """The segments, of which those that do not travel are empty."""
        return [segment if number in self.exchanged else [] for number, segment in enumerate(self.segments)]

    @property
    def real(self) -> list[list[Tensor]]:
        """As :attr:`averaged`, with complex parameters seen as real ones."""
        return [[as_real(parameter) for parameter in segment] for segment in self.averaged]

    def group_of(self, segment: int) -> int:
        """The number of the optimizer's group in which a segment lies."""
        return segment // 2

    def layout(self, dtype: torch.dtype) -> FlatTensors:
        """A flat vector of all segments, with the parameters' values in it."""
        layout = FlatTensors([[as_real(parameter) for parameter in segment] for segment in self.segments], dtype)
        with torch.no_grad():
            layout.load_([parameter for segment in self.segments for parameter in segment])
        return layout

    def unfreeze(self) -> bool:
        """Let frozen segments travel of which a parameter is trained now; whether there were any."""
        new = {
            number
            for number in range(1, len(self.segments), 2)
            if number not in self.exchanged and any(parameter.requires_grad for parameter in self.segments[number])
        }
        self.exchanged |= new
        return bool(new)

    def check(self, optimizer: Optimizer) -> None:
        """Raise unless the optimizer still has the parameters that the center has room for.

        Raises:
            RuntimeError: It names those that have come or gone.
        """
        now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        then = [parameter for group in self._known for parameter in group]
        if len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True)):
            return
        came, went = self._described(now, then), self._described(then, now)
        raise RuntimeError(
            f"{self._strategy}: the optimizer has got or lost parameters since training started (new: {came}; gone:"
            f" {went}), and a served center has a fixed size. Give it all parameters at the start (those that are"
            " frozen first may have requires_grad=False), or use EASGDStrategy(mode='sync')."
        )

    def _described(self, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> str:
        """Those of the parameters that are not among the others."""
        known = {id(other) for other in others}
        texts = [
            f"{self._name_of(parameter) or 'a parameter'} of shape {tuple(parameter.shape)}"
            for parameter in parameters
            if id(parameter) not in known
        ]
        return ", ".join(texts) or "none"
