r"""Asynchronous EASGD and EAMSGD: every worker exchanges with the served center on its own clock."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.served.averager import CenterPart, ServedAverager
from lightning_easgd.method.elastic import elastic_pull_
from lightning_easgd.method.position import ParameterPosition, Position
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.method.rules import AsymmetricExchange, CenterRule, ServedExchange, SymmetricExchange

__all__ = ["AsynchronousAverager", "elastic_exchange"]


def elastic_exchange(rates: MovingRates, rule: CenterRule) -> ServedExchange:
    """The center's side of an exchange at these rates."""
    return AsymmetricExchange(rule) if rates.is_asymmetric else SymmetricExchange(rule)


@final
class AsynchronousAverager(ServedAverager):
    r"""Algorithms 1 and, with :class:`~lightning_easgd.method.position.LookAheadPosition`, 2 of the paper of EASGD.

    .. math:: d = \alpha (x^i - \tilde x), \qquad x^i \leftarrow x^i - d, \qquad \tilde x \leftarrow \tilde x + d

    whenever τ divides the worker's own clock :math:`t^i`, with :math:`d` computed once, at the center. :meth:`begin`
    sends :math:`x^i` before the forward pass; the answer is needed when the gradient step at that :math:`x^i` has been
    made (:meth:`finish`), and travels until then. The exchange at :math:`t^i = 0` changes nothing and is left out.

    Args:
        optimizer: As for :class:`ServedAverager`.
        part: As for :class:`ServedAverager`.
        rates: α and β; α is β/p of the living workers unless it is given.
        position: What the worker exchanges: its parameters, or the point before the look-ahead.
        **keywords: As for :class:`ServedAverager`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        part: CenterPart,
        *,
        rates: MovingRates,
        position: Callable[[Optimizer], Position] = ParameterPosition,
        **keywords: Any,
    ) -> None:
        super().__init__(optimizer, part, **keywords)
        self._rates = rates
        self._position = position(optimizer)
        self._alphas: list[float] = []
        self._factors: list[float] = []  # by which each segment's difference in the wire was multiplied

    @override
    @torch.no_grad()
    def begin(self) -> None:
        if not self._is_due():
            return
        workers = self._shared.workers()
        rates = self._rates.of_groups(self._optimizer, workers, self.clock)
        self._position.write(self._wire, self.parameters)
        self._alphas = [alpha for alpha, _ in rates]
        self._send([beta / workers for _, beta in rates] if self._rates.is_asymmetric else self._alphas)

    @override
    @torch.no_grad()
    def finish(self) -> None:
        self.complete()
        self.clock += 1

    @override
    def follow(self, optimizer: Optimizer) -> None:
        super().follow(optimizer)
        self._position.follow(optimizer)

    @override
    def close(self) -> None:
        self._position.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"position": self._position.state_dict(self.laid_out)}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._position.load_state_dict(state["position"], self.laid_out)

    @override
    def _apply(self) -> None:
        # The answer is the bare difference in an asymmetric exchange, else α times the difference.
        bare = self._rates.is_asymmetric
        alphas = [self._alphas[self._served.group_of(number)] for number in range(len(self._wire.segments))]
        for parameters, answers, alpha in zip(self._served.real, self._wire.groups, alphas, strict=True):
            elastic_pull_(parameters, answers, alpha if bare else 1.0)
        self._factors = [1.0 if bare or alpha == 0 else alpha for alpha in alphas]

    @override
    def _measure(self) -> Tensor | None:
        if not self._factors:
            return None
        norms = [
            torch.linalg.vector_norm(self._wire.segments[number]) / self._factors[number]
            for number in self._served.exchanged
        ]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm
