"""What a strategy takes of a GPU's memory beside the training that it holds together."""

import gc
from functools import partial

import lightning as L
import pytest
import torch
from devices import fit, shared
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader

from lightning_easgd import DownpourStrategy, EASGDStrategy, LocalStrategy

PARTS, SIZE = 10, 2**20  # 10 parameters of 4 MiB
COPY = PARTS * SIZE * 4


class Large(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.x = nn.ParameterList([torch.zeros(SIZE) for _ in range(PARTS)])

    def training_step(self, batch, index):
        return sum((x - 1).square().mean() for x in self.x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(torch.zeros(24), batch_size=1)


# Copies of the parameters that stay, and at most, with what a step takes for a moment: the center, the wire, and of the
# first of τ buckets a copy; with a center on the host the pull's difference; of a served center the wire.
CASES = {
    "sync": (partial(EASGDStrategy, tau=10), 2.0, 2.2),
    "eamsgd": (partial(EASGDStrategy, tau=10, momentum=0.9), 2.0, 2.2),
    "center on the CPU": (partial(EASGDStrategy, tau=10, center_device="cpu"), 0.0, 1.1),
    "async": (partial(EASGDStrategy, tau=10, mode="async"), 1.0, 1.1),
    "downpour": (partial(DownpourStrategy, tau=10), 2.0, 2.1),
}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", CASES)
def test_peak_memory(case):
    make, least, most = CASES[case]

    class Held(L.Callback):
        """What is allocated between two steps; not at the end, when each rank shows the center."""

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 12:  # an exchange has been made
                self.allocated = torch.cuda.memory_allocated()
            if trainer.global_step == 22:
                self.peak = torch.cuda.max_memory_allocated()

    def measure(make_strategy):
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        held = Held()
        fit(Large(), shared(make_strategy, ranks=1), callbacks=[held], limit_val_batches=0)
        return held.allocated - before, held.peak - before

    def run():
        measure(LocalStrategy)  # cuBLAS and others allocate once
        local, ours = measure(LocalStrategy), measure(make)
        return (ours[0] - local[0]) / COPY, (ours[1] - local[1]) / COPY

    ((allocated, peak),) = run_ranks(run, 1, timeout=120)
    assert least - 0.02 <= allocated <= most + 0.02
    assert peak <= most + 0.02
