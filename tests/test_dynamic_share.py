"""Each sample is drawn once per epoch, by whoever asks."""

import time

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from ranks import end_ranks, run_ranks
from torch.utils.data import BatchSampler, DataLoader
from toys import Regression, TwoLayers, fitted

from lightning_easgd import EASGDModelParallelStrategy, EASGDStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.lab.data import DynamicShare
from lightning_easgd.lab.data.randomness import EpochKeys
from lightning_easgd.strategies.data_loaders import check_loader

pytestmark = pytest.mark.timeout(60)


def epochs_of(sampler, epochs=2, pause=0.0):
    drawn = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        drawn.append([])
        for sample in sampler:
            time.sleep(pause)
            drawn[-1].append(sample)
    return drawn


@pytest.mark.parametrize("samples", [1, 7, 100, 103])
def test_one_worker_draws_everything_in_a_new_order_each_epoch(samples):
    first, second = epochs_of(DynamicShare(range(samples), chunk=10))
    assert sorted(first) == sorted(second) == list(range(samples))
    assert samples < 5 or first != second


def test_workers_share_an_epoch_and_a_slow_one_draws_less():
    def draw():
        dist.init_process_group("gloo")
        sampler = DynamicShare(range(205), chunk=10)
        drawn = epochs_of(sampler, pause=0.01 if dist.get_rank() == 0 else 0.001)
        dist.barrier()  # rank 0 serves the store
        return drawn

    slow, *others = run_ranks(draw, 3)
    for epoch in range(2):
        together = slow[epoch] + [sample for other in others for sample in other[epoch]]
        assert sorted(together) == list(range(205))
    assert sum(map(len, slow)) < min(sum(map(len, other)) for other in others)


def test_resume_in_mid_epoch_gives_the_rest_once():
    def draw(states):
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        sampler = DynamicShare(range(100), chunk=8)
        sampler.set_epoch(3)
        if states is None:
            iterator = iter(sampler)
            before = [next(iterator) for _ in range(13 + 6 * dist.get_rank())]
            dist.barrier()  # rank 0 serves the store
            return before, sampler.state_dict()
        sampler.load_state_dict(states[dist.get_rank()])
        rest, again = list(sampler), sorted(sampler)
        dist.barrier()
        return rest, again

    first = run_ranks(draw, 2, None)
    second = run_ranks(draw, 2, [state for _, state in first])
    samples = [sample for before, _ in first for sample in before] + [s for rest, _ in second for s in rest]
    assert sorted(samples) == list(range(100))
    assert sorted(second[0][1] + second[1][1]) == list(range(100))  # the next pass is whole again


def test_a_small_set_gives_every_worker_something():
    def draw(samples):
        dist.init_process_group("gloo")
        dist.barrier()  # all are connected before one of them fails
        drawn = list(DynamicShare(range(samples)))
        dist.barrier()
        return drawn

    drawn = run_ranks(draw, 3, 100)
    assert sorted(sample for samples in drawn for sample in samples) == list(range(100))
    assert all(drawn)
    for outcome in end_ranks(draw, 3, 2):
        assert "with 3 workers: each worker needs at least one" in outcome.error


def test_it_has_no_length_and_refuses_an_empty_chunk():
    with pytest.raises(TypeError, match="no length"):
        len(DynamicShare(range(3)))
    with pytest.raises(ValueError, match=r"DynamicShare\(chunk=0\)"):
        DynamicShare(range(3), chunk=0)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_under_the_trainer_a_slow_rank_makes_fewer_steps(mode):
    class Shared(Regression):
        def train_dataloader(self):
            data = torch.arange(400.0).view(100, 4) / 400
            self.seen = []
            return DataLoader(data, batch_size=4, sampler=DynamicShare(data, chunk=4))

        def training_step(self, batch, index):
            self.seen += (batch[:, 0] * 100).round().int().tolist()
            return super().training_step(batch, index)

    class Slow(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            time.sleep(0.05 if trainer.global_rank else 0.005)

    def train():
        module = Shared()
        fitted(module, EASGDStrategy(mode=mode, tau=3), 2, max_epochs=2, callbacks=[Slow()])
        return module.seen, module.trainer.global_step, module.net[0].weight.tolist()

    fast, slow = run_ranks(train, 2)
    assert sorted(fast[0] + slow[0]) == sorted(2 * list(range(100)))
    assert fast[2] == slow[2]
    if mode == "async":  # in sync mode the fast rank waits at its exchanges
        assert slow[1] < fast[1] / 2


def in_batches(data):
    return DataLoader(data, batch_sampler=BatchSampler(DynamicShare(data, chunk=4), 1, drop_last=False))


def one_by_one(data):
    return DataLoader(data, sampler=DynamicShare(data, chunk=4))


@pytest.mark.parametrize("loader", [one_by_one, in_batches])
@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [
        (EASGDStrategy, {"devices_per_worker": 2}),
        (EASGDModelParallelStrategy, {"data_parallel_size": 1, "tensor_parallel_size": 2}),
    ],
    ids=["DDP inside", "tensor parallelism inside"],
)
def test_workers_of_several_ranks_are_refused_before_they_train_on_different_samples_or_hang(
    strategy, arguments, loader
):
    class Shared(TwoLayers):
        def configure_model(self):
            pass

        def train_dataloader(self):
            return loader(self.rows(36))

    def train():
        fitted(Shared(), strategy(**arguments), 2, use_distributed_sampler=loader is one_by_one)

    for outcome in end_ranks(train, 2, timeout=30):
        said = f"TypeError: {strategy.__name__} with DynamicShare: it gives each rank as many samples as that rank asks"
        assert said in outcome.error
        assert "here a worker is 2 ranks" in outcome.error


def test_fabrics_workers_of_several_ranks_are_refused():
    def setup():
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(devices_per_worker=2))
        fabric.launch()
        fabric.setup_dataloaders(one_by_one(TwoLayers.rows(36)))

    for outcome in end_ranks(setup, 2, timeout=30):
        assert "EASGDStrategy with DynamicShare" in outcome.error


@pytest.mark.parametrize(
    "loader",
    [one_by_one, in_batches, lambda data: DataLoader(data, sampler=EpochKeys(DynamicShare(data, chunk=4), len(data)))],
)
def test_workers_that_come_and_go_are_refused_as_they_would_all_draw_the_same(loader):
    with pytest.raises(TypeError, match=r"^EASGDStrategy\(fault_tolerance=\.\.\.\) with DynamicShare: .*\(group_size"):
        check_loader("EASGDStrategy", loader(TwoLayers.rows(36)), 1, is_elastic=True)
