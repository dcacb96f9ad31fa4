"""The digits are real, in range, split alike everywhere, and shared among the workers as asked."""

import importlib.util
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from application import quiet_trainer, tiny_classifier
from torch.utils.data import DistributedSampler

from lightning_easgd.lab.data import DigitsDataModule, WorkerSampler
from lightning_easgd.lab.data.sampling import BatchedTensors
from lightning_easgd.lab.data.splits import stratified_split

pytestmark = pytest.mark.timeout(60)


def on_rank(rank: int, replica_id: int | None = None, **arguments) -> DigitsDataModule:
    module = DigitsDataModule(**arguments)
    module.trainer = SimpleNamespace(global_rank=rank, world_size=4, strategy=SimpleNamespace(replica_id=replica_id))
    module.setup("fit")
    return module


def drawn(loader, epoch: int) -> torch.Tensor:
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


def test_images_are_in_range_and_of_the_documented_shape():
    module = on_rank(0)
    loaders = module.train_dataloader(), module.val_dataloader(), module.test_dataloader()
    sizes = []
    for loader in loaders:
        images = torch.cat([images for images, _ in loader])
        labels = torch.cat([labels for _, labels in loader])
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.shape[1:] == (1, 8, 8)
        assert images.min() == 0
        assert images.max() == 1
        assert set(labels.tolist()) == set(range(10))
        sizes.append(len(images))
    assert sum(sizes) == 1797
    assert sizes[1:] == [179, 359]


def test_split_does_not_depend_on_rank_or_seed():
    first = torch.cat([images for images, _ in on_rank(0, seed=0).test_dataloader()])
    second = torch.cat([images for images, _ in on_rank(3, seed=7).test_dataloader()])
    assert torch.equal(first, second)


def test_split_is_stratified_and_without_overlap():
    labels = np.repeat([0, 1, 2], [10, 20, 40])
    parts = stratified_split(labels, {"val": 0.1, "test": 0.2}, rest="train")
    assert {name: np.bincount(labels[rows]).tolist() for name, rows in parts.items()} == {
        "val": [1, 2, 4],
        "test": [2, 4, 8],
        "train": [7, 14, 28],
    }
    assert sorted(np.concatenate(list(parts.values()))) == list(range(70))


def test_full_sampling_gives_each_worker_its_own_order_of_the_whole_set():
    orders = {
        (rank, seed, epoch): drawn(on_rank(rank, seed=seed).train_dataloader(), epoch)
        for rank in (0, 1)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    reference = orders[0, 0, 0]
    for key, order in orders.items():
        assert torch.equal(order, reference) == (key == (0, 0, 0))
        assert torch.equal(order.sum(0), reference.sum(0))  # sums of 1/16ths: exact in float32
    assert torch.equal(drawn(on_rank(0).train_dataloader(), 0), reference)


def test_workers_that_come_and_go_draw_orders_of_their_own():
    """Each is a launch of its own, whose ranks count from 0."""
    orders = [drawn(on_rank(rank, number).train_dataloader(), 0) for number in (0, 1, 10**7) for rank in (0, 3)]
    assert len({tuple(order[:, 0].flatten().tolist()) for order in orders}) == len(orders)


def test_full_sampler_is_one_that_lightning_leaves_alone():
    sampler = on_rank(2).train_dataloader().sampler
    assert isinstance(sampler, WorkerSampler)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank) == (1, 0)


class _Recorder(L.Callback):
    def __init__(self):
        self.samplers = set()
        self.orders = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.samplers.add(type(trainer.train_dataloader.sampler))
        if batch_idx == 0:
            self.orders.append(batch[0])


@pytest.mark.parametrize("sampling", ["full", "sharded", "dynamic"])
def test_lightning_moves_the_sampler_on_with_each_epoch(sampling):
    recorder = _Recorder()
    quiet_trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0, callbacks=[recorder]).fit(
        tiny_classifier(), datamodule=DigitsDataModule(sampling=sampling)
    )
    first, second = recorder.orders
    assert not torch.equal(first, second)
    assert (recorder.samplers == {WorkerSampler}) == (sampling == "full")


def test_batches_are_gathered_at_once():
    data = BatchedTensors(torch.arange(6.0), torch.arange(6))
    values, labels = data.__getitems__([4, 0])
    assert values.tolist() == [4.0, 0.0]
    assert labels.tolist() == [4, 0]


def test_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match=r"DigitsDataModule\(sampling='half'\): unknown sampling; choose 'full'"):
        DigitsDataModule(sampling="half")


def test_empty_batches_are_refused():
    with pytest.raises(ValueError, match=r"DigitsDataModule\(batch_size=0\)"):
        DigitsDataModule(batch_size=0)


def test_missing_scikit_learn_is_one_clear_sentence(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else find_spec(name, *rest)
    )
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn.*pip install 'lightning_easgd\[demo\]'"):
        DigitsDataModule()
