"""Kind: what a fit holds is given back when it ends, not when the garbage collector comes by."""

import gc
import os
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
from ranks import run_ranks
from toys import Quadratic, fitted

from lightning_easgd import DownpourStrategy, EASGDStrategy

pytestmark = pytest.mark.timeout(120)
STRATEGIES = {
    "async": lambda **k: EASGDStrategy(mode="async", **k),
    "round robin": lambda **k: EASGDStrategy(mode="async", order="round_robin", **k),
    "downpour": DownpourStrategy,
    "sync": EASGDStrategy,
    "sync over gloo": lambda **k: EASGDStrategy(process_group_backend="gloo", **k),
}


def held():
    """Descriptors and threads of this process."""
    names = [thread.name for thread in threading.enumerate()]
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own
            targets.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
    return sorted(targets), sorted(names), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES.keys())
def test_a_fit_leaves_no_descriptor_and_no_thread(make):
    def run():
        gc.disable()
        fits = []
        for _ in range(3):
            fitted(Quadratic(steps=6, record=False), make(tau=2, timeout=timedelta(seconds=30)), 2)
            fits.append(held())
        return fits

    for first, _, last in run_ranks(run, 2):
        assert last[0] == first[0]
        assert last[1] == first[1]
        assert not [name for name in first[1] if name.startswith("easgd")]
        assert last[2] <= first[2]
