"""Workers of several ranks: DDP inside, elastic averaging between them."""

import os
import signal
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from ranks import end_ranks, run_ranks
from reference import grouped_trace
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from toys import Thaw, TwoLayers, fitted, quiet_trainer

from lightning_easgd import DownpourStrategy, EASGDModelParallelStrategy, EASGDStrategy, LocalStrategy
from lightning_easgd.fabric import EASGDModelParallelStrategy as FabricEASGDModelParallelStrategy
from lightning_easgd.fabric import EASGDStrategy as FabricEASGDStrategy
from lightning_easgd.transport.worker_layout import WorkerLayout

pytestmark = pytest.mark.timeout(150)
RUN = {"tau": 3, "alpha": 0.3, "beta": 0.8}
SGD = {"momentum": 0.9}


def arrays(tensors):
    return [tensor.detach().clone().numpy() for tensor in tensors]


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def close(left, right, tolerance=1e-12):
    return all(np.abs(a - b).max(initial=0) <= tolerance for a, b in zip(left, right, strict=True))


def reference(workers, size, **arguments):
    module = TwoLayers()
    arguments = {"steps": 20, "accumulate": 2, "clip": 0.5, **SGD, **RUN, **arguments}
    rows = module.rows(arguments["steps"] * arguments["accumulate"] * workers * size).numpy()
    return grouped_trace(rows, arrays(module.parameters()), workers=workers, size=size, **arguments)


class End(Callback):
    """Keeps the worker, its momentum and the center at the end."""

    def on_train_end(self, trainer, module):
        strategy = trainer.strategy
        with strategy.worker_weights():
            self.worker = arrays(module.parameters())
        state = trainer.optimizers[0].state
        self.momentum = arrays(state[parameter]["momentum_buffer"] for parameter in module.parameters())
        self.center = arrays(strategy.center.values())


class TestLayout:
    @pytest.mark.parametrize(
        ("ranks", "size", "inside", "across"),
        [
            (4, 1, [[0], [1], [2], [3]], [[0, 1, 2, 3]]),
            (4, 2, [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
            (4, 4, [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
            (6, 2, [[0, 1], [2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]]),
            (1, 1, [[0]], [[0]]),
        ],
    )
    def test_groups(self, ranks, size, inside, across):
        layout = WorkerLayout(ranks, size)
        assert (layout.inside, layout.across) == (inside, across)
        assert layout.workers == len(inside)
        for worker, members in enumerate(inside):
            assert [layout.worker_of(rank) for rank in members] == [worker] * size
            assert [layout.coordinate_of(rank) for rank in members] == list(range(size))

    @pytest.mark.parametrize(("ranks", "size"), [(4, 3), (4, 8), (4, 0)])
    def test_ranks_that_cannot_be_cut(self, ranks, size):
        with pytest.raises(ValueError, match=f"{ranks} ranks cannot be cut into workers of {size}"):
            WorkerLayout(ranks, size)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ({"devices_per_worker": 0}, "devices_per_worker=0.*at least 1"),
            ({"devices_per_worker": True}, "devices_per_worker=True.*number of ranks"),
            ({"devices_per_worker": "host"}, "devices_per_worker='host'.*'node'"),
            ({"devices_per_worker": 2, "mode": "async"}, "mode='async'.*use mode='sync'"),
            ({"devices_per_worker": 2, "model_averaging_period": 4}, "every tau steps"),
            ({"devices_per_worker": 2, "process_group": object()}, "makes the group of each worker"),
            ({"ddp_comm_hook": bf16_compress_hook}, "gradients are not reduced"),
            (
                {"devices_per_worker": 2, "ddp_comm_state": PostLocalSGDState(None, None, 10)},
                "PostLocalSGDState.*devices_per_worker=1",
            ),
        ],
    )
    def test_what_is_refused(self, arguments, says):
        for cls in EASGDStrategy, FabricEASGDStrategy:
            with pytest.raises((TypeError, ValueError), match=says):
                cls(**arguments)

    @pytest.mark.parametrize("strategy", [DownpourStrategy, LocalStrategy])
    def test_workers_of_other_methods_are_ranks(self, strategy):
        says = rf"{strategy.__name__}\(devices_per_worker=2\): it is EASGDStrategy\(mode='sync'\) that has workers of"
        with pytest.raises(TypeError, match=says):
            strategy(devices_per_worker=2)

    @pytest.mark.parametrize(("devices", "nodes", "given"), [(4, 1, 3), (4, 2, 3), (3, 1, 2), (2, 1, 4)])
    def test_ranks_that_cannot_be_cut_are_refused_before_processes_start(self, devices, nodes, given):
        with pytest.raises(ValueError, match=rf"devices_per_worker={given}\): {devices * nodes} ranks"):
            quiet_trainer(strategy=EASGDStrategy(devices_per_worker=given), devices=devices, num_nodes=nodes)
        with pytest.raises(ValueError, match=rf"devices_per_worker={given}\): {devices * nodes} ranks"):
            Fabric(
                accelerator="cpu",
                strategy=FabricEASGDStrategy(devices_per_worker=given),
                devices=devices,
                num_nodes=nodes,
            )

    @pytest.mark.parametrize(
        ("given", "devices", "nodes", "workers"), [("node", 4, 2, 2), ("node", 1, 3, 3), (2, 4, 2, 4), (1, 4, 1, 4)]
    )
    def test_the_number_of_workers(self, given, devices, nodes, workers):
        strategy = EASGDStrategy(devices_per_worker=given)
        quiet_trainer(strategy=strategy, devices=devices, num_nodes=nodes)
        assert strategy.workers == workers
        assert strategy.rates.instability(workers) is None

    def test_a_node_of_one_device_holds_no_reduction_back(self):
        def train():
            fabric = Fabric(accelerator="cpu", devices=1, strategy=FabricEASGDStrategy(devices_per_worker="node"))
            fabric.launch()
            model = TwoLayers()
            model, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
            with fabric.no_backward_sync(model):
                fabric.backward(model(model.rows(1)))

        run_ranks(train, 1)

    def test_arguments_of_the_wrapper_have_their_effect_and_do_not_warn(self, recwarn):
        EASGDStrategy(devices_per_worker=2, find_unused_parameters=True, static_graph=False)
        assert not recwarn


NEW = {"alpha": 0.9, "beta": 0.8, "outer_momentum": 0.5, "pull_to": "new", "delay": 1}


def trained(arguments, **trainer):
    end = End()
    strategy = EASGDStrategy(**{"devices_per_worker": 2, **RUN, **arguments})
    module = TwoLayers(accumulate=2, **SGD)
    wrapped = []

    class See(Callback):
        def on_train_start(self, trainer, module):
            wrapped.append(trainer.strategy.model)

    given = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "limit_val_batches": 0} | trainer
    fitted(module, strategy, int(os.environ["WORLD_SIZE"]), callbacks=[end, See()], **given)
    assert isinstance(wrapped[0], DistributedDataParallel)
    return end.worker, end.momentum, end.center, arrays(module.parameters()), strategy.communication.bytes_sent


def test_workers_of_two_ranks_are_the_two_of_the_reference():
    cases = {
        "shared": {},
        "gloo, alpha is beta / p": {"process_group_backend": "gloo", "alpha": None},
        "on host": {"center_device": "cpu"},
        "new center": NEW,
    }
    ranks = run_ranks(lambda: {name: trained(given) for name, given in cases.items()}, 4, timeout=110)
    for name, given in cases.items():
        family = given if given is NEW else {}
        rates = {"alpha": given.get("alpha", RUN["alpha"]) or RUN["beta"] / 2}
        workers, momenta, center = reference(2, 2, **rates | family)
        results = [of_rank[name] for of_rank in ranks]
        for rank, (worker, momentum, own_center, module, _) in enumerate(results):
            assert close(worker, workers[rank // 2]), name
            assert close(momentum, momenta[rank // 2]), name
            assert close(own_center, center), name
            assert equal(module, own_center), name
            assert equal(own_center, results[0][2]), name
            assert equal(worker, results[rank // 2 * 2][0]), name


class SaveAt(Callback):
    """Saves a checkpoint after a number of steps, at the end of an epoch."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer, module):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Sums(Callback):
    """Keeps what was sent."""

    def on_train_end(self, trainer, module):
        (averager,) = trainer.strategy._averagers
        self.sent = trainer.strategy.communication.bytes_sent
        self.exchanges = trainer.strategy.communication.exchanges
        self.header = averager._line.control.bytes_sent(72)


def test_a_resumed_run_goes_on_bitwise_and_validation_changes_nothing(tmp_path):
    """And each rank sends a half of what it would as a worker of its own."""
    wires = (None, "bfloat16", "int8")

    def fit(wire, size, **arguments):
        end, sums = End(), Sums()
        callbacks = [end, sums, *arguments.pop("callbacks", [])]
        strategy = EASGDStrategy(wire_dtype=wire, devices_per_worker=size, process_group_backend="gloo", **RUN)
        ckpt_path = arguments.pop("ckpt_path", None)
        trainer = quiet_trainer(strategy=strategy, devices=4, callbacks=callbacks, max_epochs=2, **arguments)
        trainer.fit(TwoLayers(steps=10, **SGD), ckpt_path=ckpt_path)
        sent = (sums.sent - sums.exchanges * sums.header) / sums.exchanges
        return end.worker, end.momentum, end.center, sent

    def train(wire):
        path = tmp_path / f"{wire}.ckpt"
        plain = fit(wire, 2, limit_val_batches=0)
        watched = fit(wire, 2, val_check_interval=5, callbacks=[SaveAt(10, path)])
        resumed = fit(wire, 2, ckpt_path=path, limit_val_batches=0)
        apart = fit(wire, 1, limit_val_batches=0, max_steps=5)
        return plain, watched, resumed, apart[3]

    for wire, *results in zip(wires, *run_ranks(lambda: [*map(train, wires)], 4, timeout=110), strict=True):
        for rank, (plain, watched, resumed, sent_alone) in enumerate(results):
            for kind in range(3):
                assert equal(plain[kind], watched[kind]), wire
                assert equal(plain[kind], resumed[kind]), wire
                assert equal(plain[kind], results[rank // 2 * 2][0][kind]), wire
            assert equal(plain[2], results[0][0][2]), wire
            # Of 21 elements, so that slices, and the codec's blocks, are not quite a half; (p - 1) / p is another, too.
            assert plain[3] <= 0.55 * sent_alone * (1 / 2) / (3 / 4) + 8, wire
        saved = torch.load(tmp_path / f"{wire}.ckpt", weights_only=True)["easgd"]
        assert (saved["world_size"], saved["worker_shape"]) == (4, [2]), wire
        first, second, third, fourth = (state["tensors"]["net.first.weight"] for state in saved["workers"])
        assert first.data_ptr() == second.data_ptr(), wire
        assert third.data_ptr() == fourth.data_ptr(), wire
        assert not torch.equal(first, third), wire


def test_other_workers_start_at_the_center_and_say_so(tmp_path):
    def train():
        path = tmp_path / "2.ckpt"
        trainer = quiet_trainer(strategy=EASGDStrategy(devices_per_worker=2, tau=2), devices=4, limit_val_batches=0)
        trainer.fit(TwoLayers(steps=5, **SGD))
        trainer.save_checkpoint(path)
        other = quiet_trainer(strategy=EASGDStrategy(tau=2), devices=4, limit_val_batches=0, max_epochs=2)
        module = TwoLayers(steps=5, **SGD)
        said = "saved by 2 workers of 2 devices, and now there are 4 workers"
        with pytest.warns(UserWarning, match=said) if os.environ["RANK"] == "0" else nullcontext():
            other.fit(module, ckpt_path=path)
        return arrays(module.parameters())

    first, *others = run_ranks(train, 4, timeout=110)
    assert all(equal(first, other) for other in others)


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_ranks_of_a_worker_with_different_numbers_of_batches_are_an_error_and_no_hang(is_reloaded):
    """Where the numbers are known; also of new data in a loader that is kept. Those of other workers may differ."""

    class Uneven(TwoLayers):
        kept = CombinedLoader([])

        def train_dataloader(self):
            last = not is_reloaded or self.trainer.current_epoch == 1
            sizes = [8, 8, 5, 6] if last else [8, 8, 5, 5]
            loader = DataLoader(self.rows(sizes[self.trainer.global_rank]))
            if not is_reloaded:
                return loader
            self.kept.__init__(loader, "max_size")
            return self.kept

    def train():
        strategy = EASGDStrategy(devices_per_worker=2, timeout=timedelta(seconds=20), **RUN)
        given = {"reload_dataloaders_every_n_epochs": int(is_reloaded), "max_epochs": 2, "limit_val_batches": 0}
        fitted(Uneven(), strategy, 4, use_distributed_sampler=False, **given)

    for outcome in end_ranks(train, 4, timeout=40):
        assert "an epoch has 5 batches on rank 2 and 6 on rank 3, and these are ranks of one worker" in outcome.error
        assert "limit_train_batches=5" in outcome.error


class Stream(IterableDataset):
    """Batches of which nobody knows how many there are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


class Estimated(Stream):
    """The same, with a number that is none of them, as of several processes that load shards."""

    def __len__(self):
        return 9


@pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize(
    ("given", "ended"),
    [({}, 3), ({}, 0), ({"limit_train_batches": 9}, 3), ({"stream": Estimated}, 0)],
    ids=["unknown, second worker", "unknown, first worker", "a limit", "estimated"],
)
def test_ranks_of_a_worker_whose_data_end_unevenly_are_an_error_and_no_hang(given, ended):
    """Where no number is known before but a limit, or one that is no more than an estimate. Others' may differ."""
    sizes, more, at = {3: ((8, 8, 6, 5), 2, slice(2, 4)), 0: ((7, 9, 8, 8), 1, slice(2))}[ended]
    trainer = given | {"limit_val_batches": 0}
    stream = trainer.pop("stream", Stream)

    class Streamed(TwoLayers):
        def train_dataloader(self):
            return DataLoader(stream(self.rows(sizes[self.trainer.global_rank]).split(1)), batch_size=None)

    def train():
        strategy = EASGDStrategy(devices_per_worker=2, timeout=timedelta(seconds=20), **RUN)
        fitted(Streamed(), strategy, 4, **trainer)

    for outcome in end_ranks(train, 4, timeout=15)[at]:
        number = min(sizes[at])
        assert (
            f"the data of ranks [{ended}] have ended after {number} batches of the epoch, and ranks [{more}], of the"
            in (outcome.error)
        )
        assert f"limit_train_batches={number}" in outcome.error


def test_data_of_unknown_length_that_end_together_train_as_others_do():
    class Streamed(TwoLayers):
        def train_dataloader(self):
            return DataLoader(Stream(list(super().train_dataloader())), batch_size=None)

    def train(module):
        fitted(module, EASGDStrategy(devices_per_worker=2, **RUN), 4, max_epochs=2, limit_val_batches=0)
        return arrays(module.parameters())

    def both():
        return train(TwoLayers(steps=6, **SGD)), train(Streamed(steps=6, **SGD))

    for plain, streamed in run_ranks(both, 4):
        assert equal(plain, streamed)


class Stop(Callback):
    def __init__(self, rank):
        self.rank, self.end = rank, None

    def on_train_batch_start(self, trainer, module, batch, index):
        if (trainer.global_rank, index) == (self.rank, 9):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, module, exception):
        self.end = type(exception).__name__, trainer.global_step


@pytest.mark.parametrize("rank", range(4))
def test_a_stop_request_on_any_rank_stops_all_at_the_same_step(rank):
    def train():
        stop = Stop(rank)
        strategy = EASGDStrategy(tau=4, devices_per_worker=2, timeout=timedelta(seconds=20))
        try:
            fitted(TwoLayers(steps=40, **SGD), strategy, 4, callbacks=[stop])
        except SystemExit:
            return stop.end
        return None

    assert run_ranks(train, 4, timeout=110) == [("SIGTERMException", 17)] * 4


@pytest.mark.parametrize("rank", [1, 2])
def test_a_dead_rank_ends_all(rank):
    class Die(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if (trainer.global_rank, index) == (rank, 9):
                os.kill(os.getpid(), signal.SIGKILL)

    def train():
        strategy = EASGDStrategy(tau=4, devices_per_worker=2, timeout=timedelta(seconds=6))
        fitted(TwoLayers(steps=40, **SGD), strategy, 4, callbacks=[Die()])

    outcomes = end_ranks(train, 4, timeout=40)
    assert all(outcome.exitcode != 0 for outcome in outcomes)


def test_arguments_of_ddp_count_inside_of_a_worker():
    """A communication hook without a group of its own would reduce over all workers."""
    seen = []

    def hook(state, bucket):
        seen.append(dist.get_world_size(state))
        return bf16_compress_hook(state, bucket)

    def train():
        strategy = EASGDStrategy(
            devices_per_worker=2, ddp_comm_hook=hook, find_unused_parameters=True, gradient_as_bucket_view=True, **RUN
        )
        model = []

        class See(Callback):
            def on_train_start(self, trainer, module):
                model.append(trainer.strategy.model)

        class Unused(TwoLayers):
            def __init__(self):
                super().__init__(**SGD)
                self.unused = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

        module = fitted(Unused(), strategy, 4, callbacks=[See()])
        assert model[0].find_unused_parameters
        assert model[0].gradient_as_bucket_view
        assert strategy.model is module
        assert strategy._inside is None
        return arrays(module.parameters()), set(seen)

    results = run_ranks(train, 4, timeout=110)
    _, _, center = reference(2, 2, accumulate=1, clip=None)
    for module, sizes in results:
        assert sizes == {2}
        assert equal(module, results[0][0])
        assert close(module[1:], center, 0.05)  # gradients have three digits
    assert not close(results[0][0][1:], center)


@pytest.mark.parametrize("converts", [False, True])
def test_what_communicates_inside_of_a_worker_is_given_the_group_of_each_fit(converts, monkeypatch):
    """SyncBatchNorm layers and a hook's state must not keep that of the first fit, which is destroyed, in the second.

    Nor is it said that they keep the workers in step.
    """
    monkeypatch.setattr(  # torch refuses the layer on CPUs, where it is not called here
        DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None
    )

    class State:
        process_group = None

    class Synchronized(TwoLayers):
        def __init__(self):
            super().__init__(steps=4, **SGD)
            self.norm = torch.nn.SyncBatchNorm(3).requires_grad_(False)

    class See(Callback):
        def __init__(self):
            self.ranks = []

        def on_train_start(self, trainer, module):
            assert state.process_group is module.norm.process_group
            assert state.process_group in dist.distributed_c10d._world.pg_map
            self.ranks.append(dist.get_process_group_ranks(state.process_group))

    state = State()

    def train():
        see, module = See(), Synchronized()
        strategy = EASGDStrategy(
            devices_per_worker=2,
            ddp_comm_state=state,
            ddp_comm_hook=lambda state, bucket: bf16_compress_hook(state.process_group, bucket),
            **RUN,
        )
        given = {"limit_val_batches": 0, "sync_batchnorm": converts}
        trainer = quiet_trainer(strategy=strategy, devices=4, callbacks=[see], **given)
        for epochs in (1, 2):
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module)
            assert state.process_group is None
            assert getattr(module.norm, "process_group", None) is None  # Lightning turns layers back that it converts
        return see.ranks

    assert run_ranks(train, 4) == [[[0, 1]] * 2] * 2 + [[[2, 3]] * 2] * 2


def test_a_worker_that_has_gone_astray_starts_again_on_all_of_its_ranks():
    class Break(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 5 and trainer.global_rank in (2, 3):
                with torch.no_grad():
                    next(module.parameters()).fill_(float("nan"))

    def train():
        end = End()
        strategy = EASGDStrategy(devices_per_worker=2, on_nonfinite="reset", **RUN)
        module = TwoLayers(**SGD)
        with pytest.warns(RuntimeWarning, match="starts again") if os.environ["RANK"] in "23" else nullcontext():
            fitted(module, strategy, 4, callbacks=[end, Break()])
        return end.worker, end.center

    results = run_ranks(train, 4, timeout=110)
    for rank, (worker, center) in enumerate(results):
        assert all(np.isfinite(part).all() for part in worker)
        assert equal(worker, results[rank // 2 * 2][0])
        assert equal(center, results[0][1])


def test_fabric():
    def train():
        fabric = Fabric(accelerator="cpu", devices=4, strategy=FabricEASGDStrategy(devices_per_worker=2, **RUN))
        fabric.launch()
        module = TwoLayers(**SGD)
        rows = module.rows(20 * 2 * 4)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1, **SGD))
        for batch in range(40):
            with fabric.no_backward_sync(model, enabled=batch % 2 == 0):
                loss = model(rows[4 * batch + fabric.global_rank][None])
                fabric.backward(loss / 2)
            if batch % 2:
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
        worker = arrays(module.parameters())
        with fabric.strategy.center_weights(model):
            center = arrays(module.parameters())
        state = arrays(fabric.strategy.get_module_state_dict(model).values())
        fabric.strategy.finalize()
        return worker, center, state, arrays(module.parameters())

    workers, _, center = reference(2, 2)
    for rank, (worker, own_center, state, final) in enumerate(run_ranks(train, 4, timeout=110)):
        assert close(worker, workers[rank // 2])
        assert close(own_center, center)
        assert equal(own_center, state)
        assert equal(own_center, final)


PLACES = {
    "DDP": (EASGDStrategy, {"devices_per_worker": 2}),
    "DDP, Fabric": (FabricEASGDStrategy, {"devices_per_worker": 2}),
    "FSDP2": (EASGDModelParallelStrategy, {"data_parallel_size": 2}),
    "FSDP2, Fabric": (FabricEASGDModelParallelStrategy, {"parallelize_fn": id, "data_parallel_size": 2}),
}


class Shardable(TwoLayers):
    def configure_model(self):
        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("place", PLACES)
def test_gloo_that_lightning_has_bound_to_a_gpu_makes_groups_of_some_ranks(place, monkeypatch):
    """Of a bound group torch makes them by splitting it, which gloo cannot."""
    cls, arguments = PLACES[place]
    init = dist.init_process_group

    def init_bound(*arguments, **keywords):
        init(*arguments, **keywords)
        dist.group.WORLD.bound_device_id = torch.device("cuda", 0)

    monkeypatch.setattr(dist, "init_process_group", init_bound)

    def train():
        strategy = cls(process_group_backend="gloo", **arguments)
        if not place.endswith("Fabric"):
            fitted(Shardable(), strategy, 4, max_steps=2)
            return
        fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy)
        fabric.launch()
        dist.new_subgroups(2)
        fabric.barrier()

    run_ranks(train, 4)


@pytest.mark.parametrize("has_state", [False, True])
def test_a_communication_hook_with_fabric_reduces_inside_of_a_worker(has_state):
    """Fabric's own strategy has none, and DDP's constructor takes none."""
    seen = []

    class State:
        process_group = None

    def hook(state, bucket):
        group = state.process_group if has_state else state
        seen.append(dist.get_process_group_ranks(group))
        return bf16_compress_hook(group, bucket)

    def train():
        given = {"ddp_comm_state": State()} if has_state else {}
        strategy = FabricEASGDStrategy(devices_per_worker=2, ddp_comm_hook=hook, **given, **RUN)
        fabric = Fabric(accelerator="cpu", devices=4, strategy=strategy)
        fabric.launch()
        module = TwoLayers()
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        fabric.backward(model(module.rows(4)[fabric.global_rank][None]))
        optimizer.step()
        strategy.finalize()
        return seen

    assert run_ranks(train, 4) == [[[0, 1]]] * 2 + [[[2, 3]]] * 2


def test_parameters_that_come_later():
    """The slices are cut anew; every rank has the center of the others, and the workers' mean is in it."""

    class Late(TwoLayers):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.first.parameters(), lr=self.lr)

        def on_train_batch_start(self, batch, index):
            if index == 7:
                self.trainer.optimizers[0].add_param_group({"params": list(self.net.second.parameters())})

    def train(wire):
        strategy = EASGDStrategy(devices_per_worker=2, wire_dtype=wire, find_unused_parameters=True, **RUN)
        module = fitted(Late(), strategy, 4, limit_val_batches=0)
        return arrays(strategy.center.values()), arrays(module.parameters())

    wires = (None, "int8")
    start = arrays(TwoLayers().parameters())
    for wire, *results in zip(wires, *run_ranks(lambda: [*map(train, wires)], 4, timeout=110), strict=True):
        for center, module in results:
            assert equal(center, results[0][0]), wire
            assert equal(center, module), wire
            assert len(center) == 3, wire
            assert not any(np.array_equal(a, b) for a, b in zip(center, start, strict=True)), wire


class Frozen(TwoLayers):
    """Its first layer is frozen until the second epoch."""

    def configure_optimizers(self):
        trained = filter(lambda parameter: parameter.requires_grad, self.parameters())
        return torch.optim.SGD(trained, lr=self.lr)


class ThawAt(Callback):
    """Of an optimizer that has all parameters: in the middle of an epoch."""

    def setup(self, trainer, module, stage):
        module.net.first.requires_grad_(False)

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 7:
            module.net.first.requires_grad_(True)


def test_gradients_of_parameters_that_are_unfrozen_later_are_reduced_inside_of_a_worker():
    def train(cls, callback):
        strategy = EASGDStrategy(devices_per_worker=2, **RUN)
        own = []

        class Keep(Callback):
            def on_train_end(self, trainer, module):
                with trainer.strategy.worker_weights():
                    own.extend(arrays(module.parameters()))

        given = {"max_epochs": 2, "limit_val_batches": 0, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
        module = fitted(cls(), strategy, 4, callbacks=[callback(), Keep()], **given)
        assert strategy.model is module
        return own, arrays(module.parameters())

    cases = [(Frozen, Thaw), (TwoLayers, ThawAt)]
    start = arrays(TwoLayers().parameters())
    for case, *results in zip(cases, *run_ranks(lambda: [train(*each) for each in cases], 4, timeout=110), strict=True):
        for rank, (worker, center) in enumerate(results):
            assert equal(worker, results[rank // 2 * 2][0]), case
            assert equal(center, results[0][1]), case
            assert not any(np.array_equal(a, b) for a, b in zip(worker, start, strict=True)), case
        assert not equal(results[0][0], results[2][0]), case


def test_a_hook_that_keeps_something_of_each_bucket_begins_anew_where_more_is_reduced():
    """PowerSGD, of as high a rank as the gradients', which is exact."""

    def train():
        results = []
        state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=0.01)
        for given in {}, {"ddp_comm_hook": powerSGD_hook, "ddp_comm_state": state}:
            strategy = EASGDStrategy(devices_per_worker=2, **given, **RUN)
            module = fitted(TwoLayers(**SGD), strategy, 4, callbacks=[ThawAt()], limit_val_batches=0)
            results.append(arrays(module.parameters()))
        return results, state.iter, [error.numel() for error in state.error_dict.values()]

    for (plain, compressed), steps, kept in run_ranks(train, 4):
        assert close(plain, compressed, 1e-9)
        assert steps == 20 - 7
        assert kept == [21]


class Grown(TwoLayers):
    """It gets another layer in the middle of an epoch, with values of its own on each rank."""

    def on_train_batch_start(self, batch, index):
        if index == 7:
            torch.manual_seed(self.trainer.global_rank)
            self.last_layer = torch.nn.Linear(5, 5, dtype=torch.float64)
            self.trainer.optimizers[0].add_param_group({"params": list(self.last_layer.parameters())})

    def forward(self, batch):
        loss = super().forward(batch)
        return loss + (self.last_layer(batch[:, 5:]) - 1).square().mean() if hasattr(self, "last_layer") else loss


def test_gradients_of_parameters_that_are_made_later_are_reduced_inside_of_a_worker():
    def train():
        end = End()
        module = fitted(
            Grown(momentum=0.9), EASGDStrategy(devices_per_worker=2, **RUN), 4, callbacks=[end], limit_val_batches=0
        )
        return end.worker, end.momentum, arrays(module.parameters())

    results = run_ranks(train, 4, timeout=110)
    for rank, (worker, momentum, center) in enumerate(results):
        assert len(center) == 5
        assert equal(worker, results[rank // 2 * 2][0])
        assert equal(momentum, results[rank // 2 * 2][1])
        assert equal(center, results[0][2])
    assert not equal(results[0][0][3:], results[2][0][3:])


@pytest.mark.parametrize("has_module", [True, False])
def test_a_step_with_parameters_that_no_module_had_at_setup_is_an_error_or_warned_of(has_module):
    """As those of a loss that only the optimizer is given. Copies in another precision are none of a module, too."""

    def train():
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(devices_per_worker=2, **RUN))
        fabric.launch()
        module, loss = TwoLayers(), torch.nn.Linear(5, 5, dtype=torch.float64)
        model, optimizer = fabric.setup(module, torch.optim.SGD([*module.parameters(), *loss.parameters()], lr=0.1))
        if has_module:
            module.loss = loss
        batch = module.rows(1)
        fabric.backward(model(batch) + loss(batch[:, 5:]).square().sum())
        says = r"no module has some .*\(of the shapes \(5, 5\), \(5,\)\)"
        try:
            with nullcontext() if has_module or fabric.global_rank else pytest.warns(UserWarning, match=says):
                optimizer.step()
        finally:
            fabric.barrier()  # a rank that ends takes the store with it, which the other may not have asked yet

    for outcome in end_ranks(train, 2, timeout=40):
        if has_module:
            assert "loss.weight, loss.bias were not in it when DDP wrapped the module" in outcome.error
            assert "give fabric.setup a module that has them" in outcome.error
        else:
            assert outcome.exitcode == 0, outcome.error


def test_a_step_with_gradients_that_were_not_reduced_is_an_error():
    """Where the module cannot be wrapped again."""

    class Inside(TwoLayers):
        def training_step(self, batch, index):
            self.net.first.requires_grad_(index >= 7)
            return super().training_step(batch, index)

    def train():
        module = Inside()
        module.net.first.requires_grad_(False)
        fitted(module, EASGDStrategy(devices_per_worker=2, **RUN), 2, limit_val_batches=0)

    def setup():
        fabric = Fabric(accelerator="cpu", devices=2, strategy=FabricEASGDStrategy(devices_per_worker=2, **RUN))
        fabric.launch()
        module = TwoLayers()
        module.net.first.requires_grad_(False)
        model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
        for step in range(5):
            module.net.first.requires_grad_(step == 4)
            fabric.backward(model(module.rows(1)))
            optimizer.step()

    for function, remedy in ((train, "on_train_batch_start"), (setup, "freeze them after fabric.setup")):
        for outcome in end_ranks(function, 2, timeout=40):
            assert "(devices_per_worker=2): " in outcome.error
            assert "net.first.weight were frozen when DDP wrapped the module" in outcome.error
            assert remedy in outcome.error
