"""On a GPU: the elastic exchange against the memory's bandwidth, and what a step of ResNet-50 costs.

    python examples/benchmarks/run.py gpu

    bandwidth  GB/s of an exchange x <- x - a(x - c), c <- c + a(x - c) of ResNet-50's tensors and of one flat tensor,
               which moves at least 16 bytes for each parameter (both are read and written), against a copy of as much
    step_cost  seconds of a training step of ResNet-50, bf16-mixed: one rank, and two ranks that share the GPU and talk
               over gloo (NCCL admits one rank for each GPU); the columns are those of the benchmark step_cost, and
               peak_MB is the GPU's memory

Without a GPU it says so and ends. --device cpu tries the code with a small network; its numbers mean nothing.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else asking whether there is a GPU would start CUDA here, and the ranks are forks of this process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from harness.command import add_options, collect_turns, parser
from harness.figures import Panel, draw_bars
from harness.methods import LOCAL, Method
from harness.ranks import Place, Send, run_ranks
from harness.ratios import Row, every_turn, median_and_range, ratios
from harness.results import print_table, write_results
from harness.turns import Turns
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.lab.models import ResNet18, ResNet50, SmallImageStem
from lightning_easgd.method.elastic import elastic_exchange_

COPIED, EXCHANGED = 8, 16  # bytes of a parameter that a copy and an exchange move at least


class _Classifier(L.LightningModule):
    """Trains on one batch that is made once on the device, so that no loader is in the measurement."""

    def __init__(self, network: nn.Module, batch_size: int, pixels: int, steps: int) -> None:
        super().__init__()
        self.network, self.steps = network, steps
        self.register_buffer("images", torch.randn(batch_size, 3, pixels, pixels), persistent=False)
        self.register_buffer("labels", torch.randint(10, (batch_size,)), persistent=False)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(self.images), self.labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def train_dataloader(self) -> list[int]:
        return [0] * self.steps


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only tries the code")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--tau", type=int, default=10)
    options.add_argument("--steps", type=int, default=30, help="counted steps of a turn, at least (%(default)s)")
    add_options(options, "gpu", rounds=3, timeout=600.0)
    return options.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print the tables, and write the results directory."""
    options = _options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu: this machine has no CUDA device (or torch was built without CUDA); nothing was measured")
        return
    bandwidths: list[Row] = []
    run_ranks(_measure_bandwidth, _places(1), options, timeout=options.timeout, receive=bandwidths.extend)
    rows, rounds, panels = [], [], []
    for ranks in (1, 2):
        turns = collect_turns(
            _places(ranks),
            Turns(
                partial(_model, options),
                _methods(options.tau),
                options.rounds,
                options.steps,
                options.steps,
                trainer=_trainer(options.device),
            ),
            title=f"{ranks} ranks",
            timeout=options.timeout,
        )
        lines = ratios({"ranks": ranks}, turns)
        panels.append(Panel(f"{ranks} rank{'s' * (ranks > 1)} on one device", lines))
        rows += lines
        rounds += every_turn({"ranks": ranks}, turns)
    write_results(options.output, {"bandwidth": bandwidths, "step_cost": rows, "rounds": rounds}, vars(options))
    print_table(bandwidths)
    print_table(rows)
    draw_bars(options.output / "figure.png", panels, title="Step cost of ResNet-50, bf16")


def _places(ranks: int) -> list[Place]:
    """Each rank is a node of its own, all with the same device: Lightning gives every rank of a node another."""
    return [Place(rank, 0, 1, "127.0.0.1", None, lambda: None) for rank in range(ranks)]


def _trainer(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"precision": "bf16-mixed"}
    return {"accelerator": "gpu", "devices": [0], "precision": "bf16-mixed"}


def _network(device: str) -> nn.Module:
    return ResNet50() if device == "cuda" else ResNet18(SmallImageStem(), num_classes=10)


def _model(options: argparse.Namespace, steps: int) -> L.LightningModule:
    pixels = 224 if options.device == "cuda" else 16
    return _Classifier(_network(options.device), options.batch_size, pixels, steps)


def _methods(tau: int) -> list[Method]:
    gloo: dict[str, Any] = {"process_group_backend": "gloo"}
    return [
        Method(LOCAL, None, partial(LocalStrategy, **gloo)),
        Method("local again", None, partial(LocalStrategy, **gloo)),
        Method("easgd", tau, partial(EASGDStrategy, tau=tau, **gloo)),
        Method("easgd center on cpu", tau, partial(EASGDStrategy, tau=tau, center_device="cpu", **gloo)),
        Method("easgd_async", tau, partial(EASGDStrategy, tau=tau, mode="async", **gloo)),
        Method("ddp", None, partial(DDPStrategy, **gloo), every_step=True),
    ]


def _measure_bandwidth(rank: int, place: Place, send: Send, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    workers = [parameter.detach() for parameter in _network(options.device).to(device).parameters()]
    centers = [torch.zeros_like(parameter) for parameter in workers]
    elements = sum(parameter.numel() for parameter in workers)
    flat, other = torch.ones(elements, device=device), torch.zeros(elements, device=device)
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (COPIED, lambda: other.copy_(flat)),
        "exchange, one flat tensor": (EXCHANGED, lambda: elastic_exchange_([flat], [other], 0.1)),
        f"exchange, {len(workers)} tensors": (EXCHANGED, lambda: elastic_exchange_(workers, centers, 0.1)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, options.rounds):  # the first round warms up
        for name, (moved, action) in ways.items():
            rate = moved * elements / _seconds(action, device) / 1e9
            if number >= 0:
                rates[name].append(rate)
    rows = []
    for name, values in rates.items():
        middle, low, high = median_and_range(rate / copy for rate, copy in zip(values, rates["copy"], strict=True))
        cells = {"GB_per_s": median_and_range(values)[0], "of_copy": middle, "of_copy_min": low, "of_copy_max": high}
        rows.append({"way": name, "parameters": elements, **{key: round(cell, 3) for key, cell in cells.items()}})
    send(rows)


def _seconds(action: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Seconds of one of several calls in a row; the last has ended when the clock stops."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            action()
        return (time.perf_counter() - started) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(repeats):
        action()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


if __name__ == "__main__":
    main()
