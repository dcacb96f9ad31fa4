"""A transformer that is sharded inside of each node (FSDP2), and elastic averaging between the nodes.

On two nodes of two devices, here both on this machine::

    torchrun --nnodes=2 --nproc-per-node=2 --master-addr=127.0.0.1 --master-port=29500 --node-rank=0 \
        examples/sharded_transformer.py &
    torchrun --nnodes=2 --nproc-per-node=2 --master-addr=127.0.0.1 --master-port=29500 --node-rank=1 \
        examples/sharded_transformer.py

The network learns to write a sequence backwards. ``configure_model`` is what Lightning's documentation has for
``ModelParallelStrategy``; the strategy's name is the only line of it that belongs to this package.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader

from lightning_easgd import EASGDModelParallelStrategy

SYMBOLS, LENGTH, WIDTH = 8, 6, 48


class Transformer(nn.Module):
    """Two encoder layers between an embedding with positions and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.output = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        """The logits of each position's symbol."""
        hidden = self.symbols(symbols) + self.positions(torch.arange(LENGTH, device=symbols.device))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.output(hidden)


class Backwards(L.LightningModule):
    """Learns to write a sequence backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Transformer()

    def configure_model(self) -> None:
        """Shard each layer, and what is left, over the devices of this worker."""
        if isinstance(self.network, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.network.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.network, mesh=mesh)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """The loss of one batch."""
        return nn.functional.cross_entropy(self.network(batch).flatten(0, 1), batch.flip(1).flatten())

    def validation_step(self, batch: Tensor, index: int) -> None:
        """The share of right symbols; during ``fit`` the module holds the center here."""
        right = (self.network(batch).argmax(-1) == batch.flip(1)).float().mean()
        self.log("val/accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer of each worker."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train, then look at what training has left."""
    L.seed_everything(0, verbose=False)
    data = torch.randint(SYMBOLS, (4352, LENGTH), generator=torch.Generator().manual_seed(0))
    model = Backwards()
    strategy = EASGDModelParallelStrategy(tau=8)  # a worker is a node
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        num_nodes=2,
        devices=2,
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data[256:], batch_size=16, shuffle=True), DataLoader(data[:256], batch_size=64))

    held = sum(shard.to_local().numel() for shard in strategy.center.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    if trainer.is_global_zero:
        print(f"accuracy at the center of {strategy.workers} workers: {trainer.callback_metrics['val/accuracy']:.1%}")
        print(f"{strategy.communication.exchanges} exchanges in {trainer.global_step} steps")
        print(f"rank 0 holds {held} of the center's {total} elements")


if __name__ == "__main__":
    main()
