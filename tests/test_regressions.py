"""What a review broke once: uneven ends, resumed momentum, replaced buffers, unusual optimizers."""

import os
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from preloaded import python
from ranks import end_ranks, run_ranks
from test_faults import fail
from torch.utils.data import DataLoader
from toys import Regression, fitted, quiet_trainer

from lightning_easgd import EASGDStrategy

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None."),
]


def easgd(**arguments):
    return EASGDStrategy(**({"tau": 2, "timeout": timedelta(seconds=8)} | arguments))


def bits(module):
    return [parameter.detach().numpy().tobytes() for parameter in module.parameters()]


class Decaying(Regression):
    def train_dataloader(self):
        batches = 5 if self.trainer.global_rank == 0 else 15
        return DataLoader(torch.randn(8 * batches, 4, generator=torch.Generator().manual_seed(0)), batch_size=8)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_rho_with_uneven_data_keeps_one_center():
    def run():
        return bits(fitted(Decaying(), easgd(rho=2.0), 2, use_distributed_sampler=False, limit_val_batches=0))

    first, second = run_ranks(run, 2)
    assert first == second


def test_resuming_keeps_the_momentum_of_eamsgd(tmp_path):
    class Plain(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    def run():
        trainer = quiet_trainer(strategy=easgd(), devices=2)
        trainer.fit(Plain())
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        trainer = quiet_trainer(strategy=easgd(momentum=0.9), devices=2, max_epochs=2)
        trainer.fit(Plain(), ckpt_path=tmp_path / "x.ckpt")
        group = trainer.optimizers[0].param_groups[0]
        return group["momentum"], group["nesterov"]

    assert run_ranks(run, 2) == [(0.9, True)] * 2


class Cached(Regression):
    def __init__(self, inside, outside):
        super().__init__()
        self.outside = outside
        self.register_buffer("cache", inside, persistent=False)

    def validation_step(self, batch, index):
        if not self.trainer.sanity_checking:
            self.cache = self.outside.clone()
        super().validation_step(batch, index)

    def on_train_batch_end(self, *_):
        self.cache += 1  # which torch forbids of a tensor that inference mode has left
        self.last = self.cache.tolist()


@pytest.mark.parametrize("size", [1, 12])
def test_a_buffer_that_validation_replaces(size):
    def run():
        return fitted(Cached(torch.full((size,), 7.0), torch.arange(12.0)), easgd(), 2, val_check_interval=3).last

    assert run_ranks(run, 2) == [[number + 2.0 for number in range(12)]] * 2  # as with DDP, whatever its shape


def test_large_integer_buffers_keep_their_bits():
    def run():
        module = Regression()
        module.register_buffer("hash", torch.tensor([2**62 + 12345]))
        return fitted(module, easgd(), 2).hash.item()

    assert run_ranks(run, 2) == [2**62 + 12345] * 2


class WithoutLr(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.01 * parameter.grad)
        return loss


@pytest.mark.parametrize("make", [lambda _: None, lambda module: WithoutLr(module.parameters())])
def test_any_optimizer_or_none(make):
    def run():
        module = Regression()
        module.configure_optimizers = lambda: make(module)
        fitted(module, easgd(), 2)

    run_ranks(run, 2)


def test_an_epoch_that_one_rank_cuts_short_ends():
    class Short(Regression):
        def on_train_batch_start(self, batch, index):
            return -1 if (self.global_rank, index) == (1, 3) else None

        def training_step(self, batch, index):
            loss = self.loss(batch)
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            return loss

    run_ranks(lambda: bits(fitted(Short(batches=20), easgd(), 2, limit_val_batches=0)), 2, timeout=30)
    # A validation that one rank leaves out cannot be mended, but is told at once.
    started = time.monotonic()
    outcomes = end_ranks(
        lambda: bits(fitted(Short(batches=20), easgd(timeout=timedelta(seconds=60)), 2)), 2, timeout=30
    )
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]
    assert "at a validation, checkpoint or end" in outcomes[0].error + outcomes[1].error
    assert time.monotonic() - started < 20


def test_an_exception_in_on_train_end_ends_all_with_an_error():
    class AtTheEnd(Callback):
        def on_train_end(self, trainer, module):
            if trainer.global_rank == 1:
                fail()

    outcomes = end_ranks(lambda: bits(fitted(Regression(), easgd(), 2, callbacks=[AtTheEnd()])), 2)
    assert [outcome.exitcode for outcome in outcomes] == [1, 1]


@pytest.mark.parametrize("name", ["alpha", "beta", "rho", "momentum"])
def test_rates_that_are_no_numbers(name):
    with pytest.raises(TypeError, match=rf"EASGDStrategy\({name}='x'\)"):
        EASGDStrategy(**{name: "x"})


def test_a_checkpoint_in_mid_epoch_holds_the_center(tmp_path):
    class Centers(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                self.center = {name: value.clone().numpy() for name, value in trainer.strategy.center.items()}

    def run():
        centers = Centers()
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1)
        fitted(Regression(), easgd(), 2, callbacks=[centers, saver], enable_checkpointing=True)
        return centers.center

    center, _ = run_ranks(run, 2)
    state = torch.load(tmp_path / "epoch=0-step=5.ckpt", weights_only=True)["state_dict"]
    for name, value in center.items():
        assert (state[name].numpy() == value).all(), name


def test_all_workers_start_at_rank_zeros_weights():
    def run():
        torch.manual_seed(int(os.environ["RANK"]))
        module = Regression()
        started = []
        module.on_train_start = lambda: started.extend(bits(module))
        fitted(module, easgd(), 2)
        return started

    first, second = run_ranks(run, 2)
    assert first == second


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_while_a_rank_has_no_more_data(rank):
    class Long(Decaying):
        def train_dataloader(self):
            batches = 5 if self.trainer.global_rank == 0 else 400
            return DataLoader(torch.randn(8 * batches, 4), batch_size=8)

    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if (trainer.global_rank, index) == (1, 20):
                os.kill(os.getpid() if rank == 1 else other, signal.SIGTERM)
            time.sleep(0.005)

        def on_train_start(self, trainer, module):
            nonlocal other
            other = trainer.strategy.broadcast(os.getpid())

    other = None

    def run():
        try:
            fitted(Long(), easgd(), 2, callbacks=[Kill()], use_distributed_sampler=False)
        except SystemExit as end:
            return type(end).__name__, end.code
        return None

    assert run_ranks(run, 2, timeout=30) == [("SIGTERMException", None)] * 2


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from lightning.pytorch.callbacks import Callback
from toys import Quadratic, quiet_trainer
from lightning_easgd import EASGDStrategy
class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        time.sleep(0.01)
        if (trainer.global_rank, index) == (1, 9):
            os.kill(os.getpid(), signal.SIGTERM)
if __name__ == "__main__":
    trainer = quiet_trainer(strategy=EASGDStrategy(tau=4, start_method={method!r}), devices=2, callbacks=[Kill()])
    trainer.fit(Quadratic(steps=1000, record=False))
"""


@pytest.mark.parametrize(("method", "clean"), [("fork", False), ("spawn", False), ("popen", True)])
def test_sigterm_on_one_rank_ends_the_parent_too(method, clean, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), method=method))
    run = subprocess.run([python(), script], timeout=120, capture_output=True, check=False)
    assert (run.returncode == 0) == clean, run.stderr
