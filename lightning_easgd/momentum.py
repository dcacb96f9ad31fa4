r"""Where a worker is: the point that it exchanges with the center, for plain and for Nesterov optimizers."""

from abc import ABC, abstractmethod
from typing import Any, final

from torch import Tensor
from torch.optim import SGD, Optimizer
from typing_extensions import override

from lightning_easgd.center import FlatTensors
from lightning_easgd.elastic import nesterov_position_

__all__ = ["LookAheadPosition", "ParameterPosition", "Position", "make_nesterov"]


class Position(ABC):
    """Reads a worker's position x off its optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @abstractmethod
    def write(self, into: FlatTensors) -> None:
        """Write x into a buffer with the optimizer's layout."""

    def after_step(self) -> None:  # noqa: B027 - most positions need no memory
        """Take notice of a finished optimizer step."""

    def state_dict(self) -> list[float]:
        """What a resumed worker must know beside its optimizer's state."""
        return []

    def load_state_dict(self, state: list[float]) -> None:  # noqa: B027
        """Take over what :meth:`state_dict` has returned."""


@final
class ParameterPosition(Position):
    """EASGD: the worker is where its parameters are."""

    @override
    def write(self, into: FlatTensors) -> None:
        into.load_([parameter for group in self._optimizer.param_groups for parameter in group["params"]])


@final
class LookAheadPosition(Position):
    r"""EAMSGD: the parameters hold the look-ahead point :math:`y = x + \delta v`; the worker is at :math:`x`.

    With :math:`v = -\eta b` of ``torch.optim.SGD(nesterov=True)``, :math:`x = y + \eta\delta b`
    (:func:`~lightning_easgd.elastic.nesterov_position_`), where :math:`\eta` and :math:`\delta` are those of the step
    that wrote :math:`b`: a scheduler may have changed both since.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self._lr_times_momentum: list[float] = []
        self.after_step()

    @override
    def after_step(self) -> None:
        self._lr_times_momentum = [float(group["lr"]) * group["momentum"] for group in self._optimizer.param_groups]

    @override
    def state_dict(self) -> list[float]:
        return list(self._lr_times_momentum)

    @override
    def load_state_dict(self, state: list[float]) -> None:
        if state:  # else it was saved by workers without momentum
            self._lr_times_momentum = list(state)

    @override
    def write(self, into: FlatTensors) -> None:
        groups = self._optimizer.param_groups
        into.load_([parameter for group in groups for parameter in group["params"]])
        # A group added since the last step has no rate here, and no momentum either.
        for group, views, rate in zip(groups, into.groups, self._lr_times_momentum, strict=False):
            positions: list[Tensor] = []
            buffers: list[Tensor] = []
            for parameter, view in zip(group["params"], views, strict=True):
                buffer = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
                if buffer is not None:  # a parameter that has had no gradient yet has v = 0
                    positions.append(view)
                    buffers.append(buffer.to(view.device))
            if buffers:
                nesterov_position_(positions, buffers, rate)


def make_nesterov(optimizer: Optimizer, momentum: float) -> None:
    """Make an SGD optimizer the worker of EAMSGD: Nesterov momentum δ, in place.

    A parameter group that has a momentum keeps it and becomes Nesterov too.

    Args:
        optimizer: The worker's optimizer.
        momentum: δ for the groups that have none.

    Raises:
        TypeError: If the optimizer is not :class:`torch.optim.SGD`.
        ValueError: If a group has a dampening, which Nesterov momentum excludes.
    """
    if not isinstance(optimizer, SGD):
        raise TypeError(
            f"EASGDStrategy(momentum={momentum}): EAMSGD is defined for SGD, but the optimizer is"
            f" {type(optimizer).__name__}. Use torch.optim.SGD, or leave momentum=None (strategy 'easgd'), which works"
            " with any optimizer."
        )
    groups: list[dict[str, Any]] = [optimizer.defaults, *optimizer.param_groups]
    for group in groups:
        if group["dampening"] != 0:
            raise ValueError(
                f"EASGDStrategy(momentum={momentum}): SGD(dampening={group['dampening']}) excludes Nesterov momentum;"
                " set dampening=0."
            )
        group["momentum"] = group["momentum"] or momentum
        group["nesterov"] = True
