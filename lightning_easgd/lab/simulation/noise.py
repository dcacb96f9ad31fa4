"""Gaussian noise with a stream of its own for each worker."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["WorkerNoise"]

_BLOCK = 16
# Workers and seeds are small integers: a large odd factor keeps (seed 0, worker 1) and (seed 1, worker 0) apart.
_WORKER_STRIDE = 1_000_003


@final
class WorkerNoise:
    """Draws the noise of each worker's gradients in blocks, so that it does not depend on who steps with whom.

    Args:
        like: A vector of the run, shape (d,), for size, dtype and device.
        deviation: Standard deviation of each component.
        seed: The run's seed.
    """

    def __init__(self, like: Tensor, deviation: float, seed: int) -> None:
        self._like = like
        self._deviation = deviation
        self._seed = seed
        self._generators: list[torch.Generator] = []
        self._blocks = like.new_empty(0, _BLOCK, like.numel())

    def subtract_from_(self, gradients: Tensor, workers: Sequence[int], clocks: Sequence[int]) -> Tensor:
        """Subtract from some workers' gradients, shape (k, d), their noise at their clocks, in place; returns them."""
        self._make_room(max(workers) + 1)
        for worker, clock in zip(workers, clocks, strict=True):
            if clock % _BLOCK == 0:
                self._blocks[worker].normal_(std=self._deviation, generator=self._generators[worker])
        together = len(set(clocks)) == 1 and len(workers) == len(self._blocks)  # then it is a view, not a copy
        noise = self._blocks[:, clocks[0] % _BLOCK] if together else self._pick(workers, clocks)
        return gradients.sub_(noise)

    def _pick(self, workers: Sequence[int], clocks: Sequence[int]) -> Tensor:
        return self._blocks[list(workers), [clock % _BLOCK for clock in clocks]]

    def _make_room(self, workers: int) -> None:
        known = len(self._generators)
        if workers <= known:
            return
        new = self._like.new_empty(workers - known, _BLOCK, self._like.numel())
        self._blocks = torch.cat([self._blocks, new])
        self._generators += [
            torch.Generator(self._like.device).manual_seed(self._seed + _WORKER_STRIDE * worker)
            for worker in range(known, workers)
        ]
