"""A worker of a job on preemptible nodes: it may be killed, frozen, started again or come late, and the others go on.

Start the lighthouse once, and this script for each worker, on any node, with a number of its own:

    torchft_lighthouse --min_replicas 1 --join_timeout_ms 10000
    TORCHFT_LIGHTHOUSE=http://localhost:29510 REPLICA_GROUP_ID=0 python examples/preemptible.py
    TORCHFT_LIGHTHOUSE=http://localhost:29510 REPLICA_GROUP_ID=1 python examples/preemptible.py

Then kill one of them (kill -9), and start it again with the number that it had. When all of them have died, all go on
from the last checkpoint, as many as there are then.
"""

import sys

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from quickstart import Digits, loaders

from lightning_easgd import EASGDStrategy, FaultTolerance
from lightning_easgd.callbacks import ElasticMonitor


def main(folder: str = "outputs/preemptible", epochs: int = 200) -> None:
    """Train one worker.

    Args:
        folder: Where the checkpoints go; all workers have the same.
        epochs: How many there are, of the job: a worker that comes late has those that are left.
    """
    strategy = EASGDStrategy(tau=10, fault_tolerance=FaultTolerance(group_size=4))
    L.seed_everything(0, verbose=False)
    model = Digits()
    trainer = L.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        check_val_every_n_epoch=10,
        callbacks=[ElasticMonitor(), ModelCheckpoint(folder, save_last=True)],
    )
    trainer.fit(model, *loaders(), ckpt_path="last")
    print(f"worker {strategy.replica_id}: accuracy at the center {trainer.callback_metrics['val/accuracy']:.1%}")
    print(f"workers in the last exchange: {len(strategy.elastic.membership.living)}")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
