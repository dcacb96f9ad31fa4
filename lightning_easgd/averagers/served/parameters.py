"""An optimizer's parameters as a served center holds them: fixed when it is opened, frozen ones apart."""

from collections.abc import Collection, Sequence
from itertools import chain
from typing import final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.averagers.averaged_parameters import Names, described, in_order
from lightning_easgd.tensors.checksums import checksum
from lightning_easgd.tensors.flat_tensors import FlatTensors, as_real
from lightning_easgd.tensors.memory import once

__all__ = ["ServedParameters"]


@final
class ServedParameters:
    """The floating-point and complex parameters of an optimizer, in two segments of each group: trained, and frozen.

    A served center has room for all of them from the start, as it cannot grow. A frozen segment is the same everywhere
    and travels only from the moment at which one of its parameters is unfrozen. Of several that are one memory one
    takes part.

    Args:
        optimizer: The worker's optimizer.
        ignored: Parameters that stay each worker's own.
        trained: Parameters that have been trained before, frozen now or not.
        names: The module's parameters.
        strategy: Name of the strategy, for errors.
        synchronous: What has no served center, for errors: the strategy, and how it is asked for that.

    Attributes:
        segments: All parameters; those of group g are in segments 2 g (trained) and 2 g + 1 (frozen).
        exchanged: Numbers of the segments that travel.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ignored: Collection[Tensor] = (),
        trained: Collection[Tensor] = (),
        names: Names = dict,
        strategy: str = "EASGDStrategy",
        synchronous: str = "EASGDStrategy(mode='sync')",
    ) -> None:
        self._names = names
        self._strategy = strategy
        self._synchronous = synchronous
        self._known = [list(group["params"]) for group in optimizer.param_groups]
        leave_out = {id(parameter) for parameter in ignored}
        self.segments: list[list[Tensor]] = []
        before = {id(parameter) for parameter in trained}
        for group in self._known:
            numbers = [p for p in group if (p.is_floating_point() or p.is_complex()) and id(p) not in leave_out]
            numbers = in_order(numbers, names())
            self.segments.append([p for p in numbers if _is_trained(p) or id(p) in before])
            self.segments.append([p for p in numbers if not (_is_trained(p) or id(p) in before)])
        first, others = (in_order(chain.from_iterable(self.segments[n::2]), names()) for n in (0, 1))
        chosen = once(first, others)
        self.segments = [[p for p in segment if id(p) in chosen] for segment in self.segments]
        self.exchanged: set[int] = {number for number in range(0, len(self.segments), 2) if self.segments[number]}
        self._unfrozen: set[int] = set()  # that will travel
        self._frozen_at = {n: [*map(checksum, self.segments[n])] for n in range(1, len(self.segments), 2)}

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

    @property
    def described(self) -> list[list[str]]:
        """The segments as all workers must have them in common."""
        return described(self.segments, self._names())

    def watch(self) -> None:
        """Before each step: take notice of frozen segments of which a parameter is trained now.

        Raises:
            RuntimeError: If a parameter was written to while it was frozen: the center has the value of the start.
        """
        new = {
            number
            for number in range(1, len(self.segments), 2)
            if number not in self.exchanged | self._unfrozen and any(map(_is_trained, self.segments[number]))
        }
        for number in new:
            sums = map(checksum, self.segments[number])
            moved = [
                p
                for p, now, then in zip(self.segments[number], sums, self._frozen_at[number], strict=True)
                if now != then
            ]
            if moved:
                raise RuntimeError(
                    f"{self._strategy}: {self._listed(moved)} was written to while it was frozen, and is trained now,"
                    " but a served center has its value of the start of training. Write to it before training starts,"
                    f" or use {self._synchronous}."
                )
        self._unfrozen |= new

    def unfreeze(self) -> bool:
        """Let the segments travel that :meth:`watch` has found; whether there were any."""
        new, self._unfrozen = self._unfrozen, set()
        self.exchanged |= new
        return bool(new)

    def check(self, optimizer: Optimizer) -> None:
        """Raise unless the optimizer still has the parameters that the center has room for.

        Raises:
            RuntimeError: It has not, or has them in other groups; the error names those that have come or gone.
        """
        groups = [list(group["params"]) for group in optimizer.param_groups]
        if _places(groups) == _places(self._known):
            return
        now, then = ([parameter for group in each for parameter in group] for each in (groups, self._known))
        came, went = self._described(now, then), self._described(then, now)
        raise RuntimeError(
            f"{self._strategy}: the optimizer has got or lost parameters since training started (new: {came}; gone:"
            f" {went}), or has them in other groups, and a served center has a fixed size. Give it all parameters at"
            " the start (those that are frozen first may have requires_grad=False), or use"
            f" {self._synchronous}."
        )

    def _described(self, parameters: Sequence[Tensor], others: Sequence[Tensor]) -> str:
        """Those of the parameters that are not among the others."""
        known = {id(other) for other in others}
        return self._listed([parameter for parameter in parameters if id(parameter) not in known])

    def _listed(self, parameters: Sequence[Tensor]) -> str:
        names = self._names()
        texts = [f"{names.get(p, 'a parameter')} of shape {tuple(p.shape)}" for p in parameters]
        return ", ".join(texts) or "none"


def _places(groups: Sequence[Sequence[Tensor]]) -> dict[int, int]:
    """The number of each parameter's group, whatever its place in it."""
    return {id(parameter): number for number, group in enumerate(groups) for parameter in group}


def _is_trained(parameter: Tensor) -> bool:
    return parameter.requires_grad or parameter.grad is not None
