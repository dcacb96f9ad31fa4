"""What a step costs where a worker is several ranks: elastic averaging between workers against none.

    python examples/benchmarks/run.py worker_groups --parameters 1000000 --rounds 5

Four ranks are two workers of two. They see two nodes, between which go direct connections, over the loopback; or one
(``--nodes 1``), on which workers share memory. The ranks of a worker share memory on both. "DDP inside" and "FSDP2
inside" are Lightning's own strategies on the ranks of each worker, without the broadcast that Lightning makes before
every batch, and nothing between the workers; what elastic averaging adds to each is the ratio of the same round. All
take turns in the same processes, as in step_cost.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import lightning as L
import torch.distributed as dist
from harness.command import add_options, collect_turns, parser
from harness.methods import Method
from harness.model import Model, Task
from harness.ranks import Place, one_host
from harness.ratios import every_turn, ratios
from harness.results import print_table, write_results
from harness.turns import Turns
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_easgd import EASGDModelParallelStrategy, EASGDStrategy
from lightning_easgd.strategies.sharded_workers import inside

RANKS, SIZE = 4, 2
PLACES = {
    1: one_host(RANKS),
    2: [Place(rank // SIZE, rank % SIZE, SIZE, "127.0.0.1", None, lambda: None) for rank in range(RANKS)],
}


class DDPInside(DDPStrategy):
    """DDP on the ranks of each worker, and nothing between the workers."""

    def setup(self, trainer: L.Trainer) -> None:
        """Set up as DDP does, with the worker's group."""
        _run_freely(trainer)
        self._ddp_kwargs["process_group"], _ = dist.new_subgroups(SIZE)
        super().setup(trainer)


class FSDPInside(ModelParallelStrategy):
    """FSDP2 on the ranks of each worker, and nothing between the workers."""

    def setup_environment(self) -> None:
        """Set up the ranks, and the mesh of each worker."""
        self._setup_distributed()
        names = ("workers", "data_parallel", "tensor_parallel")
        mesh = init_device_mesh(self.root_device.type, (RANKS // SIZE, SIZE, 1), mesh_dim_names=names)
        self._device_mesh = inside(mesh)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def setup(self, trainer: L.Trainer) -> None:
        """Set up as it does."""
        _run_freely(trainer)
        super().setup(trainer)


class Sharded(Model):
    """The perceptron of step_cost, sharded where there is a mesh."""

    def configure_model(self) -> None:
        """Shard the layers."""
        if self.device_mesh is None or isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def _run_freely(trainer: L.Trainer) -> None:
    loop: Any = trainer.fit_loop.epoch_loop
    if hasattr(loop, "_broadcast_sigterm_tensor"):
        loop._broadcast_sigterm_tensor = lambda: None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the table, and write the results directory."""
    options = _options(arguments)
    rows, rounds = [], []
    for nodes, parameters in product(options.nodes, options.parameters):
        task = Task(parameters, batch_size=options.batch_size)
        setting = {"ranks": RANKS, "nodes": nodes, "batch_size": options.batch_size, "parameters": parameters}
        for plain, averaged in (
            (DDPInside, partial(EASGDStrategy, devices_per_worker=SIZE)),
            (FSDPInside, partial(EASGDModelParallelStrategy, SIZE)),
        ):
            methods = [
                Method(plain.__name__, None, plain),
                Method(f"easgd on {plain.__name__}", options.tau, partial(averaged, tau=options.tau)),
            ]
            turns = collect_turns(
                PLACES[nodes],
                Turns(partial(Sharded, task), methods, options.rounds, options.steps, options.steps, count_bytes=False),
                title=f"{parameters:>10} on {nodes}",
                timeout=options.timeout,
            )
            rows += ratios(setting, turns, reference=methods[0].label)
            rounds += every_turn(setting, turns)
            # Written after every setting: what is measured is not lost.
            write_results(options.output, {"worker_groups": rows, "rounds": rounds}, vars(options))
    print_table(rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--nodes", type=int, nargs="+", choices=list(PLACES), default=[2], help="as the ranks see it")
    options.add_argument("--parameters", type=int, nargs="+", default=[1_000_000])
    options.add_argument("--batch-size", type=int, default=128, help="of a rank; 128 is the EASGD paper's")
    options.add_argument("--tau", type=int, default=10)
    options.add_argument("--steps", type=int, default=100, help="counted steps of a turn (%(default)s)")
    add_options(options, "worker_groups", rounds=5)
    return options.parse_args(arguments)


if __name__ == "__main__":
    main()
