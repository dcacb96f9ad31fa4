"""Which of an optimizer's parameters are averaged, and what of them has changed."""

import operator
from collections.abc import Collection, Sequence
from typing import final

from torch import Tensor
from torch.optim import Optimizer

from lightning_easgd.center import as_real

__all__ = ["AveragedParameters"]


@final
class AveragedParameters:
    """Those of an optimizer's parameters that are trained, or have been: floating-point or complex ones.

    A parameter that has never been trained (``requires_grad=False``, integers) is the same on all workers, and needs no
    averaging. It takes part from the step on before which it is unfrozen, and to the end, frozen again or not.

    Args:
        optimizer: The worker's optimizer; what is done to its groups later is seen by :meth:`watch` and
            :attr:`have_changed`.
        ignored: Parameters that stay each worker's own.

    Attributes:
        optimizer: As given; another may take its place.
        groups: The averaged parameters, in the optimizer's groups; some may be empty.
    """

    def __init__(self, optimizer: Optimizer, ignored: Collection[Tensor] = ()) -> None:
        self.optimizer = optimizer
        self._ignored = {id(parameter): parameter for parameter in ignored}
        self._entered: dict[Tensor, Tensor] = {}  # value before the first step, of those that are not in the groups yet
        self._sizes: list[int] = []
        self._frozen: list[Tensor] = []
        self._taken_in: list[list[Tensor]] = []  # all parameters of the optimizer
        self.groups: list[list[Tensor]] = []
        self.take_in()

    @property
    def flat(self) -> list[Tensor]:
        """All averaged parameters in one list."""
        return [parameter for group in self.groups for parameter in group]

    @property
    def real(self) -> list[list[Tensor]]:
        """The groups with complex parameters seen as real ones, whose last dimension is 2."""
        return [[as_real(parameter) for parameter in group] for group in self.groups]

    def watch(self) -> None:
        """Before each step: remember the values of parameters whose first step it is."""
        sizes = [len(group["params"]) for group in self.optimizer.param_groups]
        if sizes == self._sizes and not any(parameter.requires_grad for parameter in self._frozen):
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
    def selected_numel(self) -> int:
        """How many real numbers the groups would have after :meth:`take_in`."""
        return sum(as_real(parameter).numel() for group in self._selected() for parameter in group)

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
        return [
            [parameter for parameter in group["params"] if self._counts(parameter, known)]
            for group in self.optimizer.param_groups
        ]

    def _counts(self, parameter: Tensor, known: Collection[int]) -> bool:
        numbers = parameter.is_floating_point() or parameter.is_complex()
        trained = parameter.requires_grad or id(parameter) in known
        return numbers and trained and id(parameter) not in self._ignored

    def _look(self) -> None:
        groups = self.optimizer.param_groups
        self._sizes = [len(group["params"]) for group in groups]
        known = {id(parameter) for parameter in (*self.flat, *self._entered)}
        self._frozen = [p for group in groups for p in group["params"] if not self._counts(p, known)]
        self._frozen = [p for p in self._frozen if id(p) not in self._ignored]


def _are_the_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and not any(map(operator.is_not, a, b))
