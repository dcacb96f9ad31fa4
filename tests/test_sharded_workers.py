"""Workers that are sharded: FSDP2 and tensor parallelism inside, elastic averaging between them."""

import os

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback
from ranks import run_ranks
from reference import grouped_trace
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from toys import TwoLayers, quiet_trainer

from lightning_easgd import EASGDModelParallelStrategy

pytestmark = [
    pytest.mark.timeout(120),
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
            for layer in (self.net.first, self.net.second):
                fully_shard(layer, mesh=mesh["data_parallel"], reshard_after_forward=self.reshards)
            fully_shard(self.net, mesh=mesh["data_parallel"], reshard_after_forward=self.reshards)


def whole(tensors):
    return [getattr(t, "full_tensor", lambda t=t: t)().detach().clone().numpy() for t in tensors]


def parts(tensors):
    return [getattr(t, "to_local", lambda t=t: t)().detach().clone().numpy() for t in tensors]


def close(left, right, tolerance=1e-12):
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


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (4, 1), (2, 2)], ids=["2 x FSDP2", "2 x TP", "FSDP2", "2D"])
@pytest.mark.parametrize("backend", [None, "gloo"])
def test_sharded_workers_are_those_of_the_reference(shape, backend):
    data, tensor = shape
    count = 4 // (data * tensor)
    workers, momenta, center = reference(count, data)

    def train():
        end, module = fit(shape, {"process_group_backend": backend})
        return end.worker, end.momentum, end.center, module, end.elements

    results = run_ranks(train, 4)
    for rank, (worker, momentum, own_center, module, elements) in enumerate(results):
        assert close(worker, workers[rank // (data * tensor)])
        assert close(momentum, momenta[rank // (data * tensor)])
        assert close(own_center, center)
        assert equal(module, own_center)
        assert equal(own_center, results[0][2])
        assert elements[0] == elements[1]
    assert sum(elements[0] for *_, elements in results) == 21 * count
