"""The runs of the benchmark stacked: every method at every number of workers and each of its learning rates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.ratios import Row
from harness.stacked_methods import Alone, DataParallel, Downpour, Elastic, PostLocal, StackedMethod
from lightning_easgd.lab.simulation import LocalSGD

__all__ = ["METHODS", "Run", "runs"]

METHODS: dict[str, type[StackedMethod]] = {
    "easgd": Elastic,
    "eamsgd": Elastic,
    "eamsgd_0.9": Elastic,
    "downpour": Downpour,
    "ddp": DataParallel,
    "ddp_momentum": DataParallel,
    "post_local_sgd": PostLocal,
    "sgd": Alone,
    "msgd": Alone,
}
WEIGHT_DECAY = 1e-4
# The three rates of each method, by the number of workers where 16 want others: DOWNPOUR adds their updates up, DDP
# averages more gradients. The paper's best are for runs a hundred times as long, and lie at the lower ends or below.
RATES: dict[str, dict[int, tuple[float, float, float]]] = {
    "easgd": {1: (0.3, 0.1, 0.03)},
    "eamsgd": {1: (0.03, 0.01, 0.003)},
    "eamsgd_0.9": {1: (0.1, 0.03, 0.01)},
    "downpour": {1: (0.03, 0.01, 0.003), 16: (0.01, 0.003, 0.001)},
    "ddp": {1: (0.3, 0.1, 0.03), 16: (0.5, 0.2, 0.08)},
    "ddp_momentum": {1: (0.1, 0.03, 0.01)},
    "post_local_sgd": {1: (0.3, 0.1, 0.03), 16: (0.5, 0.2, 0.08)},
    "sgd": {1: (0.3, 0.1, 0.03)},
    "msgd": {1: (0.1, 0.03, 0.01)},
}
MOMENTUM = {"eamsgd": 0.99, "eamsgd_0.9": 0.9, "ddp_momentum": 0.9, "msgd": 0.9}


@dataclass(frozen=True)
class Run:
    """One method at one learning rate with one seed.

    Attributes:
        label: Columns that say which: workers, method, lr, seed.
        method: Its workers.
        streams: Whose batches they get, shape (p,).
    """

    label: Row
    method: StackedMethod
    streams: Tensor


def runs(names: Sequence[str], workers: Sequence[int], start: Tensor, *, tau: int, seed: int) -> Iterator[Run]:
    """The runs of one seed; those of one worker whatever the numbers of workers are.

    Args:
        names: Methods.
        workers: Numbers of workers.
        start: The common start, shape (d,).
        tau: τ.
        seed: The seed's number.
    """
    most = max(workers)
    for name in names:
        for count in [1] if METHODS[name] is Alone else workers:
            for lr in RATES[name].get(count, RATES[name][1]):
                optimizer = LocalSGD(lr, MOMENTUM.get(name, 0.0), WEIGHT_DECAY)
                label = {"workers": count, "method": name, "lr": lr, "seed": seed}
                streams = seed * most + torch.arange(count, device=start.device)
                yield Run(label, METHODS[name](start, optimizer, count, tau), streams)
