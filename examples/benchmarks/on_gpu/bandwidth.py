"""The elastic exchange against the bandwidth of the device's memory: a copy of as many parameters.

Two shares of the copy's bandwidth are told apart: by the bytes that the passes of the code move ("of_copy": how good
each pass is), and by those that the operation has to move at least ("least_of_copy": what needless passes cost, too).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness.ranks import Place, Send
from harness.ratios import Row, median_and_range
from torch import Tensor, nn

from lightning_easgd.averagers import Channel, ExchangeLine, SynchronousAverager, Transfer, all_reduced_sums
from lightning_easgd.method.elastic import elastic_difference, elastic_pull_, elastic_push_
from lightning_easgd.method.position import ParameterPosition
from lightning_easgd.method.rates import MovingRates
from lightning_easgd.tensors.flat_tensors import FlatTensors
from on_gpu.training import Setting, network

__all__ = ["measure_bandwidth"]

_WORD = 4  # bytes of a float32


@dataclass(frozen=True)
class _Way:
    """An operation, with the words of each parameter that its passes read and write, and that it has to at least."""

    moved: float
    least: float
    action: Callable[[], object]


class _Done(Transfer):
    def wait(self) -> None:
        pass


class _Alone(Channel):
    """A worker that is alone adds up nothing: what remains of an exchange is the package's own work."""

    rank, size = 0, 1

    def sum(self, buffer: Tensor) -> Transfer:
        return _Done()


def measure_bandwidth(rank: int, place: Place, send: Send, setting: Setting, options: argparse.Namespace) -> None:
    """Send a row for each way to move the parameters of the network."""
    device = torch.device(options.device)
    module = network(options.device).to(device)
    parameters = list(module.parameters())
    elements = sum(parameter.numel() for parameter in parameters)
    ways = _ways(module, parameters, elements, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    repeats = 20 if device.type == "cuda" else 2
    for number in range(-1, options.rounds):  # the first round warms up
        for name, way in ways.items():
            took = _seconds(way.action, device, repeats)
            if number >= 0:
                seconds[name].append(took)
    send([_row(name, ways, seconds, elements) for name in ways])


def _ways(module: nn.Module, parameters: list[nn.Parameter], elements: int, device: torch.device) -> dict[str, _Way]:
    workers = [parameter.detach() for parameter in parameters]
    centers = [torch.zeros_like(worker) for worker in workers]
    flat, other = torch.ones(elements, device=device), torch.zeros(elements, device=device)
    center, wire = (FlatTensors([workers], torch.float32) for _ in range(2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    position = ParameterPosition(optimizer)
    averager = SynchronousAverager(
        optimizer,
        ExchangeLine(_Alone()),
        all_reduced_sums(_Alone, 1),
        number=0,
        tau=1,
        rates=MovingRates(beta=0.5),
    )
    averager.clock = 1  # the step 0 makes no exchange

    def difference() -> None:  # as SynchronousAverager takes it, without a look at whether it is finite
        position.write(wire, workers)
        wire.flat.sub_(center.flat)
        for segment in wire.segments:
            torch.linalg.vector_norm(segment)

    def whole(worker: list[Tensor], replica: list[Tensor]) -> None:
        differences = elastic_difference(worker, replica)
        elastic_pull_(worker, differences, 0.1)
        elastic_push_(replica, differences, 0.1)

    def exchange() -> None:
        averager.begin()
        averager.finish()

    number = len(workers)
    return {
        "copy": _Way(2, 2, lambda: other.copy_(flat)),
        # Its difference is a tensor of its own: three passes of two words read and one written.
        "difference, pull and push, one flat tensor": _Way(9, 4, lambda: whole([flat], [other])),
        f"difference, pull and push, {number} tensors": _Way(9, 4, lambda: whole(workers, centers)),
        # x into the wire, minus the center, and the norm of it.
        "sync: take the difference": _Way(2 + 3 + 1, 3, difference),
        "sync: pull the worker": _Way(3, 3, lambda: elastic_pull_(workers, wire.groups[0], 0.1)),
        "sync: push the center": _Way(3, 3, lambda: elastic_push_([center.flat], [wire.flat], 0.1)),
        # With the copy that the sum keeps of its first bucket: the whole wire at tau = 1. Its host looks at the norm.
        "sync: begin and finish": _Way(6 + 2 + 3 + 3, 3 + 3 + 3, exchange),
    }


def _row(name: str, ways: dict[str, _Way], seconds: dict[str, list[float]], elements: int) -> Row:
    way, copy = ways[name], ways["copy"]
    faster = [base / own for own, base in zip(seconds[name], seconds["copy"], strict=True)]
    middle, low, high = median_and_range(ratio * way.moved / copy.moved for ratio in faster)
    least, _, _ = median_and_range(ratio * way.least / copy.moved for ratio in faster)
    took, _, _ = median_and_range(seconds[name])
    return {
        "way": name,
        "parameters": elements,
        "microseconds": round(1e6 * took, 1),
        "bytes_moved": _WORD * way.moved,
        "bytes_least": _WORD * way.least,
        "GB_per_s": round(_WORD * way.moved * elements / took / 1e9, 1),
        "of_copy": round(middle, 3),
        "of_copy_min": round(low, 3),
        "of_copy_max": round(high, 3),
        "least_of_copy": round(least, 3),
    }


def _seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
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
