"""Which of an optimizer's parameters are averaged, and what of them has changed."""

import operator
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, zip_longest
from typing import final

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.tensors.flat_tensors import as_real
from lightning_easgd.tensors.memory import once

__all__ = ["AveragedParameters", "Names", "check_in_common", "described", "in_order"]

Names = Callable[[], Mapping[Tensor, str]]
"""Gives the parameters of the module as it is now, in its order, with their names."""


def in_order(parameters: Iterable[Tensor], names: Mapping[Tensor, str]) -> list[Tensor]:
    """Parameters in the order of their module, which is the same on all ranks; an optimizer's need not be.

    Those that the module does not have come last, in the order in which they are given.
    """
    places = {id(parameter): place for place, parameter in enumerate(names)}
    return sorted(parameters, key=lambda parameter: places.get(id(parameter), len(places)))


def described(groups: Sequence[Sequence[Tensor]], names: Mapping[Tensor, str]) -> list[list[str]]:
    """Each parameter by name, dtype and shape: what all workers must have in common."""
    return [
        [f"{names.get(parameter, 'a parameter')} ({parameter.dtype}, {tuple(parameter.shape)})" for parameter in group]
        for group in groups
    ]


def check_in_common(everyones: Sequence[Sequence[Sequence[str]]], rank: int, strategy: str) -> None:
    """Make sure that all workers average the same parameters.

    Args:
        everyones: What :func:`described` says on each rank.
        rank: This worker's.
        strategy: Name of the strategy, for the error.

    Raises:
        RuntimeError: It names the first that differs.
    """
    groups = everyones[rank]
    nothing: Sequence[str] = []
    for other_rank, theirs in enumerate(everyones):
        for number, (own, other) in enumerate(zip_longest(groups, theirs, fillvalue=nothing)):
            for here, there in zip_longest(own, other, fillvalue="nothing"):
                if here != there:
                    raise RuntimeError(
                        f"{strategy}: the optimizers train different parameters on different ranks. Group {number} has"
                        f" {here} on rank {rank} and {there} on rank {other_rank}; give every rank's optimizers the"
                        " same parameters in the same groups."
                    )


@final
class AveragedParameters:
    """Those of an optimizer's parameters that are trained, or have been: floating-point or complex ones.

    A parameter that has never been trained (it has no gradient and ``requires_grad=False``, or is of integers) is the
    same on all workers, and needs no averaging. It takes part from the step on before which it is unfrozen, and to the
    end, frozen again or not. Of several that are one memory one takes part: all would be pulled by each.

    Args:
        optimizer: The worker's optimizer; what is done to its groups later is seen by :meth:`watch` and
            :attr:`have_changed`.
        ignored: Parameters that stay each worker's own.
        trained: Parameters that have been trained before, frozen now or not.
        names: The module's parameters.

    Attributes:
        optimizer: As given; another may take its place.
        groups: The averaged parameters, in the optimizer's groups, each in the module's order; some may be empty.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        ignored: Collection[Tensor] = (),
        trained: Collection[Tensor] = (),
        names: Names = dict,
    ) -> None:
        self.optimizer = optimizer
        self._names = names
        self._ignored = {id(parameter): parameter for parameter in ignored}
        # Value before the first step, of those that are not in the groups yet.
        self._entered = {parameter: parameter.detach() for parameter in trained}
        self._sizes: list[int] = []
        self._frozen: list[Tensor] = []
        self._taken_in: list[list[Tensor]] = []  # all parameters of the optimizer
        self.groups: list[list[Tensor]] = []
        self.take_in()
        self._entered.clear()

    @property
    def flat(self) -> list[Tensor]:
        """All averaged parameters in one list."""
        return [parameter for group in self.groups for parameter in group]

    @property
    def real(self) -> list[list[Tensor]]:
        """The groups with complex parameters seen as real ones, whose last dimension is 2."""
        return [[as_real(parameter) for parameter in group] for group in self.groups]

    @property
    def described(self) -> list[list[str]]:
        """The groups as all workers must have them in common."""
        return described(self.groups, self._names())

    def watch(self) -> None:
        """Before each step: remember the values of parameters whose first step it is."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if sizes == self._sizes and not any(p.requires_grad or p.grad is not None for p in self._frozen):
            return
        known = {id(parameter) for parameter in self.flat}
        for group in self._selected():
            for parameter in group:
                if id(parameter) not in known:
                    self._entered.setdefault(parameter, parameter.detach().clone())
        self._look()

    @property
    def have_changed(self) -> bool:
        """Whether :meth:`take_in` would change the groups: by the identity of the parameters, not by their number."""
        now = [group["params"] for group in self.optimizer.param_groups]
        if not self._entered and len(now) == len(self._taken_in) and all(map(_are_the_same, now, self._taken_in)):
            return False
        selected = self._selected()
        return len(selected) != len(self.groups) or not all(map(_are_the_same, selected, self.groups))

    @property
    def departed(self) -> list[Tensor]:
        """Those that the optimizer does not have any more."""
        has = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in self.flat if id(parameter) not in has]

    @property
    def digest(self) -> int:
        """Of :attr:`described`."""
        return _digest(self.described)

    @property
    def changed(self) -> tuple[int, int]:
        """What :attr:`digest` would be after :meth:`take_in`, and how many parameters would be new."""
        selected, known = self._selected(), {id(parameter) for parameter in self.flat}
        new = sum(id(parameter) not in known for group in selected for parameter in group)
        return _digest(described(selected, self._names())), new

    def take_in(self) -> None:
        """Let the groups be what the optimizer has now."""
        self.groups = self._selected()
        self._taken_in = [list(group["params"]) for group in self.optimizer.param_groups]
        self._look()

    def entered_with(self, parameter: Tensor) -> Tensor:
        """The value of a new parameter before its first step, as far as that is known; forgotten then."""
        return self._entered.pop(parameter, parameter.detach())

    def _selected(self) -> list[list[Tensor]]:
        known = {id(parameter) for parameter in (*self.flat, *self._entered)}
        names = self._names()
        groups = [
            in_order([parameter for parameter in group["params"] if self._counts(parameter, known)], names)
            for group in self.optimizer.param_groups
        ]
        chosen = once(in_order(chain.from_iterable(groups), names))
        return [[parameter for parameter in group if id(parameter) in chosen] for group in groups]

    def _counts(self, parameter: Tensor, known: Collection[int]) -> bool:
        numbers = parameter.is_floating_point() or parameter.is_complex()
        trained = parameter.requires_grad or parameter.grad is not None or id(parameter) in known
        return numbers and trained and id(parameter) not in self._ignored

    def _look(self) -> None:
        groups = self.optimizer.param_groups
        self._sizes = [len(group["params"]) for group in groups]
        known = {id(parameter) for parameter in (*self.flat, *self._entered)}
        self._frozen = [p for group in groups for p in group["params"] if not self._counts(p, known)]
        self._frozen = [p for p in self._frozen if id(p) not in self._ignored]


def _are_the_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and not any(map(operator.is_not, a, b))


def _digest(groups: Sequence[Sequence[str]]) -> int:
    return zlib.crc32(repr(groups).encode())
