"""The center is the model, and Lightning's features work."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, LearningRateFinder, ModelCheckpoint
from ranks import run_ranks
from torch import nn
from toys import Quadratic, Regression, fitted, quiet_trainer

from lightning_easgd import EASGDStrategy, LocalStrategy

pytestmark = pytest.mark.timeout(120)


def arrays(tensors):
    return [tensor.detach().cpu().clone().numpy() for tensor in tensors]


def equal(left, right):
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


class Watched(Regression):
    """Keeps what the module holds at the points where it changes."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.seen = {"validation": [], "checkpoint": [], "before": [], "after": [], "center": [], "means": []}

    def now(self):
        return arrays([*self.parameters(), *self.buffers()])

    def on_train_batch_end(self, *_):
        self.last = self.now()

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.seen["before"].append(self.last)
            self.seen["validation"].append(self.now())
            self.seen["center"].append(arrays(self.trainer.strategy.center.values()))
            self.seen["checkpoint"].append(arrays(self.trainer.strategy.lightning_module_state_dict().values()))

    def on_train_batch_start(self, *_):
        if self.seen["before"] and len(self.seen["after"]) < len(self.seen["before"]):
            self.seen["after"].append(self.now())


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_sees_the_center_and_the_worker_comes_back(ranks):
    def train():
        module = fitted(Watched(batches=12), EASGDStrategy(tau=2), ranks, val_check_interval=5)
        return module.seen

    results = run_ranks(train, ranks)
    for seen in results:
        assert len(seen["validation"]) == 2
        assert all(equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))
        parameters = len(seen["center"][0])
        for shown, center in zip(seen["validation"], seen["center"], strict=True):
            assert equal(shown[:parameters], center)
            assert not equal(shown, seen["before"][0])
    for index in range(2):
        shown = [seen["validation"][index] for seen in results]
        assert all(equal(shown[0], other) for other in shown)
        # running_mean and running_var: the workers' mean; num_batches_tracked: rank 0's
        for buffer, value in enumerate(shown[0][parameters:]):
            workers = np.stack([seen["before"][index][parameters + buffer] for seen in results])
            expected = workers.mean(0) if workers.dtype.kind == "f" else workers[0]
            np.testing.assert_allclose(value, expected, rtol=1e-6)
    # In the order of the state_dict, buffers stand between parameters: compare as sets of bytes.
    for seen in results:
        for state, shown in zip(seen["checkpoint"], seen["validation"], strict=True):
            assert sorted(a.tobytes() for a in state) == sorted(a.tobytes() for a in shown)


def test_worker_weights_inside_validation():
    class Both(Watched):
        def on_validation_end(self):
            if not self.trainer.sanity_checking:
                with self.trainer.strategy.worker_weights():
                    self.seen["means"].append(self.now())
                self.seen["checkpoint"].append(self.now())

        def on_train_end(self):
            with self.trainer.strategy.worker_weights():
                self.final_worker = self.now()
            self.final_center = self.now()

    def train():
        module = fitted(Both(batches=6), EASGDStrategy(tau=2), 2)
        return module.seen, module.final_worker, module.final_center, module.last, module.now()

    for seen, worker, center, last, module in run_ranks(train, 2):
        assert equal(seen["means"][0], last)
        assert equal(seen["checkpoint"][-1], seen["validation"][0])
        assert equal(worker, last)
        assert equal(center, module)
        assert not equal(worker, center)


def test_evaluate_worker_leaves_each_ranks_own_weights():
    def train():
        module = fitted(Watched(batches=6), EASGDStrategy(tau=2, evaluate="worker"), 2)
        return module.seen, module.now()

    results = run_ranks(train, 2)
    for seen, module in results:
        assert equal(seen["validation"][0], seen["before"][0])
        assert not equal(seen["validation"][0], module)
    assert equal(results[0][1], results[1][1])


@pytest.mark.parametrize("batches", [6, 7])
def test_the_module_holds_the_center_after_fit(batches):
    def train():
        strategy = EASGDStrategy(tau=3)
        module = fitted(Regression(batches=batches), strategy, 2)
        return arrays(module.parameters()), arrays(strategy.center.values()), arrays(module.buffers())

    first, second = run_ranks(train, 2)
    assert equal(first[0], first[1])
    assert equal(first[0], second[0])
    assert equal(first[2], second[2])


def test_checkpoint_is_an_ordinary_one(tmp_path):
    def train():
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, save_last=True)
        module = fitted(Regression(), EASGDStrategy(tau=2), 2, callbacks=[saver], enable_checkpointing=True)
        return arrays(module.state_dict().values())

    first, _ = run_ranks(train, 2)
    middle = torch.load(tmp_path / "epoch=0-step=5.ckpt", weights_only=True)
    assert middle["global_step"] == 5
    assert not equal(first, arrays(middle["state_dict"].values()))
    plain = Regression()
    plain.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    Regression.load_from_checkpoint(tmp_path / "last.ckpt")


def test_accumulation_counts_optimizer_steps():
    def train():
        module = fitted(Quadratic(steps=12), EASGDStrategy(tau=2), 2, accumulate_grad_batches=3)
        return module.trainer.strategy.communication.exchanges

    assert run_ranks(train, 2) == [1, 1]  # 4 optimizer steps: at t = 2


class Adversarial(L.LightningModule):
    """Two optimizers by hand, of different rhythm."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.a.parameters(), lr=0.1), torch.optim.Adam(self.b.parameters(), lr=0.01)

    def training_step(self, batch, index):
        first, second = self.optimizers()
        for optimizer, net, due in ((first, self.a, True), (second, self.b, index % 2 == 0)):
            if due:
                optimizer.zero_grad()
                self.manual_backward((net(batch) - self.global_rank).square().mean())
                optimizer.step()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(24, 2), batch_size=2)


def test_one_clock_per_optimizer():
    def train():
        class Clocks(Callback):
            def on_train_batch_end(self, trainer, *_):
                clocks.append([averager.clock for averager in trainer.strategy._averagers])

        clocks = []
        strategy = EASGDStrategy(tau=2)
        module = fitted(Adversarial(), strategy, 2, callbacks=[Clocks()])
        return clocks[-1], strategy.communication.exchanges, list(strategy.center), arrays(module.parameters())

    first, second = run_ranks(train, 2)
    assert first[:3] == ([6, 3], 2 + 1, ["a.weight", "a.bias", "b.weight", "b.bias"])
    assert equal(first[3], second[3])


def test_frozen_parameters_and_tied_weights():
    class Tied(Regression):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.tied = self.net[0].weight

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def train():
        strategy = EASGDStrategy(tau=2)
        module = fitted(Tied(), strategy, 2)
        return list(strategy.center), module.tied is module.net[0].weight, arrays(module.parameters())

    first, second = run_ranks(train, 2)
    assert sorted(first[0]) == ["net.0.bias", "net.1.bias", "net.1.weight", "net.3.bias", "net.3.weight", "tied"]
    assert first[1]
    assert equal(first[2], second[2])


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer)


def test_parameters_unfrozen_in_mid_training():
    class Partial(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def train():
        strategy = EASGDStrategy(tau=3)
        module = fitted(Partial(), strategy, 2, callbacks=[Unfreeze()], max_epochs=2)
        return sorted(strategy.center), arrays(module.parameters())

    first, second = run_ranks(train, 2)
    assert "net.0.weight" in first[0]
    assert equal(first[1], second[1])


def test_learning_rate_finder_leaves_a_fresh_center(tmp_path):
    class Found(Watched):
        def __init__(self):
            super().__init__()
            self.lr = 0.05

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def on_train_start(self):
            self.started = self.now()

    def train():
        torch.manual_seed(3)
        module = Found()
        initial = module.now()
        finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
        trainer = quiet_trainer(
            strategy=EASGDStrategy(tau=2), devices=2, callbacks=[finder], default_root_dir=tmp_path, max_epochs=1
        )
        trainer.fit(module)
        assert not any(type(callback).__name__ == "_CenterCallback" for callback in trainer.callbacks)
        return initial, module.started, module.now(), trainer.strategy.communication.exchanges

    first, second = run_ranks(train, 2)
    assert equal(first[0], first[1])
    assert equal(first[2], second[2])


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
def test_second_fit_with_the_same_strategy():
    def train():
        strategy = EASGDStrategy(tau=2)
        trainer = quiet_trainer(strategy=strategy, devices=2)
        module = Regression()
        trainer.fit(module)
        exchanges = strategy.communication.exchanges
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module)
        trainer.validate(module, verbose=False)
        return exchanges, strategy.communication.exchanges, arrays(module.parameters())

    first, second = run_ranks(train, 2)
    assert first[:2] == (3, 3)
    assert equal(first[2], second[2])


def test_buffers_that_are_the_same_everywhere_keep_their_bits():
    class Constant(Regression):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(100, generator=torch.Generator().manual_seed(0)))
            self.register_buffer("phases", torch.polar(torch.ones(5), torch.arange(5.0)), persistent=False)

    def train():
        module = fitted(Constant(), EASGDStrategy(tau=2), 3)
        return module.table.numpy(), module.phases.numpy()

    reference = Constant()
    for table, phases in run_ranks(train, 3):
        np.testing.assert_array_equal(table, reference.table)
        np.testing.assert_array_equal(phases, reference.phases)


def test_local_workers_go_their_own_way():
    def train():
        return arrays(fitted(Regression(), LocalStrategy(), 2).parameters())

    first, second = run_ranks(train, 2)
    assert not equal(first, second)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision):
    def train():
        strategy = EASGDStrategy(tau=2)
        fitted(Regression(), strategy, 2, precision=precision)
        return {str(tensor.dtype) for tensor in strategy.center.values()}

    expected = {"torch.float64"} if precision == "64-true" else {"torch.float32"}
    assert run_ranks(train, 2) == [expected, expected]


def test_there_is_no_center_before_training():
    with pytest.raises(RuntimeError, match=r"EASGDStrategy\.center: there is no center before"):
        _ = EASGDStrategy().center
