r"""Where a worker is: the point that it exchanges with the center, for plain and for Nesterov optimizers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_easgd.method.elastic import nesterov_position_
from lightning_easgd.tensors.flat_tensors import FlatTensors, all_finite, as_real
from lightning_easgd.tensors.group_numbers import GroupNumbers
from lightning_easgd.tensors.memory import place

__all__ = ["LookAheadPosition", "ParameterPosition", "Position", "make_nesterov"]


class Position(ABC):
    """Reads a worker's position x off its parameters and its optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @abstractmethod
    def write(self, into: FlatTensors, parameters: Sequence[Tensor] | None = None) -> None:
        """Write x into a buffer.

        Args:
            into: A buffer with a view for each parameter.
            parameters: Those of the optimizer's parameters that are averaged; None for all.
        """

    def is_finite(self) -> bool:
        """Whether what x is read off beside the parameters is finite."""
        return True

    def follow(self, optimizer: Optimizer) -> None:
        """Go on with another optimizer of the same parameters, in place of the one before."""
        self._optimizer = optimizer

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def state_dict(self, parameters: Sequence[Tensor]) -> list[float]:  # noqa: ARG002
        """What a resumed worker must know beside its optimizer's state, of these parameters."""
        return []

    def load_state_dict(self, state: Sequence[float], parameters: Sequence[Tensor]) -> None:  # noqa: B027
        """Take over what :meth:`state_dict` has returned of as many parameters."""

    def close(self) -> None:  # noqa: B027
        """Let go of the optimizer."""


@final
class ParameterPosition(Position):
    """EASGD: the worker is where its parameters are."""

    @override
    def write(self, into: FlatTensors, parameters: Sequence[Tensor] | None = None) -> None:
        into.load_(self._all_parameters() if parameters is None else parameters)


@final
class LookAheadPosition(Position):
    r"""EAMSGD: the parameters hold the look-ahead point :math:`y = x + \delta v`; the worker is at :math:`x`.

    With :math:`v = -\eta b` of ``torch.optim.SGD(nesterov=True)``, :math:`x = y + \eta\delta b`
    (:func:`~lightning_easgd.method.elastic.nesterov_position_`), where :math:`\eta` and :math:`\delta` are those of the
    step that wrote :math:`b`. A scheduler may have changed both since, and steps that a gradient scaler skipped, or in
    which the parameter had no gradient, have not written it.

    Args:
        optimizer: A ``torch.optim.SGD``; its steps are listened to.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._of_parameters: dict[Tensor, float] = {}  # ηδ of the last step that wrote a parameter's buffer
        self._apart: set[Tensor] = set()  # those of which it is not that of their group's last step
        # The groups of the last step, with their ηδ; kept, so that no other can get the identity of one.
        self._of_groups: dict[int, tuple[Any, int, float]] = {}
        self._handle: RemovableHandle | None = None
        self._numbers = GroupNumbers()
        super().__init__(optimizer)
        self.follow(optimizer)

    @override
    def follow(self, optimizer: Optimizer) -> None:
        self.close()
        super().follow(optimizer)
        self._of_parameters = dict(self._of_groups_now())
        self._apart.clear()
        self._of_groups.clear()
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @override
    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()

    @override
    def state_dict(self, parameters: Sequence[Tensor]) -> list[float]:
        now = dict(self._of_groups_now())
        return [self._of_parameters.get(parameter, now.get(parameter, 0.0)) for parameter in parameters]

    @override
    def is_finite(self) -> bool:
        return all_finite(
            [
                state["momentum_buffer"]
                for state in self._optimizer.state.values()
                if state.get("momentum_buffer") is not None
            ]
        )

    @override
    def load_state_dict(self, state: Sequence[float], parameters: Sequence[Tensor]) -> None:
        if len(state) == len(parameters):  # else it was saved by workers without momentum
            self._of_parameters.update(zip(parameters, state, strict=True))
            self._apart.update(parameters)

    @override
    def write(self, into: FlatTensors, parameters: Sequence[Tensor] | None = None) -> None:
        parameters = self._all_parameters() if parameters is None else parameters
        into.load_(parameters)
        pairs: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, view, factor in zip(parameters, into.views, self.state_dict(parameters), strict=True):
            buffer = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:  # a parameter that has had no gradient yet has v = 0
                positions, buffers = pairs.setdefault(factor, ([], []))
                positions.append(view)
                buffers.append(as_real(buffer).to(view.device))
        for lr_times_momentum, (positions, buffers) in pairs.items():
            nesterov_position_(positions, buffers, lr_times_momentum)
        for number, twin in self._twins(parameters):  # one by one: two may be of one parameter
            buffer = as_real(self._optimizer.state[twin]["momentum_buffer"])
            view = into.views[number]
            nesterov_position_([view], [buffer.to(view.device)], *self.state_dict([twin]))

    def _twins(self, parameters: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """The others that are one memory with a parameter and have moved it, too, with the number of that one."""
        known = {id(parameter) for parameter in parameters}
        moved = (p for p in self._all_parameters() if id(p) not in known)
        others = [p for p in moved if self._optimizer.state.get(p, {}).get("momentum_buffer") is not None]
        if not others:
            return
        numbers = {place(parameter): number for number, parameter in enumerate(parameters)} | {None: None}
        for other in others:
            number = numbers.get(place(other))
            if number is not None:
                yield number, other

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Take notice of a step that was made: it wrote the buffers of the parameters that had a gradient."""
        of_groups = [(group, (len(group["params"]), self._factor(group))) for group in optimizer.param_groups]
        if not self._apart and all(self._of_groups.get(id(group), (None,))[1:] == now for group, now in of_groups):
            return  # without asking whether it was made, which would wait for the device
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer skips the step itself
        if found is not None and found.item():
            return
        for group, now in of_groups:
            written = self._apart.intersection(group["params"]) if self._apart else set()
            if self._of_groups.get(id(group), (None,))[1:] != now:
                self._of_groups[id(group)] = group, *now
                written = set(group["params"])
            for parameter in written:
                if parameter.grad is not None:
                    self._of_parameters[parameter] = now[1]
                    self._apart.discard(parameter)
                elif self._of_parameters.setdefault(parameter, now[1]) != now[1]:
                    self._apart.add(parameter)

    def _of_groups_now(self) -> Iterator[tuple[Tensor, float]]:
        for group in self._optimizer.param_groups:
            factor = self._factor(group)
            yield from ((parameter, factor) for parameter in group["params"])

    def _factor(self, group: Mapping[str, Any]) -> float:
        return self._numbers.of(group["lr"]) * self._numbers.of(group["momentum"])


def make_nesterov(optimizer: Optimizer, momentum: float, strategy: str = "EASGDStrategy") -> None:
    """Make an SGD optimizer the worker of EAMSGD: Nesterov momentum δ, in place.

    A parameter group that has a momentum keeps it and becomes Nesterov too.

    Args:
        optimizer: The worker's optimizer.
        momentum: δ for the groups that have none.
        strategy: The class of which it is an argument, for errors.

    Raises:
        TypeError: If the optimizer is not :class:`torch.optim.SGD`.
        ValueError: If a group has a dampening, which Nesterov momentum excludes.
    """
    if not isinstance(optimizer, SGD):
        raise TypeError(
            f"{strategy}(momentum={momentum}): EAMSGD is defined for SGD, but the optimizer is"
            f" {type(optimizer).__name__}. Use torch.optim.SGD, or leave momentum=None (strategy 'easgd'), which works"
            " with any optimizer."
        )
    groups: list[dict[str, Any]] = [optimizer.defaults, *optimizer.param_groups]
    for group in groups:
        if group["dampening"] != 0:
            raise ValueError(
                f"{strategy}(momentum={momentum}): SGD(dampening={group['dampening']}) excludes Nesterov momentum;"
                " set dampening=0."
            )
        group["momentum"] = group["momentum"] or momentum
        group["nesterov"] = True
