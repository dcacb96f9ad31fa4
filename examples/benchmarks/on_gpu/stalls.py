"""Where the host waits for the device: blocking calls in a profile, in steps with an exchange and in others."""

import argparse
import json
import statistics
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from harness.methods import LOCAL
from harness.ranks import Place, Send
from harness.ratios import Row
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile, record_function

from lightning_easgd import EASGDStrategy
from on_gpu.training import Setting, fit, methods, model

__all__ = ["calls_of_steps", "measure_stalls"]

_PERIODS = 3
_MARK = "step of the benchmark "
_WARNED = "synchronizing call (torch's sync debug mode)"
_WAITED = "waited over 0.1 ms (strategy.communication)"  # also for what is no call of CUDA: gloo, a served center
# The host waits in all but the last row, whose calls give and take memory, which may wait.
_BLOCKING = frozenset(
    {
        *(f"cuda{name}Synchronize" for name in ("Stream", "Event", "Device")),
        *("cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cudaMemcpy", "cuMemcpyDtoH_v2"),
        *("aten::item", "aten::_local_scalar_dense"),
        *("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost"),
    }
)
_CONTROL = "cudaLaunchKernel"  # not blocking: where none is counted the profile has no calls of CUDA

# (name, whether on the thread of the training loop): of each step the count and the milliseconds
_Calls = dict[tuple[str, bool], dict[int, tuple[int, float]]]


def measure_stalls(rank: int, place: Place, send: Send, setting: Setting, options: argparse.Namespace) -> None:
    """Rank 0 sends the rows of each method, when it has been measured."""
    known = methods(options.tau, setting.backend)
    module = partial(model, setting.device, 8, 32 if setting.device == "cuda" else 16, small=True)
    names = ["easgd"] if setting.ranks > 1 else ["easgd", "easgd center on cpu", "easgd_async"]
    local: Counter[tuple[str, bool]] = Counter()
    for name in (LOCAL, *names):
        method = known[name]
        watch = _Profiled(options.tau)
        fit(setting, place, method, module, watch)
        if name == LOCAL:
            local.update({key: sum(count for count, _ in steps.values()) for key, steps in watch.calls.items()})
        if rank == 0:
            send(_rows({**setting.columns, "method": method.label}, watch, options.tau, local))


def _rows(columns: dict[str, Any], watch: "_Profiled", tau: int, local: Counter[tuple[str, bool]]) -> list[Row]:
    """A row for each kind of call, and for each that local training has."""
    rows = []
    for key in sorted({*watch.calls, *local}):
        steps = watch.calls.get(key, {})
        # An exchange is begun in the steps whose number (from 0) tau divides.
        begun = [steps.get(index, (0, 0.0)) for index in watch.window if index % tau == 0]
        others = [steps.get(index, (0, 0.0)) for index in watch.window if index % tau]
        total = sum(count for count, _ in steps.values())
        name, is_main = key
        rows.append(
            {
                **columns,
                "call": name,
                "thread": "training" if is_main else "other",
                "total": total,
                "total_of_local": local[key],
                "in_step_with_exchange": round(_mean(count for count, _ in begun), 2),
                "in_step_without": round(_mean(count for count, _ in others), 2),
                "per_exchange": round((total - local[key]) / _PERIODS, 2),
                "ms_in_step_with_exchange": round(_mean(took for _, took in begun), 3),
                "ms_in_step_without": round(_mean(took for _, took in others), 3),
            }
        )
    return rows


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.fmean(values) if values else 0.0


class _Profiled(Callback):
    """Profiles whole periods, each step marked; counts torch's own warnings of synchronizing calls beside it."""

    def __init__(self, tau: int) -> None:
        # The same steps for all methods: those of the second period on.
        self.window = range(tau + 1, tau + 1 + _PERIODS * tau)
        self.steps = self.window.stop + 1  # the end of training synchronizes
        self.calls: _Calls = {}
        self._warned: dict[int, tuple[int, float]] = {}
        self._waited: dict[int, tuple[int, float]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        """Start with the first step of the window; mark each."""
        if index == self.window.start:
            self._cuda = torch.cuda.is_initialized()
            self._profile = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self._cuda])
            self._profile.start()
            if self._cuda:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("warn")
        if index in self.window:
            self._catching = warnings.catch_warnings(record=True)
            self._caught: Any = self._catching.__enter__()
            warnings.simplefilter("always")
            self._waited_before = _seconds_waited(trainer)
            self._mark = record_function(f"{_MARK}{index}")
            self._mark.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """End the mark; with the last step of the window the profile."""
        if index not in self.window:
            return
        self._mark.__exit__(None, None, None)
        self._catching.__exit__(None, None, None)
        waited = _seconds_waited(trainer) - self._waited_before
        self._waited[index] = int(waited > 1e-4), 1e3 * waited
        count = sum("synchronizing CUDA operation" in str(each.message) for each in self._caught)
        if count:
            self._warned[index] = count, 0.0
        if index == self.window.stop - 1:
            if self._cuda:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
            self._profile.stop()
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory, "trace.json")
                self._profile.export_chrome_trace(str(path))
                self.calls = calls_of_steps(
                    json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
                )
            if self._warned:
                self.calls[_WARNED, True] = self._warned
            if isinstance(trainer.strategy, EASGDStrategy):
                self.calls[_WAITED, True] = self._waited
            del self._profile


def _seconds_waited(trainer: L.Trainer) -> float:
    strategy = trainer.strategy
    return strategy.communication.seconds_waited if isinstance(strategy, EASGDStrategy) else 0.0


def calls_of_steps(trace: Any) -> _Calls:
    """Blocking calls of a Chrome trace by name and thread, in each of the steps that are marked in it.

    Copies from or to memory that is not pinned count as "copy ..." under the call that has started them.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marks = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(_MARK)]
    spans = [(e["ts"], e["ts"] + e["dur"], int(e["name"].removeprefix(_MARK)), e["tid"]) for e in marks]
    by_correlation = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    calls: _Calls = defaultdict(dict)

    def count(name: str, call: Any) -> None:
        for start, stop, step, thread in spans:
            if start <= call["ts"] < stop:
                key = name, call["tid"] == thread
                before, took = calls[key].get(step, (0, 0.0))
                calls[key][step] = before + 1, took + call["dur"] / 1e3
                return

    for event in events:
        name = event["name"]
        if name in _BLOCKING or name == _CONTROL:
            count(name, event)
        elif event.get("cat") == "gpu_memcpy" and "Pageable" in name:
            call = by_correlation.get(event.get("args", {}).get("correlation"))
            if call is not None:
                count(f"copy {name}", call)
    return dict(calls)
