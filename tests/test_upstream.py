"""What Lightning's own tests, run with the strategy swapped from DDP, showed of this one."""

import warnings
from functools import partial

import pytest
from lightning.pytorch.accelerators import CPUAccelerator
from ranks import run_ranks
from toys import MINIMA, Quadratic, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDStrategy

pytestmark = pytest.mark.timeout(60)


class Foreign(CPUAccelerator):
    """A third party's accelerator, whose devices Lightning passes on as they are."""

    @staticmethod
    def get_parallel_devices(devices):
        return ["foo"] * devices


@pytest.mark.processes
def test_devices_of_a_foreign_accelerator_are_refused():
    with pytest.raises(
        ValueError, match=r"EASGDStrategy\(parallel_devices=\[foo\]\): workers are CPUs or CUDA devices"
    ):
        quiet_trainer(strategy=EASGDStrategy(), accelerator=Foreign(), devices=2)


def complaints(strategy, steps, **trainer):
    """What a fit of two ranks says about missing exchanges, and x after it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = fitted(Quadratic(lr=0.5, steps=steps, record=False), strategy, 2, limit_val_batches=0, **trainer)
    messages = [str(warning.message) for warning in seen]
    return [message for message in messages if "before the first exchange" in message], module.x.item()


@pytest.mark.parametrize(
    "strategy", [EASGDStrategy(tau=4), EASGDStrategy(tau=4, mode="async"), DownpourStrategy(tau=4)]
)
@pytest.mark.parametrize(("steps", "warned"), [(4, True), (5, False)])
def test_a_fit_that_ends_before_the_first_exchange_says_so(strategy, steps, warned):
    (messages, first), (_, second) = run_ranks(complaints, 2, strategy, steps)
    assert first == second
    assert (first == mean_after(steps)) == warned
    assert [message.partition(":")[0] for message in messages] == [f"{type(strategy).__name__}(tau=4)"] * warned


def test_a_fast_dev_run_does_not_say_so():
    run = partial(complaints, EASGDStrategy(), 6, fast_dev_run=True)
    assert run_ranks(run, 2) == [([], mean_after(1))] * 2


def mean_after(steps):
    """The mean of two workers that go from 1 towards their minima, half the way at each step."""
    return sum(minimum + (1 - minimum) * 0.5**steps for minimum in MINIMA[:2]) / 2
