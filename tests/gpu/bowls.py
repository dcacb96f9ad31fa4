"""½‖x - b_i‖² under a Trainer, and the rows that the ranks leave, to compare with the recursions."""

from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from devices import fit
from ranks import run_ranks
from recursions import SIZE, minima
from torch import Tensor, nn
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

    def loss(self, parts: Any) -> Tensor:
        b = torch.from_numpy(minima(3)[self.trainer.global_rank]).to(self.x[0])
        pairs = zip(self.x, torch.split(b, [2, SIZE - 2]), strict=True)
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
        return DataLoader(torch.zeros(self.steps * self.trainer.world_size), batch_size=1)

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


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors]).numpy()


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
