"""Workers that are sharded: FSDP2 and tensor parallelism inside, elastic averaging between them."""

import csv
import importlib
import os
import shutil
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial, partialmethod

import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.strategies import Strategy
from packaging.version import Version
from ranks import end_ranks, run_ranks
from reference import grouped_trace
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, IterableDataset
from toys import Regression, Thaw, TwoLayers, quiet_trainer

from lightning_easgd import EASGDModelParallelStrategy, EASGDStrategy
from lightning_easgd.callbacks import ElasticMonitor
from lightning_easgd.fabric import EASGDModelParallelStrategy as FabricEASGDModelParallelStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.models import Classifier, DigitsNet
from lightning_easgd.lab.recorders import LearningCurve
from lightning_easgd.lab.worker_weights import kept_workers, loaded_workers
from lightning_easgd.strategies.worker_state.keeper import KEY

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
]
RUN = {"tau": 3, "alpha": 0.3, "beta": 0.8}
SGD = {"momentum": 0.9}


class Sharded(TwoLayers):
    """As in Lightning's documentation."""

    reshards = True

    def configure_model(self):
        mesh = self.device_mesh
        if mesh["tensor_parallel"].size() > 1:
            plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("first", "second")}
            parallelize_module(self.net, mesh["tensor_parallel"], plan)
        if mesh["data_parallel"].size() > 1:
            options = {} if self.reshards else {"reshard_after_forward": False}
            fully_shard(self.net.first, mesh=mesh["data_parallel"], **options)
            fully_shard(self.net, mesh=mesh["data_parallel"], **options)  # the root holds the second layer


def whole(tensors):
    return [getattr(t, "full_tensor", lambda t=t: t)().detach().clone().numpy() for t in tensors]


def parts(tensors):
    return [getattr(t, "to_local", lambda t=t: t)().detach().clone().numpy() for t in tensors]


# In torch 2.8 each rank of a mesh adds clip_grad_norm_'s 1e-6 to the norm; in 2.11 one does.
EXACT = 1e-12 if Version(torch.__version__) >= Version("2.11") else 1e-5


def close(left, right, tolerance=EXACT):
    return all(np.abs(a - b).max(initial=0) <= tolerance for a, b in zip(left, right, strict=True))


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def reference(workers, size, **arguments):
    module = TwoLayers()
    arguments = {"steps": 20, "accumulate": 2, "clip": 0.5, **SGD, **RUN, **arguments}
    rows = module.rows(arguments["steps"] * arguments["accumulate"] * workers * size).numpy()
    start = [parameter.detach().numpy() for parameter in module.parameters()]
    return grouped_trace(rows, start, workers=workers, size=size, **arguments)


class End(Callback):
    """Keeps the worker, its momentum and the center at the end: whole, and this rank's parts."""

    def on_train_end(self, trainer, module):
        strategy = trainer.strategy
        state = trainer.optimizers[0].state
        with strategy.worker_weights():
            self.worker, self.worker_parts = whole(module.parameters()), parts(module.parameters())
            momentum = [state[parameter]["momentum_buffer"] for parameter in module.parameters()]
        self.momentum, self.momentum_parts = whole(momentum), parts(momentum)
        self.center = whole(strategy.center.values())
        (averager,) = strategy._averagers
        self.elements = averager.center.flat.numel(), averager._sum.wire.flat.numel()
        self.distance = strategy.elastic_distance()
        spent = strategy.communication
        self.sent = spent.bytes_sent - spent.exchanges * averager._line.control.bytes_sent(72)  # without announcements


def fit(shape, arguments=None, module=None, **trainer):
    end = End()
    strategy = EASGDModelParallelStrategy(*shape, **{**RUN, **(arguments or {})})
    module = Sharded(accumulate=2, **SGD) if module is None else module
    given = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "limit_val_batches": 0} | trainer
    path = given.pop("ckpt_path", None)
    callbacks = [end, *given.pop("callbacks", [])]
    quiet_trainer(strategy=strategy, devices=int(os.environ["WORLD_SIZE"]), callbacks=callbacks, **given).fit(
        module, ckpt_path=path
    )
    return end, whole(module.parameters())


@pytest.mark.parametrize(
    ("count", "shape", "backend"),
    [(2, (2, 1), None), (2, (2, 1), "gloo"), (2, (1, 2), None), (2, (4, 1), None), (1, (2, 2), None)],
    ids=["FSDP2", "FSDP2, gloo", "TP", "FSDP2 with an empty shard", "FSDP2 and TP"],
)
def test_sharded_workers_are_those_of_the_reference(count, shape, backend):
    data, tensor = shape
    workers, momenta, center = reference(count, data)
    before_last, _, center_then = reference(count, data, steps=18)

    def train():
        end, module = fit(shape, {"process_group_backend": backend})
        return end.worker, end.momentum, end.center, module, end.elements, end.distance, end.sent

    results = run_ranks(train, count * data * tensor, timeout=110)
    for rank, (worker, momentum, own_center, module, elements, distance, sent) in enumerate(results):
        number = rank // (data * tensor)
        assert close(worker, workers[number])
        assert close(momentum, momenta[number])
        assert close(own_center, center)
        assert equal(module, own_center)
        assert equal(own_center, results[0][2])
        assert elements[0] == elements[1]
        assert count == 1 or sent == 6 * 8 * elements[0]  # of two workers each sends all of it, in double, six times
        squares = [(x - c) ** 2 for x, c in zip(before_last[number], center_then, strict=True)]
        assert distance**2 == pytest.approx(sum(square.sum() for square in squares))
    # Center and wire of all ranks: as many elements as the parameters of all workers have.
    assert sum(elements[0] for *_, elements, _, _ in results) == 21 * count


class Single(Sharded):
    """In float32, of which FSDP2 asks the process group for the mean; in double it divides the sum."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.net.float()

    @staticmethod
    def rows(count):
        return TwoLayers.rows(count).float()


@pytest.mark.parametrize("sums", [False, True])
def test_the_gradient_is_the_mean_where_the_process_group_gives_the_sum_for_it(sums, monkeypatch):
    """As gloo does in torch 2.8, in silence."""

    def sum_for_mean(reduce_scatter, group, output, shards, options):
        options.reduceOp = dist.ReduceOp.SUM
        return reduce_scatter(group, output, shards, options)

    for name in ("_reduce_scatter_base", "reduce_scatter_single"):  # the second one since torch 2.13
        if sums and hasattr(dist.ProcessGroup, name):
            method = partialmethod(partial(sum_for_mean, getattr(dist.ProcessGroup, name)))
            monkeypatch.setattr(dist.ProcessGroup, name, method)

    def train():  # clipped it would be the same
        end, _ = fit((2, 1), module=Single(accumulate=2, **SGD), gradient_clip_val=None)
        return end.center

    _, _, center = reference(2, 2, clip=None)
    for own_center in run_ranks(train, 4, timeout=110):
        assert close(own_center, center, 1e-5)


def test_parameters_that_no_data_parallel_rank_shares_are_warned_of():
    class Unreduced(Sharded):
        def configure_model(self):
            fully_shard(self.net.first, mesh=self.device_mesh["data_parallel"])

    def train():
        said = r"net\.second\.weight, net\.second\.bias are not sharded over the 2 data-parallel ranks"
        with pytest.warns(UserWarning, match=said) if os.environ["RANK"] == "0" else nullcontext():
            fit((2, 1), module=Unreduced(**SGD), fast_dev_run=True, gradient_clip_val=None)

    run_ranks(train, 2)


class Half(Sharded):
    """A layer that each rank has whole."""

    def configure_model(self):
        plan = {"first": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)


def test_what_several_ranks_hold_counts_once_in_a_workers_distance():
    workers, _, center = reference(2, 1, clip=None)
    before_last, _, center_then = reference(2, 1, steps=18, clip=None)

    def train():
        end, _ = fit((1, 2), module=Half(accumulate=2, **SGD), gradient_clip_val=None)
        return end.worker, end.center, end.distance

    for rank, (worker, own_center, distance) in enumerate(run_ranks(train, 4)):
        assert close(worker, workers[rank // 2])
        assert close(own_center, center)
        squares = [(x - c) ** 2 for x, c in zip(before_last[rank // 2], center_then, strict=True)]
        assert distance**2 == pytest.approx(sum(square.sum() for square in squares))


class HalfInShards(Half):
    """The same under FSDP2."""

    def configure_model(self):
        super().configure_model()
        for part in (self.net.first, self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize(
    ("cls", "shape", "ranks", "arguments"),
    [
        (Half, (1, 2), 4, {"wire_dtype": "bfloat16", "outer_momentum": 0.5, "pull_to": "new", "delay": 1}),
        (Half, (1, 2), 6, {"process_group_backend": "gloo"}),  # of three numbers the order of a sum counts
        (HalfInShards, (2, 2), 8, {"wire_dtype": "int8"}),
    ],
    ids=["bfloat16, momentum at the center", "gloo", "int8, FSDP2 and TP"],
)
def test_ranks_that_hold_the_same_part_never_come_to_differ(cls, shape, ranks, arguments):
    """Their flat vectors are not laid out alike: of the first layer one has two rows, the other one."""

    def train():
        end, _ = fit(shape, arguments, cls(steps=10, **SGD), accumulate_grad_batches=1, gradient_clip_val=None)
        return end.worker[1:], end.center[1:]

    results = run_ranks(train, ranks, timeout=110)
    for (worker, center), (other, other_center) in zip(results[::2], results[1::2], strict=True):
        assert equal(worker, other)
        assert equal(center, other_center)
        assert equal(center, results[0][1])


class Follower(Half):
    """With a buffer that tensor parallelism has made a DTensor; each worker's follows its own data."""

    def __init__(self):
        super().__init__(steps=7, **SGD)
        self.follower = torch.nn.BatchNorm1d(2, affine=False, dtype=torch.float64)

    def configure_model(self):
        super().configure_model()
        distribute_module(self.follower, self.device_mesh["tensor_parallel"])

    def training_step(self, batch, index):
        self.follower.running_mean.to_local().lerp_(batch[:, :2].mean(0), 0.5)
        return super().training_step(batch, index)


def test_a_buffer_that_is_a_dtensor_is_shown_at_the_center_and_comes_back():
    class See(Callback):
        def on_validation_start(self, trainer, module):
            (self.shown,) = parts([module.follower.running_mean])

        def on_train_end(self, trainer, module):
            with trainer.strategy.worker_weights():
                (self.own,) = parts([module.follower.running_mean])

    def train():
        see, module = See(), Follower()
        given = {"callbacks": [see], "limit_val_batches": 1, "val_check_interval": 3}
        fit((1, 2), module=module, accumulate_grad_batches=1, gradient_clip_val=None, **given)
        return see.shown, see.own, parts([module.follower.running_mean])[0]

    results = run_ranks(train, 4)
    for shown, own, center in results:
        assert np.array_equal(shown, results[0][0])
        assert not np.array_equal(own, center)
        assert close([center], [(results[0][1] + results[2][1]) / 2])


class Normalized(Sharded):
    """By torch's two spectral normalizations."""

    def __init__(self):
        super().__init__(**SGD)
        torch.manual_seed(0)
        self.net.first = torch.nn.utils.parametrizations.spectral_norm(self.net.first)
        self.net.second = torch.nn.utils.spectral_norm(self.net.second)


def test_spectral_normalization_of_the_center_is_by_its_whole_weights():
    class Unsharded(Normalized):
        def configure_model(self):
            pass

    def train():
        results = []
        for cls, strategy in (
            (Unsharded, EASGDStrategy(devices_per_worker=2, **RUN)),
            (Normalized, EASGDModelParallelStrategy(2, **RUN)),
        ):
            module = cls()
            quiet_trainer(strategy=strategy, devices=4, val_check_interval=7).fit(module)
            results.append([*whole(module.state_dict().values()), module.trainer.callback_metrics["val_loss"].numpy()])
        return results

    for unsharded, sharded in run_ranks(train, 4):
        assert close(unsharded, sharded)


def test_sharded_workers_are_pulled_to_the_new_center():
    arguments = {"alpha": 0.9, "beta": 0.8, "outer_momentum": 0.5, "pull_to": "new", "delay": 1}
    workers, _, center = reference(2, 2, **arguments)

    def train():
        end, _ = fit((2, 1), arguments)
        return end.worker, end.center

    for rank, (worker, own_center) in enumerate(run_ranks(train, 4)):
        assert close(worker, workers[rank // 2])
        assert close(own_center, center)


class ThawAt(Callback):
    """Of an optimizer that has all parameters."""

    def setup(self, trainer, module, stage):
        module.net.first.requires_grad_(False)

    def on_train_epoch_start(self, trainer, module):
        module.net.first.requires_grad_(trainer.current_epoch > 0)


@pytest.mark.parametrize("distributed", [True, False])
def test_groups_that_were_added_later_cannot_be_resumed_which_is_said_and_what_was_thawed_can(distributed, tmp_path):
    """Lightning restores groups before it sets the module up, and reads a sharded module's checkpoint after that."""

    class Frozen(Sharded):
        def configure_optimizers(self):
            trained = filter(lambda parameter: parameter.requires_grad, self.parameters())
            return torch.optim.SGD(trained, lr=self.lr, **SGD)

    def run(callback, module, epochs, **trainer):
        arguments = {"save_distributed_checkpoint": distributed, "wire_dtype": "int8"}
        end = End()
        given = {"limit_val_batches": 0, "callbacks": [end, callback], "max_epochs": epochs}
        fitting = quiet_trainer(strategy=EASGDModelParallelStrategy(2, **RUN, **arguments), devices=4, **given)
        fitting.fit(module, **trainer)
        if epochs == 2:
            fitting.save_checkpoint(tmp_path / f"{type(callback).__name__}.ckpt")
        return end.worker_parts, end.momentum_parts, end.center

    def train():
        plain = run(ThawAt(), Sharded(steps=6, **SGD), 3)
        run(ThawAt(), Sharded(steps=6, **SGD), 2)
        resumed = run(ThawAt(), Sharded(steps=6, **SGD), 3, ckpt_path=tmp_path / "ThawAt.ckpt")
        assert all(equal(a, b) for a, b in zip(plain, resumed, strict=True))
        run(Thaw(), Frozen(steps=6), 2)
        said = r"EASGDModelParallelStrategy: .* the groups of the SGD had \[2, 1\] parameters, and here they have \[2\]"
        with pytest.raises(ValueError, match=said):
            run(Thaw(), Frozen(steps=6), 3, ckpt_path=tmp_path / "Thaw.ckpt")

    run_ranks(train, 4, timeout=110)


class SaveAt(Callback):
    """Saves a checkpoint after a number of steps, at the end of an epoch, and keeps the center of then."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer, module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            with trainer.strategy.center_weights():
                self.center = whole(module.parameters())
            state = trainer.optimizers[0].state
            self.momentum = whole(state[parameter]["momentum_buffer"] for parameter in module.parameters())


@pytest.mark.parametrize(
    ("distributed", "reshards", "wire_dtype"), [(True, True, None), (False, False, None), (True, False, "int8")]
)
def test_validation_changes_nothing_and_a_resumed_run_goes_on_bitwise(distributed, reshards, wire_dtype, tmp_path):
    """Of each worker: its parameters and its momentum; the checkpoint itself is the center."""
    arguments = {"save_distributed_checkpoint": distributed, "wire_dtype": wire_dtype}
    path = tmp_path / "6.ckpt"

    def run(shape=(2, 1), **trainer):
        module = Sharded(steps=6, **SGD)
        module.reshards = reshards
        end, _ = fit(shape, arguments, module, accumulate_grad_batches=1, max_epochs=2, **trainer)
        return end.worker_parts, end.momentum_parts, end.center

    def train():
        saver = SaveAt(6, path)
        plain = run()
        watched = run(limit_val_batches=2, val_check_interval=2, callbacks=[saver])
        resumed = run(ckpt_path=path)
        said = r"saved by 2 workers of 2 x 1 devices, and now there are 1 workers of 4 x 1 devices"
        with pytest.warns(UserWarning, match=said) if os.environ["RANK"] == "0" else nullcontext():
            run((4, 1), ckpt_path=path)
        return plain, watched, resumed, saver.center, saver.momentum

    results = run_ranks(train, 4, timeout=110)
    for plain, watched, resumed, saved, _ in results:
        for kind in range(3):
            assert equal(plain[kind], watched[kind])
            assert equal(plain[kind], resumed[kind])
        assert equal(plain[2], results[0][0][2])
        assert equal(saved, results[0][3])
    assert not equal(results[0][0][1], results[2][0][1])  # the momentum of another worker
    if distributed:
        dcp_to_torch_save(path, tmp_path / "whole.ckpt")
        path = tmp_path / "whole.ckpt"
    saved = torch.load(path, weights_only=True)
    single = TwoLayers()
    single.load_state_dict(saved["state_dict"])
    assert equal(whole(single.parameters()), results[0][3])
    states = (saved["optimizer_0"] if distributed else saved["optimizer_states"][0])["state"]
    assert equal(whole(state["momentum_buffer"] for state in states.values()), results[0][4])  # worker 0's


def test_a_worker_of_which_a_part_has_gone_astray_starts_again_as_a_whole():
    class Break(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if (trainer.global_rank, index) == (3, 5):
                with torch.no_grad():
                    module.net.second.bias.to_local().fill_(float("nan"))

    def train():
        again = os.environ["RANK"] in "23"
        with pytest.warns(RuntimeWarning, match="starts again") if again else nullcontext():
            end, module = fit(
                (2, 1),
                {"on_nonfinite": "reset"},
                Sharded(**SGD),
                callbacks=[Break()],
                accumulate_grad_batches=1,
                gradient_clip_val=None,
            )
        return end.worker, end.center, module

    results = run_ranks(train, 4, timeout=110)
    for rank, (worker, center, module) in enumerate(results):
        assert all(np.isfinite(part).all() for part in worker)
        assert equal(worker, results[rank // 2 * 2][0])
        assert equal(center, module)
        assert equal(center, results[0][1])


class Blocks(L.LightningModule):
    """Two blocks as in a transformer: compiled, checkpointed and sharded one by one."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in "ab"))

    def configure_model(self):
        if isinstance(self.blocks, FSDPModule):  # it is called for each of a Trainer's runs
            return
        for number, block in enumerate(self.blocks):
            self.blocks[number] = checkpoint_wrapper(torch.compile(block, backend="eager"))
            fully_shard(self.blocks[number], mesh=self.device_mesh["data_parallel"])
        fully_shard(self.blocks, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        return (self.blocks(batch) - batch).square().mean()

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, index):
        return self.blocks(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(torch.randn(40, 4), batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_what_lightning_does_with_such_a_module(tmp_path):
    """Mixed precision, compiled and checkpointed blocks; and validate, test and predict with its checkpoint."""

    def train():
        L.seed_everything(0)
        strategy = EASGDModelParallelStrategy(2, tau=2, momentum=None)
        given = {"devices": 4, "precision": "bf16-mixed", "use_distributed_sampler": False}
        trainer = quiet_trainer(strategy=strategy, **given)
        module = Blocks()
        trainer.fit(module)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        loss = trainer.validate(module)[0]["val_loss"]
        other = quiet_trainer(strategy=EASGDModelParallelStrategy(2), limit_predict_batches=1, **given)
        tested = other.test(Blocks(), ckpt_path=tmp_path / "end.ckpt")[0]["val_loss"]
        (predicted,) = other.predict(module)
        return loss, tested, whole(module.parameters()), strategy.mesh.mesh_dim_names, predicted.shape

    results = run_ranks(train, 4, timeout=110)
    for loss, tested, module, names, shape in results:
        assert loss == tested
        assert equal(module, results[0][2])
        assert names == ("workers", "data_parallel", "tensor_parallel")
        assert shape == (2, 4)


@pytest.mark.parametrize(
    "strategy",
    [
        partial(EASGDStrategy, devices_per_worker=2),
        partial(EASGDModelParallelStrategy, 2),
        partial(EASGDModelParallelStrategy, 1, 2),
        partial(EASGDModelParallelStrategy, 4, worker_state="embed"),
    ],
    ids=["DDP", "FSDP2", "TP", "FSDP2 with an empty shard"],
)
def test_a_workers_own_weights_are_read_whole_on_one_device(strategy, tmp_path):
    """Once for each worker, not for each of its ranks, which may have a part of them."""
    sharded = strategy.func is EASGDModelParallelStrategy
    given = {"save_distributed_checkpoint": False} if sharded else {}

    def train():
        end = End()
        module = (Sharded if sharded else TwoLayers)(steps=5, **SGD)
        trainer = quiet_trainer(strategy=strategy(tau=2, **given), devices=4, limit_val_batches=0, callbacks=[end])
        trainer.fit(module)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        return end.worker

    count = 1 if strategy.args == (4,) else 2
    workers = run_ranks(train, 4)[:: 4 // count]
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    module = TwoLayers()
    read = [
        (worker, found, equal(whole(module.parameters()), workers[worker]))
        for worker, found in loaded_workers(tmp_path / "end.ckpt", checkpoint, module)
    ]
    assert read == [(worker, True, True) for worker in range(count)]
    assert kept_workers(checkpoint) == count


def test_own_weights_that_are_cut_twice_are_not_put_together(tmp_path):
    checkpoint = {"state_dict": TwoLayers().state_dict(), KEY: {"worker_shape": [2, 2], "workers": [{}] * 4}}
    with pytest.warns(UserWarning, match=r"cut by FSDP2 and by tensor parallelism \(2 x 2 devices\)"):
        assert list(loaded_workers(tmp_path, checkpoint, TwoLayers())) == [(0, False)]


def test_the_learning_curve_is_scored_by_workers_whose_ranks_compute_together(tmp_path):
    """Ranks of one worker that score different numbers of batches wait for each other in the forward pass."""

    def train():
        strategy = EASGDModelParallelStrategy(2, tau=2, timeout=timedelta(seconds=15))
        records = [ElasticMonitor(1, tmp_path), LearningCurve(tmp_path)]
        data = DigitsDataModule(batch_size=50)
        data.setup("test")
        assert len(data.test_dataloader()) % 4, "an even part for each rank would show nothing"
        model = Classifier(DigitsNet(), optimizer=partial(torch.optim.SGD, lr=0.01))
        given = {"devices": 4, "max_steps": 6, "limit_val_batches": 1, "callbacks": records}
        trainer = quiet_trainer(strategy=strategy, **given)
        trainer.fit(model, datamodule=data)
        images, labels = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model.eval()(images), labels)
        return loss.item(), strategy.communication.bytes_sent

    results = run_ranks(train, 4)
    with (tmp_path / "curve.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert float(last["test_loss"]) == pytest.approx(results[0][0], rel=1e-5)
    assert float(last["bytes_sent"]) == sum(sent for _, sent in results) / 2
    with (tmp_path / "communication.csv").open() as file:
        assert [row["worker"] for row in csv.DictReader(file)] == ["0", "0", "1", "1"]


@pytest.mark.parametrize("sampling", ["full", "sharded"])
def test_ranks_of_tensor_parallelism_draw_the_same_of_our_data_and_count_it_once(sampling, tmp_path):
    """Each computes a part of what the others do: of other images the parts would not belong together."""

    class Divided(Classifier):
        def configure_model(self):
            last = [name for name, part in self.network.named_modules() if isinstance(part, torch.nn.Linear)][-1]
            plan = {last: ColwiseParallel(output_layouts=Replicate())}
            parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)

    class Draws(Callback):
        def on_train_start(self, trainer, module):
            self.seen = []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.seen.append(batch[0].double().sum().item())

    def train():
        draws, data = Draws(), DigitsDataModule(batch_size=50, sampling=sampling)
        model = Divided(DigitsNet(), optimizer=partial(torch.optim.SGD, lr=0.01))
        given = {"devices": 4, "max_steps": 3, "limit_val_batches": 0, "callbacks": [draws, LearningCurve(tmp_path)]}
        quiet_trainer(strategy=EASGDModelParallelStrategy(1, 2, tau=2), **given).fit(model, datamodule=data)
        return draws.seen, len(data.train_evaluation_dataloader().dataset)

    (first, size), (second, _), (third, _), (fourth, _) = run_ranks(train, 4)
    assert first == second
    assert third == fourth
    assert first != third
    with (tmp_path / "curve.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert float(last["epochs"]) == pytest.approx(2 * 3 * 50 / size)


def test_synchronized_batchnorm_is_so_inside_of_a_sharded_worker():
    """Over the ranks that draw different data: layers that the module has, as Lightning converts none here."""

    class Synchronized(Sharded):
        def __init__(self):
            super().__init__(steps=3)
            self.norm = torch.nn.SyncBatchNorm(3).requires_grad_(False)

    class See(Callback):
        def on_train_start(self, trainer, module):
            self.ranks = dist.get_process_group_ranks(module.norm.process_group)

    def train():
        see, module = See(), Synchronized()
        strategy = EASGDModelParallelStrategy(2, tau=2)
        trainer = quiet_trainer(strategy=strategy, devices=4, sync_batchnorm=True, limit_val_batches=0, callbacks=[see])
        said = r"sync_batchnorm=True\).*has no effect.*convert_sync_batchnorm.*configure_model"
        with pytest.warns(UserWarning, match=said) if os.environ["RANK"] == "0" else nullcontext():
            trainer.fit(module)
        assert module.norm.process_group is None
        return see.ranks

    assert run_ranks(train, 4) == [[0, 1]] * 2 + [[2, 3]] * 2


class Rowwise(torch.optim.Optimizer):
    """Adagrad with one sum for each row (or ``local``: momentum of what a rank holds), and the last two gradients."""

    def __init__(self, parameters, local=False):
        super().__init__(parameters, {"lr": 0.05, "local": local})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if group["local"]:
                    state["sum"] = state.get("sum", 0) * 0.9 + p.grad.to_local()
                    p.to_local().sub_(group["lr"] * state["sum"])
                    continue  # nothing of it is a shard
                rows = p.grad.square().mean(-1, keepdim=True)
                state["sum"] = rows if "sum" not in state else state["sum"] + rows
                state["last"] = [*state.get("last", []), p.grad.clone()][-2:]
                p.sub_(group["lr"] * state["last"][0] / (state["sum"].sqrt() + 1e-3))
        return loss


@pytest.mark.parametrize(("local", "distributed"), [(False, True), (True, False)])
def test_a_state_that_is_not_like_its_parameter_comes_back_as_it_was(local, distributed, tmp_path):
    """Sums of rows are shards of another shape, and what an optimizer keeps of its rank's part is none."""

    class Model(Sharded):
        def configure_optimizers(self):
            return Rowwise(self.parameters(), local)

    def train():
        def once(epochs, **given):
            strategy = EASGDModelParallelStrategy(2, save_distributed_checkpoint=distributed, **RUN)
            trainer = quiet_trainer(strategy=strategy, devices=4, max_epochs=epochs, limit_val_batches=0)
            module = Model(steps=5)
            trainer.fit(module, **given)
            return trainer, [whole(each) for each in (module.parameters(), strategy.center.values())]

        _, straight = once(2)
        trainer, _ = once(1)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        _, resumed = once(2, ckpt_path=tmp_path / "half.ckpt")
        return straight, resumed

    for straight, resumed in run_ranks(train, 4, timeout=110):
        assert all(equal(*pair) for pair in zip(straight, resumed, strict=True))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((partial(EASGDModelParallelStrategy, 2), Sharded), (partial(EASGDModelParallelStrategy, 1, 2), Sharded)),
        ((partial(EASGDModelParallelStrategy, 2), Sharded), (EASGDStrategy, TwoLayers)),
        ((EASGDStrategy, TwoLayers), (partial(EASGDModelParallelStrategy, 2), Sharded)),
    ],
    ids=["of another shape", "then not sharded", "now sharded"],
)
def test_an_outer_momentum_that_begins_anew_is_not_put_down_to_an_error(before, now, tmp_path):
    """Its parts are each rank's: of workers that are not arranged alike none fits."""

    def fit(strategy, module, epochs, **trainer):
        given = {} if strategy is EASGDStrategy else {"save_distributed_checkpoint": False}
        strategy = strategy(outer_momentum=0.5, **given, **RUN)
        fitting = quiet_trainer(strategy=strategy, devices=2, limit_val_batches=0, max_epochs=epochs)
        fitting.fit(module(steps=6, **SGD), **trainer)
        return fitting

    def train():
        path = tmp_path / "end.ckpt"
        fit(*before, 1).save_checkpoint(path)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fit(*now, 2, ckpt_path=path)
        return [message for message in (str(each.message) for each in seen) if "begins anew" in message]

    (message,), _ = run_ranks(train, 2)
    assert "sharded workers" in message
    assert "error" not in message


@pytest.mark.parametrize(("weights_only", "distributed"), [(False, True), (True, True), (True, False)])
def test_after_a_fit_its_trainer_tests_and_validates_a_checkpoint_and_fits_again(weights_only, distributed, tmp_path):
    """A finished fit has no loops to restore, and no worker's state to look for, which would be warned of here.

    Nor has it optimizers to restore, whose states a checkpoint of weights alone does not have.
    """

    class Tested(Sharded):
        test_step = TwoLayers.validation_step
        test_dataloader = TwoLayers.val_dataloader

        def configure_model(self):
            if not isinstance(self.net, FSDPModule):
                super().configure_model()

    def train():
        given = {"devices": 2, "limit_val_batches": 2, "use_distributed_sampler": False}
        strategy = EASGDModelParallelStrategy(2, save_distributed_checkpoint=distributed, tau=2)
        trainer = quiet_trainer(strategy=strategy, **given)
        module = Tested(steps=5, **SGD)
        trainer.fit(module)
        center = whole(module.parameters())
        trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
        if os.environ["RANK"] == "0" and not weights_only:
            shutil.rmtree(tmp_path / "end.ckpt.easgd")
        trainer.strategy.barrier()
        for run in (trainer.test, trainer.validate):
            with torch.no_grad():
                module.net.second.bias.zero_()
            run(module, ckpt_path=tmp_path / "end.ckpt", verbose=False)
            assert equal(whole(module.parameters()), center)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module)
        return trainer.global_step, center, whole(module.parameters())

    results = run_ranks(train, 2)
    for steps, center, module in results:
        assert steps == 10
        assert equal(module, results[0][2])
        assert not equal(module, center)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size=0.*at least 1"),
        ({"tensor_parallel_size": "all"}, "tensor_parallel_size='all'.*or 'auto'"),
        ({"tau": 0}, "tau=0"),
    ],
)
def test_what_is_refused(arguments, says):
    with pytest.raises((TypeError, ValueError), match=f"EASGDModelParallelStrategy.*{says}"):
        EASGDModelParallelStrategy(**arguments)


def test_an_average_that_takes_no_shards_is_refused_before_training():
    """It would end the fit with an error of torch's where it begins, by default in the last fifth of the epochs."""

    def train():
        says = r"EASGDModelParallelStrategy with StochasticWeightAveraging: .* the center is an average already"
        with pytest.raises(ValueError, match=says):
            fit((2, 1), module=Sharded(**SGD), callbacks=[StochasticWeightAveraging(0.1)])

    run_ranks(train, 2)


@pytest.mark.parametrize(("devices", "nodes", "shape"), [(4, 1, (3, 1)), (4, 1, (2, 4)), (2, 3, (4, 1))])
def test_ranks_that_cannot_be_cut_are_refused_before_processes_start(devices, nodes, shape):
    with pytest.raises(ValueError, match=rf"sizes of one worker, and {devices * nodes} ranks"):
        quiet_trainer(strategy=EASGDModelParallelStrategy(*shape), devices=devices, num_nodes=nodes)


@pytest.mark.parametrize(
    ("shape", "devices", "nodes", "resolved", "workers"),
    [((), 4, 2, (4, 1), 2), (("auto", 2), 4, 2, (2, 2), 2), ((2,), 4, 1, (2, 1), 2), ((8,), 4, 2, (8, 1), 1)],
)
def test_a_worker_is_a_node_by_default(shape, devices, nodes, resolved, workers):
    strategy = EASGDModelParallelStrategy(*shape)
    quiet_trainer(strategy=strategy, devices=devices, num_nodes=nodes)
    assert (strategy.worker_shape, strategy.workers) == (resolved, workers)


@pytest.mark.parametrize("run", ["fit", "validate", "test", "predict"])
def test_ranks_of_a_worker_that_evaluate_different_numbers_of_batches_are_an_error_and_no_hang(run):
    """Lightning's own sampler gives them so for a prediction, of which no sample is repeated."""

    class Uneven(Sharded):
        def predict_step(self, batch, index):
            return self(batch)

        def predict_dataloader(self):
            return DataLoader(self.rows(9), batch_size=2)

        def test_dataloader(self):
            return DataLoader(self.rows(4 + self.trainer.global_rank % 2))

        val_dataloader = test_dataloader
        test_step = Sharded.validation_step

    def train():
        strategy = EASGDModelParallelStrategy(2, tau=2, timeout=timedelta(seconds=20))
        given = {"devices": 4, "use_distributed_sampler": run == "predict", "num_sanity_val_steps": 0}
        getattr(quiet_trainer(strategy=strategy, **given), run)(Uneven(steps=3, **SGD))

    first, *_, last = (outcome.error for outcome in end_ranks(train, 4, timeout=40))
    limit, numbers = {"predict": ("predict", (2, 1)), "test": ("test", (4, 5))}.get(run, ("val", (4, 5)))
    assert f"has {numbers[0]} batches on rank 0 and {numbers[1]} on rank 1, and these are ranks of one worker" in first
    assert f"Trainer(limit_{limit}_batches={min(numbers)})" in first
    assert run == "predict" or "on rank 2 and 5 on rank 3" in last


class Rows(IterableDataset):
    """As many rows as nobody knows."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        yield from self.rows


@pytest.mark.parametrize(
    ("run", "given"),
    [("fit", {"limit_val_batches": 4}), ("validate", {}), ("test", {}), ("predict", {"limit_predict_batches": 4})],
    ids=["fit, limited", "validate", "test", "predict, limited"],
)
@pytest.mark.parametrize(
    ("numbers", "ended", "more", "after"),
    [(([4], [4], [4], [2]), 3, 2, 2), (([0], [3], [3], [3]), 0, 1, 0), (([2, 3], [2, 3], [2, 2], [3, 1]), 2, 3, 2)],
    ids=["one loader", "none", "two loaders"],
)
def test_ranks_of_a_worker_whose_evaluation_ends_unevenly_are_an_error_and_no_hang(
    numbers, ended, more, after, run, given
):
    """Where no number is known before, or a limit alone; what the other one gathered would be parts of anything."""

    class Streamed(Sharded):
        def validation_step(self, batch, index, dataloader_idx=0):
            super().validation_step(batch, index)

        test_step = validation_step

        def predict_step(self, batch, index, dataloader_idx=0):
            return self(batch)

        def val_dataloader(self):
            return [DataLoader(Rows(self.rows(number))) for number in numbers[self.trainer.global_rank]]

        test_dataloader = predict_dataloader = val_dataloader

    def train():
        strategy = EASGDModelParallelStrategy(2, tau=2, timeout=timedelta(seconds=20))
        getattr(quiet_trainer(strategy=strategy, devices=4, **given), run)(Streamed(steps=3, **SGD))

    outcomes = end_ranks(train, 4, timeout=15)
    said = f"the data of ranks [{ended}] have ended after {after} batches of a data loader, and ranks [{more}], of the"
    for rank in (ended, more):
        assert said in outcomes[rank].error


def test_evaluations_of_unknown_length_that_end_together_are_those_of_known_length():
    class Known(Sharded):
        def validation_step(self, batch, index, dataloader_idx=0):
            super().validation_step(batch, index)

        def val_dataloader(self):
            return [self.loader(self.rows(number)) for number in (3, 1, 2)]

        loader = staticmethod(DataLoader)

    class Streamed(Known):
        loader = staticmethod(lambda rows: DataLoader(Rows(rows)))

    def train():
        given = {"gradient_clip_val": None, "accumulate_grad_batches": 1, "limit_val_batches": 3, "max_epochs": 2}
        given |= {"use_distributed_sampler": False, "num_sanity_val_steps": 2, "val_check_interval": 4}
        both = []
        for cls in (Known, Streamed):
            module = cls(steps=9, **SGD)
            _, center = fit((2, 1), module=module, **given)
            both.append((center, {name: float(value) for name, value in module.trainer.callback_metrics.items()}))
        return both

    for (center, metrics), (streamed, streamed_metrics) in run_ranks(train, 4):
        assert equal(center, streamed)
        assert metrics == streamed_metrics


def test_a_sharded_module_is_refused_where_ranks_have_all_parameters():
    def train():
        module = Sharded()
        module._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        fully_shard(module.net, mesh=module._device_mesh["data_parallel"])
        quiet_trainer(strategy=EASGDStrategy(), devices=1).fit(module)

    (outcome,) = end_ranks(train, 1)
    assert "TypeError: EASGDStrategy: the parameter net.first.weight is a shard (DTensor)" in outcome.error
    assert "EASGDModelParallelStrategy" in outcome.error


@pytest.mark.parametrize("distributed", [True, False])
def test_fabric(distributed, tmp_path):
    def parallelize(module, mesh):
        for part in (module.net.first, module.net):
            fully_shard(part, mesh=mesh["data_parallel"])
        return fully_shard(module, mesh=mesh["data_parallel"])

    def steps(fabric, model, optimizer, first, last):
        rows = model.rows(20 * 2 * 4)
        for batch in range(first, last):
            with fabric.no_backward_sync(model, enabled=batch % 2 == 0):
                fabric.backward(model(rows[4 * batch + fabric.global_rank][None]) / 2)
            if batch % 2:
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
        return parts(model.parameters())

    def train():
        strategy = FabricEASGDModelParallelStrategy(parallelize, 2, save_distributed_checkpoint=distributed, **RUN)
        fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy)
        fabric.launch()

        def made():
            model = fabric.setup(TwoLayers(**SGD))
            return model, fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1, **SGD))

        model, optimizer = made()
        steps(fabric, model, optimizer, 0, 20)
        fabric.save(tmp_path / "10.ckpt", {"model": model, "optimizer": optimizer})
        own = steps(fabric, model, optimizer, 20, 40)
        worker = whole(model.parameters())
        with strategy.center_weights(model):
            center = whole(model.parameters())
        strategy.finalize()
        assert equal(center, whole(model.parameters()))
        model, optimizer = made()
        fabric.load(tmp_path / "10.ckpt", {"model": model, "optimizer": optimizer})
        again = steps(fabric, model, optimizer, 20, 40)
        strategy.finalize()
        return worker, center, own, again

    workers, _, center = reference(2, 2)
    for rank, (worker, own_center, own, again) in enumerate(run_ranks(train, 4, timeout=110)):
        assert close(worker, workers[rank // 2])
        assert close(own_center, center)
        assert equal(own, again)


class OnItsOwnMesh(TwoLayers):
    """Shards over a mesh that it makes of its worker's, as FSDP2 does for a ``reshard_after_forward`` of 2."""

    @staticmethod
    def parallelize(module, mesh):
        ranks = mesh["data_parallel"].mesh.view(1, 2)
        return fully_shard(module, mesh=DeviceMesh("cpu", ranks, mesh_dim_names=("replicas", "shards")))

    def configure_model(self):
        self.parallelize(self.net, self.device_mesh)


def test_a_module_may_make_a_mesh_of_its_workers_ranks():
    def train():
        end, module = fit((2, 1), module=OnItsOwnMesh(steps=4, accumulate=2, **SGD))
        strategy = FabricEASGDModelParallelStrategy(OnItsOwnMesh.parallelize, 2, **RUN)
        fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy)
        fabric.launch()
        placements = [parameter.placements for parameter in fabric.setup(TwoLayers()).parameters()]
        return end.worker, module, placements

    workers, _, center = reference(2, 2, steps=4)
    for rank, (worker, module, placements) in enumerate(run_ranks(train, 4)):
        assert close(worker, workers[rank // 2])
        assert close(module, center)
        assert placements == [(Replicate(), Shard(0))] * 3


def test_a_folder_is_refused_by_name_where_workers_are_not_sharded(tmp_path):
    def train():
        says = r"EASGDStrategy: .*half\.ckpt is a folder.*save_distributed_checkpoint=False.*consolidate_checkpoint"
        with pytest.raises(IsADirectoryError, match=says):
            quiet_trainer(strategy=EASGDStrategy(), devices=1).fit(TwoLayers(), ckpt_path=tmp_path / "half.ckpt")
        fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricEASGDStrategy())
        fabric.launch()
        with pytest.raises(IsADirectoryError, match=says):
            fabric.load(tmp_path / "half.ckpt", {"model": fabric.setup_module(TwoLayers())})

    (tmp_path / "half.ckpt").mkdir()
    run_ranks(train, 1)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_checkpoint_before_the_first_step_changes_nothing(distributed, tmp_path):
    """Torch fills an empty state by a step of no size, which Adam would count."""

    class Adam(Sharded):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    class Save(Callback):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "0.ckpt")

    def fitted(callbacks):
        strategy = EASGDModelParallelStrategy(2, save_distributed_checkpoint=distributed, **RUN)
        module = Adam(steps=8)
        quiet_trainer(strategy=strategy, devices=2, callbacks=callbacks, limit_val_batches=0).fit(module)
        return parts(module.parameters())

    def looped(saves):
        strategy = FabricEASGDModelParallelStrategy(sharded, 2, save_distributed_checkpoint=distributed, **RUN)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        torch.manual_seed(0)
        model = fabric.setup(torch.nn.Linear(4, 4))
        optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters()))
        if saves:
            fabric.save(tmp_path / "0-fabric.ckpt", {"model": model, "optimizer": optimizer})
        for step in range(4):
            fabric.backward(model(torch.full((1, 4), step + 1.0)).square().mean())
            optimizer.step()
        return parts(model.parameters())

    def train():
        return equal(fitted([]), fitted([Save()])), equal(looped(False), looped(True))

    assert run_ranks(train, 2) == [(True, True)] * 2


def sharded(module, mesh):
    return fully_shard(module, mesh=mesh["data_parallel"])


@pytest.mark.parametrize(
    ("strategy", "count"),
    [
        (partial(FabricEASGDModelParallelStrategy, sharded, 2), 1),
        (partial(FabricEASGDModelParallelStrategy, sharded, 2, save_distributed_checkpoint=False), 1),
        (partial(FabricEASGDModelParallelStrategy, sharded, 2), 2),
        (partial(FabricEASGDStrategy, devices_per_worker=2), 1),
    ],
    ids=["folder", "file", "two folders", "DDP"],
)
def test_what_is_loaded_in_the_middle_of_a_training_is_the_center_too(strategy, count, tmp_path):
    """Of several modules each has a checkpoint of its own, as Lightning has it where they are sharded."""

    def train():
        fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy(tau=3, outer_momentum=0.5))
        fabric.launch()
        torch.manual_seed(0)
        pairs = []
        for _ in range(count):
            model = fabric.setup_module(torch.nn.Linear(4, 4))
            pairs.append((model, fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.05, **SGD))))

        def steps(first, last):
            for step in range(first, last):
                for model, optimizer in pairs:
                    generator = torch.Generator().manual_seed(100 * step + fabric.global_rank)
                    fabric.backward(model(torch.randn(3, 4, generator=generator)).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
            worker = whole(parameter for model, _ in pairs for parameter in model.parameters())
            with fabric.strategy.center_weights():
                return worker, whole(parameter for model, _ in pairs for parameter in model.parameters())

        def each(act):
            for number, (model, optimizer) in enumerate(pairs):
                act(tmp_path / f"{number}.ckpt", {"model": model, "optimizer": optimizer})

        steps(0, 5)
        each(fabric.save)
        once = steps(5, 11)
        each(fabric.load)
        again = steps(5, 11)
        fabric.strategy.finalize()
        return [equal(a, b) for a, b in zip(once, again, strict=True)]

    assert run_ranks(train, 4) == [[True, True]] * 4


@pytest.mark.parametrize(
    ("package", "module"), [("lightning.pytorch", "lightning_easgd"), ("pytorch_lightning", "lightning_easgd.pl")]
)
def test_the_name_is_known_in_both_trees(package, module):
    trainer = importlib.import_module(package).Trainer(
        strategy="easgd_model_parallel", accelerator="cpu", devices=2, logger=False, enable_progress_bar=False
    )
    assert type(trainer.strategy) is importlib.import_module(module).EASGDModelParallelStrategy
    assert trainer.strategy.worker_shape == (2, 1)
    ours = [cls for cls in type(trainer.strategy).__mro__ if cls.__module__.startswith("lightning_easgd")]
    assert len(ours) <= 5


def test_lightning_cli_knows_its_arguments():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--strategy", type=Strategy)
    path = "lightning_easgd.EASGDModelParallelStrategy"
    given = parser.parse_args([f"--strategy={path}", "--strategy.tau=4", "--strategy.data_parallel_size=2"])
    assert (given.strategy.init_args.tau, given.strategy.init_args.data_parallel_size) == (4, 2)


class FrozenPart(Regression):
    """BatchNorm behind a layer that does not train; every rank begins with weights of its own."""

    def __init__(self):
        super().__init__(batches=8)
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    def configure_model(self):
        if self.device_mesh is None:
            return
        for part in (self.frozen, self.net[0], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch):
        return super().loss(self.frozen(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("strategy", [EASGDModelParallelStrategy, partial(EASGDStrategy, devices_per_worker=2)])
def test_batchnorm_and_frozen_weights_are_the_same_everywhere(strategy):
    def train():
        torch.manual_seed(int(os.environ["RANK"]))
        module = FrozenPart()
        given = {"data_parallel_size": 2} if strategy is EASGDModelParallelStrategy else {}
        trainer = quiet_trainer(
            strategy=strategy(tau=2, recalibrate_batchnorm=2, **given), devices=4, val_check_interval=3
        )
        trainer.fit(module)
        return whole(module.state_dict().values()), float(trainer.callback_metrics["val_loss"])

    results = run_ranks(train, 4, timeout=110)
    for state, loss in results:
        assert all(np.isfinite(value).all() for value in state)
        assert equal(state, results[0][0])
        assert loss == results[0][1]
