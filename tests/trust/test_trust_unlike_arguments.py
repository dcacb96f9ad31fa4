"""Ranks that were told different things: an error that names the argument, where they would wait or mix up numbers."""

import os
import re

import pytest
from lightning.fabric import Fabric
from ranks import end_ranks
from toys import Quadratic, fitted

import lightning_easgd.fabric
from lightning_easgd import DownpourStrategy, EASGDStrategy

UNLIKE = [
    (EASGDStrategy, {"tau": (2, 3)}),
    (EASGDStrategy, {"mode": ("sync", "async")}),
    (EASGDStrategy, {"wire_dtype": (None, "bfloat16")}),
    (EASGDStrategy, {"process_group_backend": (None, "gloo")}),
    (EASGDStrategy, {"devices_per_worker": (1, 2)}),
    (EASGDStrategy, {"on_nonfinite": ("fail", "reset")}),
    (EASGDStrategy, {"worker_state": ("embed", "sidecar")}),
    (EASGDStrategy, {"pull_to": ("old", "new")}),
    (DownpourStrategy, {"average": (None, "polyak")}),
]


def refused(function, strategy, unlike):
    ((name, (first, second)),) = unlike.items()
    says = re.escape(f"{strategy.__name__}({name}=...): rank 0 has {first!r} and rank 1 has {second!r}")
    return all(re.search(says, outcome.error) for outcome in end_ranks(function, 2, timeout=30))


@pytest.mark.parametrize(("strategy", "unlike"), UNLIKE)
def test_they_are_refused_on_all_ranks(strategy, unlike):
    def train():
        own = {name: values[int(os.environ["RANK"])] for name, values in unlike.items()}
        fitted(Quadratic(steps=6), strategy(**own), 2)

    assert refused(train, strategy, unlike)


@pytest.mark.parametrize("unlike", [{"tau": (2, 3)}, {"mode": ("sync", "async")}])
def test_they_are_refused_under_fabric(unlike):
    def train():
        own = {name: values[int(os.environ["RANK"])] for name, values in unlike.items()}
        Fabric(accelerator="cpu", devices=2, strategy=lightning_easgd.fabric.EASGDStrategy(**own)).launch()

    assert refused(train, EASGDStrategy, unlike)


def test_what_may_be_each_workers_own():
    """A served center takes workers of any periods, and each one's own rate."""

    def train():
        rank = int(os.environ["RANK"])
        fitted(Quadratic(steps=6), EASGDStrategy(mode="async", tau=rank + 2, alpha=0.1 * (rank + 1)), 2)

    assert [outcome.exitcode for outcome in end_ranks(train, 2)] == [0, 0]
