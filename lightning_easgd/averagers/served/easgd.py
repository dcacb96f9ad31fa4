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
from lightning_easgd.method.rules import (
    AsymmetricExchange,
    CenterRule,
    ServedExchange,
    SymmetricExchange,
    TowardsNewCenter,
)

__all__ = ["AsynchronousAverager", "elastic_exchange"]


def elastic_exchange(rates: MovingRates, rule: CenterRule, to_new: bool = False) -> ServedExchange:
    """The center's side of an exchange at these rates; ``to_new`` for a pull towards the center of after it."""
    if to_new:
        return TowardsNewCenter(rule)
    return AsymmetricExchange(rule) if rates.is_asymmetric else SymmetricExchange(rule)


@final
class AsynchronousAverager(ServedAverager):
    r"""Algorithms 1 and, with :class:`~lightning_easgd.method.position.LookAheadPosition`, 2 of the paper of EASGD.

    .. math:: d = \alpha (x^i - \tilde x), \qquad x^i \leftarrow x^i - d, \qquad \tilde x \leftarrow \tilde x + d

    whenever τ divides the worker's own clock :math:`t^i`, with :math:`d` computed once, at the center. :meth:`begin`
    sends :math:`x^i` before the forward pass; the answer is needed when the gradient step at that :math:`x^i` has been
    made (:meth:`finish`), and travels until then. The exchange at :math:`t^i = 0` changes nothing and is left out.
    With a delay k the answer may travel k steps longer, and is applied after those exactly. An exchange that answers
    with a difference from the new center (:class:`~lightning_easgd.method.rules.TowardsNewCenter`) begins after each
    τ-th step, so that with k = 0 the next gradient is taken at the pulled point.

    Args:
        optimizer: As for :class:`ServedAverager`.
        part: As for :class:`ServedAverager`.
        rates: α and β; α is β/p of the living workers unless it is given.
        position: What the worker exchanges: its parameters, or the point before the look-ahead.
        to_new: Whether the answer is the difference from the new center.
        delay: k, below τ.
        **keywords: As for :class:`ServedAverager`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        part: CenterPart,
        *,
        rates: MovingRates,
        position: Callable[[Optimizer], Position] = ParameterPosition,
        to_new: bool = False,
        delay: int = 0,
        **keywords: Any,
    ) -> None:
        super().__init__(optimizer, part, **keywords)
        self._rates = rates
        self._position = position(optimizer)
        self._follows_step = to_new
        self._is_bare = rates.is_asymmetric or to_new  # else the answer is α times the difference
        self._delay = delay if to_new else delay + 1  # from the clock of the exchange to that of its answer
        self._due_at = 0
        self._alphas: list[float] = []
        self._factors: list[float] = []  # by which each segment's difference in the wire was multiplied

    @override
    @torch.no_grad()
    def begin(self) -> None:
        self._served.watch()
        if not self._follows_step and self._is_due():
            self._exchange_parameters()

    def _exchange_parameters(self) -> None:
        self.complete()  # it is over, unless the run that is resumed had a longer delay
        self._keep_distance()
        workers = self._shared.workers()
        rates = self._rates.of_groups(self._optimizer, workers, self.clock)
        self._position.write(self._wire, self.parameters)
        self._alphas = [alpha for alpha, _ in rates]
        self._due_at = self.clock + self._delay
        self._send([beta / workers for _, beta in rates] if self._is_bare else self._alphas)

    @override
    @torch.no_grad()
    def finish(self) -> None:
        self.clock += 1
        self._complete_if_due()
        if self._follows_step and self._is_due():
            self._exchange_parameters()
            self._complete_if_due()

    def _complete_if_due(self) -> None:
        if self.clock >= self._due_at:
            self.complete()

    @override
    def follow(self, optimizer: Optimizer) -> None:
        super().follow(optimizer)
        self._position.follow(optimizer)

    @override
    def close(self) -> None:
        self._position.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"position": self._position.state_dict(self.laid_out)}
        if self._is_answered:
            answers = self._layout.like()  # zero where nothing is under way
            for number in self._served.exchanged:
                answers.segments[number].copy_(self._wire.segments[number])
            state["answer"] = {
                "flat": answers.flat, "alphas": self._alphas, "due_at": self._due_at, "is_bare": self._is_bare
            }  # fmt: skip
        return state

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._position.load_state_dict(state["position"], self.laid_out)
        answer = state.get("answer")
        groups = len(self._optimizer.param_groups)
        if answer is not None and (answer["is_bare"], len(answer["alphas"])) == (self._is_bare, groups):
            self._layout.flat.copy_(answer["flat"])
            self._alphas, self._due_at = answer["alphas"], answer["due_at"]
            self._is_answered = True

    @override
    def _apply(self) -> None:
        alphas = [self._alphas[self._served.group_of(number)] for number in range(len(self._wire.segments))]
        for parameters, answers, alpha in zip(self._served.real, self._wire.groups, alphas, strict=True):
            elastic_pull_(parameters, answers, alpha if self._is_bare else 1.0)
        self._factors = [1.0 if self._is_bare or alpha == 0 else alpha for alpha in alphas]

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
