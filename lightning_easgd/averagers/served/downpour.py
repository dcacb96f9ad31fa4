r"""The DOWNPOUR family: workers add their updates to the served center and take it over."""

from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_easgd.averagers.served.averager import CenterPart, ServedAverager
from lightning_easgd.tensors.flat_tensors import FlatTensors

__all__ = ["DownpourAverager"]


@final
class DownpourAverager(ServedAverager):
    r"""DOWNPOUR as in Zhang, Choromanska, LeCun 2015; with another rule at the center MDOWNPOUR and the averaged ones.

    .. math:: \tilde x \leftarrow \tilde x + v^i, \qquad x^i \leftarrow \tilde x, \qquad v^i \leftarrow 0

    whenever τ divides the worker's own clock, where :math:`v^i` is what the optimizer has added to :math:`x^i` since.
    The next gradient is taken at the new :math:`x^i`, so that the worker waits for the center in :meth:`begin`:
    unlike an elastic exchange this one cannot be hidden behind the gradient. Where the gradient is taken before
    :meth:`begin` is called, :meth:`look_ahead` makes the exchange right after the step before.

    Args:
        optimizer: As for :class:`ServedAverager`.
        part: As for :class:`ServedAverager`.
        layout: As for :class:`ServedAverager`; holds the common starting point.
        **keywords: As for :class:`ServedAverager`.
    """

    def __init__(self, optimizer: Optimizer, part: CenterPart, *, layout: FlatTensors, **keywords: Any) -> None:
        super().__init__(optimizer, part, layout=layout, **keywords)
        self._taken_over = layout.like(layout.flat.clone())
        self._norm: Tensor | None = None

    @override
    @torch.no_grad()
    def begin(self) -> None:
        self._served.watch()
        if not self._is_due():
            return
        self._wire.load_(self.parameters)
        for number in self._served.exchanged:
            self._wire.segments[number].sub_(self._taken_over.segments[number])
        self._norm = self._norm_of_update()
        self._send([1.0] * len(self._optimizer.param_groups))
        self.complete()

    @override
    def finish(self) -> None:
        self.clock += 1

    @override
    def look_ahead(self) -> None:
        self.begin()

    @override
    @torch.no_grad()
    def start_at_center(self) -> None:
        super().start_at_center()
        self._take_over()

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"taken_over": self._taken_over.flat, "exchanged_at": self._begun_at}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._taken_over.flat.copy_(state["taken_over"])
        self._begun_at = state["exchanged_at"]

    @override
    def _apply(self) -> None:
        self._wire.store(self.parameters)
        self._take_over()

    @override
    def _measure(self) -> Tensor | None:
        return self._norm

    def _take_over(self) -> None:
        """Let the next update begin at the parameters: where a narrow dtype has rounded them, not at the answer."""
        self._taken_over.only(self._served.exchanged).load_(self.parameters)

    def _norm_of_update(self) -> Tensor:
        norms = [torch.linalg.vector_norm(self._wire.segments[number]) for number in self._served.exchanged]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm
