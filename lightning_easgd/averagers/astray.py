"""What becomes of a worker that has gone astray: whose difference from the center is not finite."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.transport.channel import ExchangeError

__all__ = ["AstrayPolicy", "FailIfAstray", "NonFiniteError", "ResetIfAstray", "begin_anew", "drop_gradients"]


class NonFiniteError(ExchangeError):
    """The difference of a worker from the center is infinite or not a number, or the center itself is."""


class AstrayPolicy(ABC):
    """What a non-finite difference means to the run. Whatever it is, the center is not touched by it.

    Args:
        strategy: Name of the strategy, for errors and warnings.
    """

    def __init__(self, strategy: str = "EASGDStrategy") -> None:
        self._strategy = strategy

    @abstractmethod
    def hear(self, who: str, clock: int) -> None:
        """Called on a worker that hears of an exchange in which others, or itself, have gone astray.

        Args:
            who: Whose difference is not finite.
            clock: The clock t of the exchange.

        Raises:
            NonFiniteError: If the run ends.
        """

    @abstractmethod
    def reset(self, optimizer: Optimizer, rank: int, clock: int) -> None:
        """Called on the worker that has gone astray, when its parameters have been put where the center is."""

    def check_center(self, finite: bool) -> None:
        """Raise where it is no worker that has gone astray but the center, to which nobody could go back.

        Args:
            finite: Whether the center is finite.

        Raises:
            NonFiniteError: If it is not.
        """
        if not finite:
            raise NonFiniteError(
                f"{self._strategy}: the center is not finite, and every difference that moved it was: a rate or a"
                " momentum of the center is too large, or a rule of your own divides by zero. Nothing that this run"
                " saves from here on can be used; go on from an earlier checkpoint."
            )


@final
class FailIfAstray(AstrayPolicy):
    """End the run on all ranks."""

    @override
    def hear(self, who: str, clock: int) -> None:
        raise NonFiniteError(
            f"{self._strategy}(on_nonfinite='fail'): the weights of {who} were not finite at the exchange after step"
            f" {clock}; the center is still that of the exchange before. Lower the learning rate, clip gradients, or"
            " look for the batch; on_nonfinite='reset' lets such a worker start again at the center."
        )

    @override
    def reset(self, optimizer: Optimizer, rank: int, clock: int) -> None:
        self.hear(f"rank {rank}", clock)


@final
class ResetIfAstray(AstrayPolicy):
    """Let that worker start again at the center, with an optimizer that knows nothing of the steps before.

    Args:
        strategy: Name of the strategy, for the warning.
        mend: Puts right what else of the worker is not finite.
    """

    def __init__(self, strategy: str = "EASGDStrategy", mend: Callable[[], None] = lambda: None) -> None:
        super().__init__(strategy)
        self._mend = mend

    @override
    def hear(self, who: str, clock: int) -> None:
        pass

    @override
    def reset(self, optimizer: Optimizer, rank: int, clock: int) -> None:
        begin_anew(optimizer)
        self._mend()
        warnings.warn(
            f"{self._strategy}(on_nonfinite='reset'): the weights of rank {rank} were not finite at the exchange after"
            f" step {clock}; it starts again at the center, and so does the state of its {type(optimizer).__name__}.",
            RuntimeWarning,
            stacklevel=2,
        )


def begin_anew(optimizer: Optimizer) -> None:
    """Let an optimizer whose worker starts again at the center know nothing of where it was."""
    optimizer.state.clear()  # what led there, or came of it, is in momentum and averages, too
    drop_gradients(parameter for group in optimizer.param_groups for parameter in group["params"])


@torch.no_grad()
def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Let gradients that may have been taken already, where a worker was, be zero."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()  # not None, which a gradient scaler takes for an error
