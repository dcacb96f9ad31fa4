"""What a step of synchronous EASGD does, counted rather than timed: operations, large allocations, collectives."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from channels import LoneChannel, line_on, rendezvous_of
from test_sums import vectors_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_easgd.averagers import SynchronousAverager, all_reduced_sums
from lightning_easgd.averagers.sync.shared_sum import SharedSum
from lightning_easgd.method.rates import MovingRates

TAU = 4


class Operations(TorchDispatchMode):
    """Counts the operations, and adds up the memory of what they return anew."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.allocated = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.counts[function.overloadpacket.__name__] += 1
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((arguments, keywords)) if is_tensor(each)}
        for each in tree_leaves(result):
            if is_tensor(each) and each.untyped_storage().data_ptr() not in given:
                self.allocated += each.nbytes
        return result


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def shared(center):
    return SharedSum(center, vectors_of(center, rendezvous_of(dist.HashStore(), 0, 1)))


def all_reduced(events):
    return all_reduced_sums(lambda: LoneChannel(events), TAU)


def counted(make_sum, layers, headers):
    """The operations of begin and finish at each step of two periods, the optimizer's own left out."""
    module = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    line = line_on(LoneChannel(headers), LoneChannel([]))
    averager = SynchronousAverager(optimizer, line, make_sum, number=0, tau=TAU, rates=MovingRates())
    headers.clear()
    steps = []
    for _ in range(2 * TAU + 1):
        module(torch.ones(1, 16)).sum().backward()
        with Operations() as operations:
            averager.begin()
        optimizer.step()
        with operations:
            averager.finish()
        steps.append(operations)
    return steps, sum(parameter.nbytes for parameter in module.parameters())


SUMS = [lambda: shared, lambda: all_reduced([])]


@pytest.mark.parametrize("make", SUMS)
def test_between_exchanges_there_is_nothing(make):
    steps, _ = counted(make(), 3, [])
    for number, step in enumerate(steps):
        assert bool(step.counts) == (number > 0 and number % TAU == 0)


@pytest.mark.parametrize("make", SUMS)
def test_an_exchange_has_as_many_operations_however_many_parameters_there_are(make):
    few, many = (counted(make(), layers, [])[0][2 * TAU].counts for layers in (2, 40))
    assert few == many
    assert few["_foreach_copy_"] == 1  # the snapshot of all parameters
    assert few["_foreach_sub_"] == 1  # the pull of all parameters
    assert few["_foreach_add_"] == 1  # the center's move
    assert few.total() <= 12, few


@pytest.mark.parametrize("make", SUMS)
def test_an_exchange_allocates_nothing_of_the_models_size(make):
    steps, model = counted(make(), 20, [])
    assert max(step.allocated for step in steps) < 0.01 * model


def test_the_count_sees_a_loop_and_an_allocation():
    """The guard's own check."""

    def wasteful(center):
        total = shared(center)
        start = total.start

        def start_with_copies(shares):
            _ = [view.clone() for view in total.wire.views]
            start(shares)

        total.start = start_with_copies
        return total

    (few, _), (many, model) = counted(wasteful, 2, []), counted(wasteful, 40, [])
    assert many[TAU].counts.total() > few[TAU].counts.total() + 50
    assert many[TAU].allocated >= model


def test_collectives_of_a_period():
    """One header, and one reduction for each bucket of at least two mebibytes."""
    headers, events = [], []
    counted(all_reduced(events), 3, headers)
    assert (headers.count("start"), events.count("start")) == (2, 2)
    headers.clear()
    counted(shared, 3, headers)
    assert headers.count("start") == 2
