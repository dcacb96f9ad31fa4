"""Small networks as a problem for simulated workers: one vmapped gradient for all of them."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from typing_extensions import override

from lightning_easgd.lab.simulation.problems import Problem

__all__ = ["ClassificationProblem", "FlatNetwork", "Order"]

Order = Callable[[int, int], Tensor]
"""Of a worker and an epoch: the rows of the training set in the order of that epoch, int64 of shape (N,)."""


@final
class FlatNetwork:
    """A network as a function of one vector that holds all its parameters; works under vmap and grad.

    Args:
        network: Its present parameters are the start; it stays as it is.

    Attributes:
        start: The present parameters, shape (d,).

    Raises:
        ValueError: If the network has buffers (BatchNorm), which all vectors would share.
    """

    def __init__(self, network: nn.Module) -> None:
        if next(network.buffers(), None) is not None:
            raise ValueError(
                f"FlatNetwork(network={type(network).__name__}): it has buffers (BatchNorm?), and only parameters are"
                " kept for each worker; use a network without them."
            )
        self._network = network
        self._names, parameters = zip(*network.named_parameters(), strict=True)
        self._shapes = [parameter.shape for parameter in parameters]
        self._sizes = [parameter.numel() for parameter in parameters]
        self.start = torch.cat([parameter.detach().flatten() for parameter in parameters])

    def __call__(self, point: Tensor, inputs: Tensor) -> Tensor:
        """What the network with the parameters of a vector, shape (d,), makes of a batch."""
        parts = torch.split(point, self._sizes)
        parameters = {
            name: part.view(shape) for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }
        outputs: Tensor = functional_call(self._network, parameters, (inputs,))
        return outputs


@final
class ClassificationProblem(Problem):
    """A classifier's cross entropy; every worker draws its own mini-batches.

    An epoch's last batch is smaller if the batch size does not divide the training set. The error is the share of
    held-out samples that the center gets wrong.

    Args:
        network: Maps inputs to logits; its present parameters are the start of center and workers.
        inputs: Training inputs, shape (N, ...).
        labels: Their classes, int64 of shape (N,).
        held_out: Inputs and classes that the error is measured on.
        batch_size: Samples in a worker's batch.
        order: The order in which a worker draws the training set.

    Raises:
        ValueError: If the network has buffers (BatchNorm) or dropout, which the simulated workers would share.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        held_out: tuple[Tensor, Tensor],
        *,
        batch_size: int,
        order: Order,
    ) -> None:
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules()):
            raise ValueError(
                f"ClassificationProblem(network={type(network).__name__}): it has dropout, which the simulator does"
                " not draw; set its probability to 0."
            )
        self._call = FlatNetwork(network)
        self._inputs, self._labels, self._held_out = inputs, labels, held_out
        self._batch_size = batch_size
        self._batches_per_epoch = -(-len(inputs) // batch_size)
        self._order = order
        self._drawn: dict[int, tuple[int, Tensor]] = {}
        self._gradients = vmap(grad(self._loss))

    @property
    @override
    def message_bytes(self) -> int:
        return self._call.start.nbytes

    @override
    def start(self) -> Tensor:
        return self._call.start.clone()

    @override
    def gradients(self, points: Tensor, workers: Sequence[int], clocks: Sequence[int]) -> Tensor:
        batches = [self._rows(worker, clock) for worker, clock in zip(workers, clocks, strict=True)]
        rows = nn.utils.rnn.pad_sequence(batches, batch_first=True)
        lengths = torch.tensor([len(batch) for batch in batches])
        weights = (torch.arange(rows.shape[1]) < lengths[:, None]) / lengths[:, None]  # 0 for what pads a short batch
        gradients: Tensor = self._gradients(points, self._inputs[rows], self._labels[rows], weights.to(points))
        return gradients

    @torch.no_grad()
    @override
    def error(self, point: Tensor) -> float:
        inputs, labels = self._held_out
        logits = self._call(point, inputs)
        if not logits.isfinite().all():
            return float("nan")
        return float((logits.argmax(1) != labels).double().mean())

    def _rows(self, worker: int, clock: int) -> Tensor:
        epoch, batch = divmod(clock, self._batches_per_epoch)
        drawn = self._drawn.get(worker)
        if drawn is None or drawn[0] != epoch:
            drawn = self._drawn[worker] = epoch, self._order(worker, epoch)
        return drawn[1][batch * self._batch_size : (batch + 1) * self._batch_size]

    def _loss(self, point: Tensor, inputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(self._call(point, inputs), labels, reduction="none")
        return (losses * weights).sum()
