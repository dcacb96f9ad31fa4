"""The gradients of many workers in one vmapped call, and which way of computing them is fastest on a device."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn import functional as F

from harness.stacked_convolution import with_patches
from lightning_easgd.lab.simulation.networks import FlatNetwork

__all__ = ["StackedGradients", "Way", "fastest", "measure"]


@final
@dataclass(frozen=True)
class Way:
    """How gradients are computed.

    Attributes:
        convolution: "grouped", what vmap makes of a convolution, or "patches", a matrix product for each worker.
        precision: "float32" (TF32 on GPUs that have it) or "bfloat16" for activations; parameters, losses and
            gradients are float32 in both.
        rows: Most workers in one call.
    """

    convolution: str
    precision: str
    rows: int


@final
class StackedGradients:
    """Cross entropy of a network, of which each worker has its own parameters, batch and dropout masks.

    Args:
        network: The network.
        way: How to compute.

    Attributes:
        start: The network's present parameters, shape (d,).
    """

    def __init__(self, network: nn.Module, way: Way) -> None:
        trained = with_patches(network) if way.convolution == "patches" else copy.deepcopy(network)
        self._trained, self._scored = FlatNetwork(trained.train()), FlatNetwork(copy.deepcopy(network).eval())
        self.start = self._scored.start
        self._dtype = getattr(torch, way.precision)
        self._rows = way.rows
        self._call = vmap(grad_and_value(self._loss), randomness="different")

    def __call__(self, points: Tensor, images: Tensor, labels: Tensor, workers: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients, shape (k, d), and losses, shape (k,).

        Args:
            points: Parameters, shape (k, d).
            images: Batches of p workers, shape (p, n, 3, H, W).
            labels: Their classes, shape (p, n).
            workers: Whose batch each of the k gets, shape (k,).
        """
        pieces = -(-len(points) // self._rows)
        parts = zip(points.tensor_split(pieces), workers.tensor_split(pieces), strict=True)
        gradients, losses = zip(*(self._call(part, images[of], labels[of]) for part, of in parts), strict=True)
        return torch.cat(gradients), torch.cat(losses)

    @torch.no_grad()
    def error(self, point: Tensor, images: Tensor, labels: Tensor, batch: int = 2000) -> Tensor:
        """The share of images that a point gets wrong, without dropout; 0.9 where it is not finite."""
        wrong = [
            (self._scored(point, some).argmax(1) != of).sum()
            for some, of in zip(images.split(batch), labels.split(batch), strict=True)
        ]
        share = torch.stack(wrong).sum() / len(images)
        return torch.where(point.isfinite().all(), share, torch.full_like(share, 0.9))

    def _loss(self, point: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        logits = self._trained(point.to(self._dtype), images.to(self._dtype))
        return F.cross_entropy(logits.to(point.dtype), labels)


def measure(
    network: nn.Module, ways: Sequence[Way], batch: tuple[Tensor, Tensor], repeats: int
) -> list[dict[str, Any]]:
    """Milliseconds for each worker of each way; one that needs too much memory is left out.

    A way that is slower than three times the best so far is not repeated, and not tried with more workers.
    """
    images, labels = batch
    table: list[dict[str, Any]] = []
    for way in ways:
        kind, best = (way.convolution, way.precision), min((row["ms_per_worker"] for row in table), default=math.inf)
        if any((row["convolution"], row["precision"]) == kind and row["ms_per_worker"] > 3 * best for row in table):
            continue
        try:
            milliseconds = _milliseconds(network, way, images, labels, 1)  # with cuDNN's search
            milliseconds = _milliseconds(network, way, images, labels, 1)
            if milliseconds < 3 * best:
                milliseconds = _milliseconds(network, way, images, labels, repeats)
        except torch.OutOfMemoryError:
            print(f"too large for this device: {way}", flush=True)
            continue
        finally:
            if images.device.type == "cuda":
                torch.cuda.empty_cache()
        table.append({**vars(way), "ms_per_worker": round(milliseconds, 4)})
        print(table[-1], flush=True)
    return table


def fastest(table: Sequence[dict[str, Any]], precision: str) -> Way:
    """The fastest way of a precision."""
    row = min((row for row in table if row["precision"] == precision), key=lambda row: row["ms_per_worker"])
    return Way(row["convolution"], row["precision"], row["rows"])


def _milliseconds(network: nn.Module, way: Way, images: Tensor, labels: Tensor, repeats: int) -> float:
    """Of one worker; the tensors are gone when it returns, also from an error."""
    gradients = StackedGradients(network, way)
    points = gradients.start.repeat(way.rows, 1)
    of = torch.arange(way.rows, device=points.device) % len(images)
    _wait(points.device)
    started = time.perf_counter()
    for _ in range(repeats):
        gradients(points, images, labels, of)
    _wait(points.device)
    return 1e3 * (time.perf_counter() - started) / repeats / way.rows


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
