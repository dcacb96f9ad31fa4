"""Methods take turns in the same ranks, round after round; what each turn costs."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from harness.counters import PeakMemory, bytes_sent
from harness.methods import Method
from harness.ranks import Place, Send
from lightning_easgd import EASGDStrategy

__all__ = ["Turn", "Turns", "quiet_trainer", "take_turns"]

_QUIET = 0.2  # seconds, longer than the round trips that are measured
_LOOKS = 300
_SIGNS_OF_LIFE = 4096  # bytes that services send meanwhile


@dataclass(frozen=True)
class Turn:
    """What one turn of a method has cost; the lists have a value for each rank.

    Attributes:
        method: Its label.
        round: Number of the round.
        seconds: Wall-clock per step.
        cpu_seconds: Processor time per step, all threads of the rank.
        bytes_per_step: Bytes sent per step over TCP; counted in the first round, else nan.
        peak_bytes: Most memory beyond what the rank had before it built the model; on a GPU that of its tensors there.
    """

    method: str
    round: int
    seconds: list[float]
    cpu_seconds: list[float]
    bytes_per_step: list[float]
    peak_bytes: list[float]


@dataclass(frozen=True)
class Turns:
    """Who takes turns.

    Attributes:
        model: Makes what they train, for a number of steps.
        methods: The methods.
        rounds: How often each of them gets a turn.
        steps: Counted steps of a turn, at least.
        blocking_steps: The same for methods whose ranks wait for each other at every step.
        warm_up: Steps before the counted ones, for methods without a period.
        count_bytes: Whether to count what they send, in a fit of its own.
        trainer: Arguments of the Trainer.
        limit: Seconds after which no further round is begun that would not fit; the first is always made.
    """

    model: Callable[[int], L.LightningModule]
    methods: Sequence[Method]
    rounds: int
    steps: int
    blocking_steps: int
    warm_up: int = 3
    count_bytes: bool = True
    trainer: Mapping[str, Any] = field(default_factory=dict)
    limit: float = float("inf")


def take_turns(rank: int, place: Place, send: Send, turns: Turns) -> None:
    """Be one rank; rank 0 sends every :class:`Turn`. Another method begins in every round."""
    started = time.monotonic()
    round_takes = 0.0
    for number in range(turns.rounds):
        if number and not _fits(time.monotonic() - started + round_takes, turns.limit):
            break
        first = number % len(turns.methods)
        for place_in_round, method in enumerate((*turns.methods[first:], *turns.methods[:first])):
            if place_in_round == 1:  # the very first turn also starts the device
                second_began = time.monotonic()
            sent = _bytes_per_step(method, turns, place) if turns.count_bytes and number == 0 else float("nan")
            watch = _Stopwatch(
                *method.window(turns.blocking_steps if method.every_step else turns.steps, turns.warm_up)
            )
            _fit(method, turns, watch.skip + watch.count, place, watch)
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, [watch.wall, watch.cpu, sent, watch.peak])
            if rank == 0:
                send(Turn(method.label, number, *(list(column) for column in zip(*every, strict=True))))
        others = len(turns.methods) - 1
        round_takes = (time.monotonic() - second_began) * (others + 1) / others if others else 0.0


def _fits(seconds: float, limit: float) -> bool:
    """Whether so many seconds are within the limit: all ranks say the same, by the slowest."""
    if limit == float("inf"):
        return True
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, seconds)
    return bool(max(every) <= limit)


def quiet_trainer(place: Place, **arguments: Any) -> L.Trainer:
    """A Trainer on CPU for one rank, without bars, logs and checkpoints."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": place.local_size,
        "num_nodes": int(os.environ["WORLD_SIZE"]) // place.local_size,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(defaults | arguments))


def _fit(method: Method, turns: Turns, steps: int, place: Place, watching: Callback) -> None:
    callbacks = [*method.callbacks(place), watching]  # the last sees what the others have sent
    quiet_trainer(place, strategy=method.strategy(), callbacks=callbacks, **turns.trainer).fit(turns.model(steps))


def _bytes_per_step(method: Method, turns: Turns, place: Place) -> float:
    """Bytes that this rank sends per step, counted over its second period in a short fit of its own.

    In the first one connections are opened, and a rounded exchange with a served center goes as it is.
    """
    count = method.tau or 2
    counter = _ByteCounter(first=1 + method.tau if method.tau else 3, count=count)
    _fit(method, turns, counter.first + count, place, counter)
    return counter.sent / count


class _ByteCounter(Callback):
    """Counts from the start of step ``first`` for ``count`` steps, when nothing is under way."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Read the kernel's counts."""
        if index == self.first - 1:
            self._before = self._now(trainer)
        elif index == self.first + self.count - 1:
            self.sent = self._now(trainer) - self._before

    def _now(self, trainer: L.Trainer) -> float:
        strategy = trainer.strategy
        if isinstance(strategy, EASGDStrategy) and strategy.mode == "sync":
            _ = strategy.center  # waits for the exchange under way
        self._wait_for_quiet()
        dist.barrier()
        count = bytes_sent()
        dist.barrier()
        return count

    def _wait_for_quiet(self) -> None:
        """Return when next to nothing has been sent for a while: what a thread exchanges may be under way, too."""
        before = bytes_sent()
        for _ in range(_LOOKS):
            time.sleep(_QUIET)
            now = bytes_sent()
            if now - before <= _SIGNS_OF_LIFE or math.isnan(now):
                return
            before = now


class _Stopwatch(Callback):
    """Seconds per step of the counted steps, wall-clock and processor time, and the most memory until then."""

    def __init__(self, skip: int, count: int) -> None:
        self.skip, self.count = skip, count
        self._memory = PeakMemory()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        """Start together when the first steps are over."""
        if index == self.skip:
            _synchronize()
            dist.barrier()
            self._started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Stop."""
        if index == self.skip + self.count - 1:
            _synchronize()
            self.wall = (time.perf_counter() - self._started[0]) / self.count
            self.cpu = (time.process_time() - self._started[1]) / self.count
            self.peak = _gpu_peak() if torch.cuda.is_initialized() else self._memory.bytes()


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _gpu_peak() -> float:
    """Most GPU memory of this rank's tensors since the last call."""
    peak = float(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak
