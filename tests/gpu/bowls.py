"""½‖x - b_i‖² under a Trainer, and the rows that the ranks leave, to compare with the recursions."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from devices import fit
from ranks import run_ranks
from recursions import SIZE, minima
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader

SGD = partial(torch.optim.SGD, lr=0.1)


class Bowls(L.LightningModule):
    """Keeps (x_i, x̃) after each optimizer step, as float64.

    Args:
        steps: Batches.
        optimizer: Makes an optimizer of parameter groups.
        lrs: Learning rates of two groups; None for one group.
        by_hand: Two optimizers, of which the second steps after every other batch.
        reads: "center": x̃ after each step, which waits for the exchange under way. "in turn": likewise, when all
            ranks have made their step. "worker": x_i alone, so that exchanges stay under way; x̃ only at the end.
        overflow: (rank, step) of a loss that is infinite.
    """

    def __init__(self, steps=9, optimizer=SGD, lrs=None, by_hand=False, reads="center", overflow=None) -> None:
        super().__init__()
        self.x = nn.ParameterList([torch.ones(2), torch.ones(SIZE - 2, 1)])
        self.steps, self.optimizer, self.lrs, self.reads, self.overflow = steps, optimizer, lrs, reads, overflow
        self.automatic_optimization = not by_hand
        self.trace: list[list[np.ndarray]] = []
        self.seen = 0

    def minimum(self) -> Tensor:
        """b_i of this rank's data."""
        return torch.from_numpy(minima(4)[self.trainer.distributed_sampler_kwargs["rank"]])

    def loss(self, parts: Any) -> Tensor:
        pairs = zip(self.x, torch.split(self.minimum().to(self.x[0]), [2, SIZE - 2]), strict=True)
        terms = [0.5 * (x - part.view_as(x)).square().sum() for x, part in pairs]
        return sum(terms[number] for number in parts)

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        if self.automatic_optimization:
            loss = self.loss([0, 1])
            return loss * float("inf") if (self.trainer.global_rank, index) == self.overflow else loss
        for number, optimizer in enumerate(self.optimizers()):
            if (index + 1) % (number + 1) == 0:
                optimizer.zero_grad()
                self.manual_backward(self.loss([number]))
                optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        if not self.automatic_optimization:
            return [self.optimizer([x]) for x in self.x]
        if self.lrs is None:
            return self.optimizer(self.parameters())
        return self.optimizer([{"params": [x], "lr": lr} for x, lr in zip(self.x, self.lrs, strict=True)])

    def train_dataloader(self) -> DataLoader[Any]:
        replicas = self.trainer.distributed_sampler_kwargs["num_replicas"]
        return DataLoader(torch.zeros(self.steps * replicas), batch_size=1)

    def position(self) -> np.ndarray:
        """x, which with Nesterov momentum is y + ηδb."""
        parts = []
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                for y in group["params"]:
                    buffer = optimizer.state[y].get("momentum_buffer")
                    ahead = buffer is not None and group["nesterov"]
                    x = y.detach() + group["lr"] * group["momentum"] * buffer if ahead else y
                    parts.append(x)
        return flat(parts)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.automatic_optimization and self.trainer.global_step == self.seen:
            return  # only accumulated
        self.seen = self.trainer.global_step
        strategy = self.trainer.strategy
        if self.reads == "worker":
            self.trace.append([self.position()])
            return
        if self.reads == "in turn":
            strategy.barrier()
        self.trace.append([self.position(), flat(strategy.center.values())])
        if self.reads == "in turn":
            strategy.barrier()


class Columns(nn.Module):
    """Weights of one column each, which are x: layers as the plans of tensor parallelism know them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, size, bias=False) for size in sizes])
        for layer in self.layers:
            nn.init.ones_(layer.weight)

    def forward(self, b: Tensor) -> Tensor:
        parts = torch.split(b, [layer.out_features for layer in self.layers])
        columns = [layer(b.new_ones(1, 1))[0] for layer in self.layers]
        return sum(0.5 * (x - part).square().sum() for x, part in zip(columns, parts, strict=True))


class ShardedBowls(Bowls):
    """The same where x can be in shards, and is under ``EASGDModelParallelStrategy``.

    Args:
        steps: Batches.
        sizes: Rows of the two weights: over two ranks a shard of one row is empty on the second.
        arguments: As for ``Bowls``.
    """

    def __init__(self, steps=9, sizes=(2, SIZE - 2), **arguments) -> None:
        super().__init__(steps, **arguments)
        self.x = Columns(sizes)

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None:
            return
        data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
        if tensor.size() > 1:
            plan = {f"layers.{number}": ColwiseParallel(output_layouts=Replicate()) for number in range(2)}
            parallelize_module(self.x, tensor, plan)
        if data.size() > 1 or tensor.size() == 1:
            for part in (self.x.layers[0], self.x):  # the root holds the second layer
                fully_shard(part, mesh=data)
                if dist.get_backend(data.get_group()) == "gloo":  # of some torch it adds up for a mean: pytorch#162338
                    part.set_force_sum_reduction_for_comms(True)
        assert all(isinstance(x, DTensor) for x in self.parameters())

    def loss(self, parts: Any) -> Tensor:
        return self.x(self.minimum().to(self.device, torch.float32))


def flat(tensors: Any) -> np.ndarray:
    """All elements in a row; the ranks of a worker whose shards they are call it together."""
    wholes = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return torch.cat([whole.detach().double().cpu().flatten() for whole in wholes]).numpy()


def leave_rows(make_module: Any, make_strategy: Any, trainer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """On a rank: what each step left, and the module after fit."""
    module = fit(make_module(), make_strategy(), **trainer)
    return np.array(module.trace), flat(module.parameters())


def rows(make_module: Any, make_strategy: Any, ranks: int = 2, **trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    """(x_1, …, x_p, x̃) after each step, without x̃ where it is not read, and the module's end; x̃ the same on all."""
    results = run_ranks(leave_rows, ranks, make_module, make_strategy, trainer, timeout=120)
    traces, ends = (np.stack(each) for each in zip(*results, strict=True))
    assert (ends == ends[0]).all(), "the model is bitwise the same on all ranks"
    assert (traces[:, :, 1:] == traces[:1, :, 1:]).all(), "and so is the center all along"
    return np.concatenate([traces[:, :, 0].swapaxes(0, 1), traces[0, :, 1:]], axis=1), ends[0]
