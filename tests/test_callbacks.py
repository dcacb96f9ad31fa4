"""The callbacks, on one process with a strategy that plays an elastic one."""

import contextlib
import csv
import time
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from application import quiet_trainer, tiny_classifier
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_easgd.callbacks import (
    ElasticMonitor,
    ElasticStrategy,
    LocalEnergyMonitor,
    TimeSplit,
    WorkerEvaluation,
    ddp_bytes,
)
from lightning_easgd.callbacks.recording import evaluating
from lightning_easgd.lab.data import DigitsDataModule
from lightning_easgd.lab.recorders import LearningCurve
from lightning_easgd.strategies.trainer.lightning_private import clocks_of, go_on_at

pytestmark = pytest.mark.timeout(60)


class _Counts:
    exchanges = 0
    bytes_sent = 0
    seconds_waited = 0.0
    staleness = 0


class Elastic(SingleDeviceStrategy):
    """Exchanges at every second step, waits 10 ms each time; its center answers 0 to everything."""

    def __init__(self):
        super().__init__(device="cpu")
        self.communication = _Counts()
        self.steps = 0
        self.in_batch = False

    def optimizer_step(self, *arguments, **named):
        self.steps += 1
        if self.steps % 2 == 0:
            time.sleep(0.01)
            self.communication.exchanges += 1
            self.communication.bytes_sent += 100
            self.communication.seconds_waited += 0.01
        return super().optimizer_step(*arguments, **named)

    def elastic_distance(self):
        return self.communication.exchanges / 2 or None

    @contextlib.contextmanager
    def center_weights(self):
        parameters = list(self.model.parameters())
        own = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.zero_()
        yield
        with torch.no_grad():
            for p, value in zip(parameters, own, strict=True):
                p.copy_(value)

    @contextlib.contextmanager
    def worker_weights(self):
        yield

    def reduce(self, tensor, *arguments, **named):
        assert not self.in_batch, "a collective while a batch is trained"
        return tensor

    all_gather = broadcast = barrier = reduce


class First(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.strategy.in_batch = True


class Last(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.strategy.in_batch = False


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fit(strategy, *callbacks, **arguments):
    defaults = {"max_epochs": 2, "limit_train_batches": 6}
    trainer = quiet_trainer(strategy=strategy, callbacks=list(callbacks), **(defaults | arguments))
    model = tiny_classifier()
    trainer.fit(model, datamodule=DigitsDataModule())
    return trainer, model


def test_protocol_tells_elastic_strategies_from_others():
    assert isinstance(Elastic(), ElasticStrategy)
    assert not isinstance(SingleDeviceStrategy(device="cpu"), ElasticStrategy)


def test_monitor_writes_every_exchange(tmp_path):
    trainer, _ = fit(Elastic(), First(), ElasticMonitor(every_n_exchanges=1, directory=tmp_path), Last())
    written = rows(tmp_path / "elastic" / "rank_0.csv")
    assert [int(row["step"]) for row in written] == [2, 4, 6, 8, 10, 12]
    assert [float(row["distance"]) for row in written] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    (total,) = rows(tmp_path / "communication.csv")
    assert (total["steps"], total["exchanges"], total["bytes_sent"], total["ddp_bytes"]) == ("12", "6", "600", "0")
    assert (total["rank"], total["worker"]) == ("0", "0")
    assert trainer.logged_metrics["elastic/exchanges"] == 6


def test_monitor_records_every_nth_exchange(tmp_path):
    fit(Elastic(), ElasticMonitor(every_n_exchanges=3, directory=tmp_path))
    assert [int(row["exchanges"]) for row in rows(tmp_path / "elastic" / "rank_0.csv")] == [3, 6]


@pytest.mark.parametrize(("ranks", "name"), [(1, "rank_3.csv"), (2, "rank_3.0.csv")])
def test_each_rank_of_a_worker_that_comes_and_goes_has_a_file(ranks, name, tmp_path):
    trainer = SimpleNamespace(strategy=SimpleNamespace(replica_id=3), world_size=ranks, global_rank=0)
    assert ElasticMonitor(directory=tmp_path)._path(trainer).name == name


def test_monitor_starts_again_with_a_second_fit(tmp_path):
    monitor = ElasticMonitor(every_n_exchanges=1, directory=tmp_path)
    fit(Elastic(), monitor)
    fit(Elastic(), monitor)
    assert len(rows(tmp_path / "elastic" / "rank_0.csv")) == 6


def test_monitor_counts_a_workers_own_steps(tmp_path):
    """One that comes to others goes on at theirs when training has started, after the callbacks' hook."""

    class Comes(Elastic):
        def on_train_start(self):
            super().on_train_start()
            trainer = self.lightning_module.trainer
            go_on_at(trainer, {**clocks_of(trainer), "steps": 1000})

    fit(Comes(), First(), ElasticMonitor(directory=tmp_path), Last())
    assert [row["steps"] for row in rows(tmp_path / "communication.csv")] == ["12"]


def test_ddp_is_that_of_all_who_were_there(tmp_path):
    """Kind: a launch is one worker of those that come and go; on its own DDP would send nothing."""

    class Joined(Elastic):
        replica_id = 0
        elastic = SimpleNamespace(membership=SimpleNamespace(living=(0,), missed=0, failed=0))

        def optimizer_step(self, *arguments, **named):
            done = super().optimizer_step(*arguments, **named)
            self.elastic.membership.living = (0,) if self.steps <= 3 else (0, 1) if self.steps <= 8 else (0, 1, 2, 3)
            return done

    _, model = fit(Joined(), ElasticMonitor(directory=tmp_path))
    gradients = 4 * sum(parameter.numel() for parameter in model.parameters())
    (total,) = rows(tmp_path / "communication.csv")
    assert total["steps"] == "12"
    assert int(total["ddp_bytes"]) == gradients * (3 * 0 + 5 * 1 + 4 * 3 // 2)  # 2 (p - 1) / p at each step


def test_a_batch_that_is_none_is_none_of_the_monitors():
    """Lightning warns of it, and leaves out its start, but not its end."""
    monitor, trainer = ElasticMonitor(), SimpleNamespace(strategy=Elastic(), global_step=4, world_size=1)
    monitor.on_train_batch_end(trainer, L.LightningModule(), None, None, 0)


def test_monitor_refuses_zero():
    with pytest.raises(ValueError, match=r"ElasticMonitor\(every_n_exchanges=0\)"):
        ElasticMonitor(every_n_exchanges=0)


def test_worker_evaluation_scores_center_and_worker_on_the_same_data(tmp_path):
    evaluation = WorkerEvaluation(directory=tmp_path)
    _, model = fit(Elastic(), First(), evaluation, Last(), max_epochs=3, limit_train_batches=None)
    written = rows(tmp_path / "accuracy.csv")
    assert [(row["stage"], row["weights"]) for row in written] == [
        (stage, weights) for stage in ("val", "val", "val", "test") for weights in ("center", "worker_0")
    ]
    data = DigitsDataModule()
    data.setup("test")
    images, labels = data._splits["test"].tensors
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    assert evaluation.last_scores["worker_0"] == pytest.approx(right)
    assert right > 0.5
    # All logits equal: the argmax is class 0.
    assert evaluation.last_scores["center"] == pytest.approx((labels == 0).float().mean().item())


@pytest.mark.parametrize(("replica_id", "number"), [(None, 0), (7, 7)])
def test_a_worker_that_comes_and_goes_is_named_by_its_number(replica_id, number, tmp_path):
    strategy = Elastic()
    strategy.replica_id = replica_id
    evaluation, energy = WorkerEvaluation(), LocalEnergyMonitor(sigmas=(0.0,), draws=1, batches=1)
    fit(strategy, evaluation, energy, ElasticMonitor(directory=tmp_path), limit_train_batches=2)
    assert set(evaluation.last_scores) == set(energy.last_energies) == {"center", f"worker_{number}"}
    assert [row["worker"] for row in rows(tmp_path / "communication.csv")] == [str(number)]


def test_scoring_leaves_the_mode_of_each_part_of_the_module(tmp_path):
    modes = []

    class Watch(L.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.network[-1].eval()  # as a frozen backbone is

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append([part.training for part in pl_module.network])

    _, model = fit(Elastic(), WorkerEvaluation(), LearningCurve(tmp_path), Watch())
    modes.append([part.training for part in model.network])
    assert all(each == [True] * (len(each) - 1) + [False] for each in modes)


def test_scoring_undoes_what_a_part_does_as_its_mode_changes():
    class Adapted(torch.nn.Module):
        """As layers that merge low-rank weights for an evaluation."""

        is_merged = False

        def train(self, mode=True):
            self.is_merged = not mode
            return super().train(mode)

    module = L.LightningModule()
    module.trained, module.frozen = Adapted(), Adapted().eval()
    with evaluating(module):
        assert module.trained.is_merged
    assert [(part.training, part.is_merged) for part in module.children()] == [(True, False), (False, True)]


def test_worker_evaluation_takes_the_model_where_there_is_no_center():
    evaluation = WorkerEvaluation(max_batches=1)
    fit(SingleDeviceStrategy(device="cpu"), evaluation)
    assert evaluation.last_scores["center"] == evaluation.last_scores["worker_0"]


def test_worker_evaluation_needs_a_datamodule_that_has_all_that_it_scores():
    data = DigitsDataModule()
    data.setup("fit")

    class WithoutTest(L.LightningDataModule):
        def train_dataloader(self):
            return data.train_dataloader()

        def val_dataloader(self):
            return data.val_dataloader()

    loaders = {"train_dataloaders": data.train_dataloader(), "val_dataloaders": data.val_dataloader()}
    for given, message in (
        (loaders, r"\(\).*datamodule"),
        ({"datamodule": WithoutTest()}, r"\(test=True\): WithoutTest"),
    ):
        trainer = quiet_trainer(max_epochs=1, limit_train_batches=1, callbacks=[WorkerEvaluation()])
        with pytest.raises(TypeError, match=rf"WorkerEvaluation{message}"):
            trainer.fit(tiny_classifier(), **given)
        assert trainer.global_step == 0
    with pytest.raises(ValueError, match=r"WorkerEvaluation\(max_batches=0\)"):
        WorkerEvaluation(max_batches=0)


def test_batches_that_are_scored_are_prepared_as_in_a_validation(tmp_path):
    class Prepared(DigitsDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return torch.ones_like(batch[0]), batch[1]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * (5 if self.trainer.training else 2), batch[1]

    seen = set()

    def see(network, inputs):
        if not network.training:
            seen.update((inputs[0].dtype, value) for value in inputs[0].unique().tolist())

    model = tiny_classifier()
    model.network.register_forward_pre_hook(see)
    energy = LocalEnergyMonitor(sigmas=(0.0,), draws=1, batches=1, every_n_epochs=1)
    callbacks = [WorkerEvaluation(), energy, LearningCurve(tmp_path)]
    trainer = quiet_trainer(
        strategy=Elastic(), callbacks=callbacks, precision="64-true", max_epochs=1, limit_train_batches=2
    )
    trainer.fit(model, datamodule=Prepared())
    assert seen == {(torch.float64, 2.0)}


def test_time_split_accounts_for_all_of_the_time(tmp_path):
    split = TimeSplit(directory=tmp_path)
    fit(Elastic(), First(), Last(), split)
    (seconds,) = split.seconds
    parts = [seconds[name] for name in ("compute", "data", "communication", "rest")]
    assert sum(parts) == pytest.approx(seconds["total"])
    assert all(part >= 0 for part in parts)
    assert seconds["communication"] == pytest.approx(0.06)
    assert rows(tmp_path / "time.csv")[0].keys() == {"rank", *seconds}


def test_time_split_tells_slow_data_from_slow_training():
    class SlowData(DigitsDataModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                time.sleep(0.02)
            return batch

    class SlowValidation(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            time.sleep(0.2)

    split = TimeSplit()
    trainer = quiet_trainer(max_epochs=2, limit_train_batches=6, callbacks=[SlowValidation(), split])
    trainer.fit(tiny_classifier(), datamodule=SlowData())
    (seconds,) = split.seconds
    assert seconds["data"] >= 12 * 0.02
    assert seconds["rest"] >= 2 * 0.2
    assert seconds["communication"] == 0


@pytest.mark.parametrize(
    ("gradient_bytes", "steps", "world", "sent"), [(100, 10, 1, 0), (100, 10, 2, 1000), (100, 10, 4, 1500)]
)
def test_ddp_bytes_is_a_ring_all_reduce_per_step(gradient_bytes, steps, world, sent):
    assert ddp_bytes(gradient_bytes, steps, world) == sent
