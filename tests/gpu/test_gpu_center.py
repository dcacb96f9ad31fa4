"""What is shown where: validation at the center, its buffers, its place in memory; also through compiled modules."""

import os
import shutil

import numpy as np
import pytest
import torch
from bowls import flat
from devices import fit, in_precision, on_gpu, shared
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader
from toys import Regression

from lightning_easgd.callbacks import RecalibrateBatchNorm

IN_TURN = {"mode": "async", "order": "round_robin"}
MODES = {"sync": {}, "center on the CPU": {"center_device": "cpu"}, "async": IN_TURN}
every_mode = pytest.mark.parametrize("mode", MODES)
some = pytest.mark.parametrize("mode", [pytest.param("sync", marks=pytest.mark.dry), "center on the CPU", "async"])


class Watch(Callback):
    """Batches, and the module's parameters and buffers: after each batch, and as each validation sees them."""

    def __init__(self):
        self.batches, self.workers, self.shown, self.after = [], [], [], []
        self.places = set()

    @staticmethod
    def now(module):
        return flat(module.parameters()), flat(module.buffers())

    def on_train_batch_start(self, trainer, module, batch, index):
        self.batches.append(batch.cpu().clone())
        if len(self.after) < len(self.shown):
            self.after.append(self.now(module))

    def on_train_batch_end(self, trainer, module, *_):
        self.workers.append(self.now(module))

    def on_validation_start(self, trainer, module):
        center = trainer.strategy.center
        self.shown.append((*self.now(module), flat(center[name] for name, _ in module.named_parameters())))
        self.places |= {(value.device.type, value.is_pinned()) for value in center.values()}


SETTINGS = {"val_check_interval": 5, "num_sanity_val_steps": 0, "deterministic": "warn"}


@some
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_validation_sees_the_center_and_the_worker_comes_back(mode, precision):
    def run():
        watch = Watch()
        settings = in_precision(precision) | SETTINGS
        fit(Regression(batches=12), shared(tau=2, **MODES[mode]), callbacks=[watch], **settings)
        return watch.workers, watch.shown, watch.after, watch.places

    (workers, shown, after, places), (others, seen, back, _) = run_ranks(run, 2, timeout=120)
    for number in range(2):
        worker, other = workers[5 * number + 4], others[5 * number + 4]
        parameters, buffers, center = shown[number]
        assert (parameters == center).all()
        assert all((a == b).all() for a, b in zip(shown[number], seen[number], strict=True))
        assert abs(parameters - worker[0]).max() > 1e-4
        # running_mean and running_var: the workers' mean; num_batches_tracked, the last, is rank 0's.
        np.testing.assert_allclose(buffers[:-1], (worker[1] + other[1])[:-1] / 2, rtol=1e-5, atol=1e-6)
        assert buffers[-1] == 5 * number + 5
        assert all((a == b).all() for a, b in zip(after[number], worker, strict=True)), "bit for bit"
        assert all((a == b).all() for a, b in zip(back[number], other, strict=True)), "bit for bit"
    if on_gpu():
        on_host = {"sync": ("cuda", False), "center on the CPU": ("cpu", True), "async": ("cuda", False)}
        assert places == {on_host[mode]}


def updated(parameters, batches):
    """BatchNorm's statistics at these parameters, in torch's own way."""
    net = Regression().net
    nn.utils.vector_to_parameters(torch.from_numpy(parameters).float(), net.parameters())
    torch.optim.swa_utils.update_bn(batches, net)
    return flat([net[1].running_mean, net[1].running_var])


@every_mode
@pytest.mark.parametrize("by_callback", [False, True])
def test_recalibrated_statistics_are_those_of_all_workers_batches(mode, by_callback):
    def run():
        watch = Watch()
        callbacks = [RecalibrateBatchNorm(batches=3), watch] if by_callback else [watch]
        own = {} if by_callback else {"recalibrate_batchnorm": 3}
        module = Regression(batches=12)
        fit(module, shared(tau=2, **own, **MODES[mode]), callbacks=callbacks, **SETTINGS)
        return watch.batches, watch.shown, watch.after, watch.workers, Watch.now(module)

    (ours, shown, after, workers, final), (theirs, seen, *_, last) = run_ranks(run, 2, timeout=120)
    states = [(shown[0][:2], seen[0][:2], 5), (shown[1][:2], seen[1][:2], 10), (final, last, 12)]
    for (parameters, buffers), (_, others), end in states:
        assert (buffers == others).all()
        with torch.no_grad():
            expected = updated(parameters, ours[end - 3 : end] + theirs[end - 3 : end])
        np.testing.assert_allclose(buffers[:-1], expected, rtol=1e-4, atol=1e-5)
        assert buffers[-1] == 3
    assert (after[0][1] == workers[4][1]).all(), "the worker's own statistics come back"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_recalibration_changes_nothing_of_training(mode):
    def run():
        traces = []
        for batches in (0, 3):
            torch.manual_seed(0)
            watch, module = Watch(), Regression(batches=8)
            module.net.insert(2, nn.Dropout(0.3))  # draws from the device's generator
            strategy = shared(tau=2, recalibrate_batchnorm=batches, **MODES[mode])
            fit(module, strategy, callbacks=[watch], **SETTINGS)
            traces.append([np.concatenate(worker) for worker in watch.workers])
        return traces

    for without, recalibrated in run_ranks(run, 2, timeout=120):
        np.testing.assert_array_equal(recalibrated, without)


class Compiled(Regression):
    """A compiled network, whose output in validation is compared with that of the same weights, uncompiled.

    The validation's batches are of the size of training's: one graph serves both.
    """

    def __init__(self, batchnorm, mode):
        super().__init__(batches=12)
        layers = [nn.BatchNorm1d(8)] if batchnorm else []
        self.plain = nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 1))
        if mode == "uncompiled code":  # what the test itself needs, without a compiler
            self.net = torch.compile(self.plain, backend="eager")
        else:
            self.net = torch.compile(self.plain, mode=mode)
        self.outputs, self.metrics = [], []

    def validation_step(self, batch, index):
        value = self.loss(batch)
        self.log("val_loss", value, sync_dist=True)
        expected = (self.plain(batch) - batch.sum(1, keepdim=True)).square().mean()
        with self.trainer.strategy.worker_weights():
            own = (self.plain(batch) - batch.sum(1, keepdim=True)).square().mean()
            own_compiled = self.loss(batch)
        again = self.loss(batch)
        self.outputs.append([float(each) for each in (value, expected, own, own_compiled, again)])

    def val_dataloader(self):
        return DataLoader(torch.randn(32, 4, generator=torch.Generator().manual_seed(2)), batch_size=8)

    def on_validation_epoch_end(self):
        self.metrics.append(float(self.trainer.callback_metrics.get("val_loss", torch.nan)))


COMPILERS = ["uncompiled code", "default", "reduce-overhead"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "precision"), [*((mode, "32-true") for mode in MODES), ("sync", "bf16-mixed")])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_module_is_validated_at_the_center(compiler, strategy, precision):
    """CUDA graphs read the parameters at fixed addresses: what is shown is copied there."""
    if not on_gpu() and compiler != "uncompiled code":
        pytest.skip("compilers on the CPU are no matter of these tests")
    if on_gpu() and compiler == "uncompiled code":
        pytest.skip("the GPU's compilers are tested")
    if on_gpu() and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        pytest.skip("Triton needs a C compiler")
    graphs = compiler == "reduce-overhead"

    def run():
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes for each rank
        torch.manual_seed(0)
        module = Compiled(batchnorm=not graphs, mode=compiler)
        settings = {"val_check_interval": 4, "num_sanity_val_steps": 0, "inference_mode": not graphs}
        fit(module, shared(tau=2, **MODES[strategy]), precision=precision, **settings)
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        return np.array(module.outputs), module.metrics, flat(module.plain.parameters()), skipped

    (outputs, metrics, end, skipped), (others, other_metrics, other_end, _) = run_ranks(run, 2, timeout=270)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.03, "atol": 0.01}
    assert (end == other_end).all()
    assert len(outputs) == 3 * 2  # three validations of two batches on each rank
    for value, expected, own, own_compiled, again in [*outputs, *others]:
        np.testing.assert_allclose(value, expected, **tolerance)
        np.testing.assert_allclose(again, expected, **tolerance)
        np.testing.assert_allclose(own_compiled, own, **tolerance)
    assert abs(outputs[:, 0] - outputs[:, 2]).max() > 1e-3, "the worker's are others"
    assert abs(outputs[:2, 0] - outputs[2:4, 0]).max() > 1e-3, "and the center moves"
    np.testing.assert_allclose(metrics[-1], np.mean([outputs[-2:, 0], others[-2:, 0]]), rtol=1e-4)
    assert metrics == other_metrics
    if graphs and skipped:
        pytest.skip(f"the numbers are right, but the compiler left out {skipped} CUDA graphs")


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("mode", MODES)
def test_parameters_keep_their_addresses(mode):
    """What graphs rely on."""

    def run():
        class Addresses(Callback):
            def on_train_batch_end(self, trainer, module, *_):
                seen.add(tuple(p.data_ptr() for p in module.parameters()))
                with trainer.strategy.center_weights():
                    seen.add(tuple(p.data_ptr() for p in module.parameters()))

            def on_validation_start(self, trainer, module):
                seen.add(tuple(p.data_ptr() for p in module.parameters()))

        seen = set()
        module = Regression()
        fit(module, shared(tau=2, **MODES[mode]), callbacks=[Addresses()])
        return len(seen)

    assert run_ranks(run, 2, timeout=120) == [1, 1]


@pytest.mark.usefixtures("cuda")
def test_a_graph_captured_by_hand_follows_what_is_shown():
    """Without a compiler: a recorded forward pass reads the center in validation, and the worker afterwards."""

    def run():
        class Graph(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, index):
                if index == 2:
                    self.batch = batch.clone()
                    side = torch.cuda.Stream()
                    side.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(side), torch.no_grad():
                        for _ in range(3):
                            self.of(module)
                    torch.cuda.current_stream().wait_stream(side)
                    self.graph = torch.cuda.CUDAGraph()
                    # Other threads (gloo's) go on using CUDA meanwhile.
                    with torch.no_grad(), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                        self.output = self.of(module)
                if index >= 2:
                    seen.append(self.both(module))
                    with trainer.strategy.center_weights():
                        seen.append(self.both(module))

            def of(self, module):
                return module.net[3](module.net[0](self.batch).relu())

            def both(self, module):
                self.graph.replay()
                with torch.no_grad():
                    return [flat([self.output]), flat([self.of(module)])]

        seen = []
        fit(Regression(), shared(tau=2), callbacks=[Graph()], limit_val_batches=0)
        return np.array(seen)

    for seen in run_ranks(run, 2, timeout=120):
        np.testing.assert_allclose(seen[:, 0], seen[:, 1], rtol=1e-5, atol=1e-6)
        assert abs(seen[0::2] - seen[1::2]).max() > 1e-3, "worker and center differ"
