r"""One training with a member of the family of center rules, all workers stacked in one process.

The center moves by the package's rules and the workers by its equations; beside them stands DDP.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from harness.stacked_gradients import StackedGradients
from harness.stacked_images import StackedImages
from lightning_easgd.lab.simulation import LocalSGD
from lightning_easgd.method.elastic import elastic_difference, elastic_pull_, nesterov_position_
from lightning_easgd.method.rules import outer_rule

__all__ = ["Member", "Schedule", "train"]

Schedule = Literal["constant", "cosine"]


@final
@dataclass(frozen=True)
class Member:
    """A rule, as the arguments of ``EASGDStrategy`` name it.

    Attributes:
        alpha: α; None for DDP.
        beta: β.
        outer_momentum: μ.
        outer_nesterov: Whether the center looks ahead.
        pull_to: The center that workers are pulled towards.
        momentum: Nesterov momentum of the workers' SGD.
        exchanges_position: Whether the workers exchange x rather than torch's look-ahead point, as EAMSGD does.
    """

    alpha: float | None
    beta: float = 1.0
    outer_momentum: float = 0.0
    outer_nesterov: bool = False
    pull_to: Literal["old", "new"] = "new"
    momentum: float = 0.9
    exchanges_position: bool = False


def train(
    member: Member,
    gradients: StackedGradients,
    images: StackedImages,
    *,
    workers: int,
    tau: int,
    lr: float,
    schedule: Schedule,
    steps: int,
    read_at: Callable[[int], bool],
) -> Iterator[tuple[int, Tensor]]:
    """Train, and yield the center after the steps at which it is to be read.

    An exchange at step t comes after it; a pull to the old center after step t + 1, as in the paper.

    Args:
        member: The rule.
        gradients: The network.
        images: The workers' mini-batches.
        workers: p.
        tau: τ.
        lr: η, of the first step.
        schedule: How it goes on: as it is, or along a cosine to zero.
        steps: Steps of each worker.
        read_at: Of a step: whether the center is read after it.
    """
    copies = 1 if member.alpha is None else workers
    points = gradients.start.repeat(copies, 1)
    buffers = torch.zeros_like(points)
    rule = outer_rule(member.outer_momentum or None, member.outer_nesterov)
    stores = list(rule.initial_stores(gradients.start.clone()))
    center, pull, of = stores[0], None, torch.arange(workers)
    for step in range(1, steps + 1):
        batch = images.draw(step - 1)
        found, _ = gradients(points.expand(workers, -1), *batch, of)
        if member.alpha is None:
            found = found.mean(0, keepdim=True)
        rate = lr if schedule == "constant" else lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        LocalSGD(rate, member.momentum).step_(points, found, buffers)
        if member.alpha is None:
            center.copy_(points[0])
        elif pull is not None:
            elastic_pull_([points], [pull], member.alpha)
            pull = None
        if member.alpha is not None and step % tau == 0:
            positions = points.clone()
            if member.exchanges_position:
                nesterov_position_([positions], [buffers], rate * member.momentum)
            (differences,) = elastic_difference([positions], [center])
            rule.move_(stores, differences.sum(0), member.beta / workers, version=step // tau)
            if member.pull_to == "old":
                pull = differences
            else:
                (ahead,) = elastic_difference([positions], [center])
                elastic_pull_([points], [ahead], member.alpha)
        if read_at(step):
            yield step, center
