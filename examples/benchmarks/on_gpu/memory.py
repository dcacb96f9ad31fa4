"""Memory of the device beside that of local training, against what docs/limits.md says it is."""

import argparse
import gc
from collections.abc import Iterable
from functools import partial
from typing import Any

import lightning as L
import torch
from harness.counters import PeakMemory
from harness.methods import LOCAL, Method
from harness.ranks import Place, Send
from harness.ratios import Row
from lightning.pytorch.callbacks import Callback

from lightning_easgd.averagers.sync.all_reduced_sum import BUCKET_BYTES
from lightning_easgd.method.compression import BFloat16Codec, Int8Codec
from on_gpu.training import Setting, fit, methods, model

__all__ = ["measure_memory", "memory_table"]

_COUNTED = "easgd", "easgd bfloat16", "easgd int8", "easgd center on cpu", "easgd_async"


def measure_memory(rank: int, place: Place, send: Send, setting: Setting, options: argparse.Namespace) -> None:
    """Rank 0 sends for each method its name and bytes: of the parameters, at the peak, and after the last step."""
    known = methods(options.tau, setting.backend)
    # Small images: at the peak the activations must not hide what an exchange allocates for a moment.
    module = partial(model, setting.device, 4, 64 if setting.device == "cuda" else 16)
    # Local training twice, as what a library allocates once is in the first; the second counts.
    for name in (LOCAL, LOCAL, *_COUNTED):
        watch = _MemoryWatch(known[name])
        fit(setting, place, known[name], module, watch)
        if rank == 0:
            send((name, watch.parameters, watch.peak, watch.resident))


def memory_table(columns: dict[str, Any], measured: Iterable[tuple[str, int, float, float]], tau: int) -> list[Row]:
    """Rows in words of float32 for each parameter, beyond local training; the formula's value beside them."""
    found = {name: values for name, *values in measured}
    rows = []
    for name, (parameters, peak, resident) in found.items():
        base = found.get(LOCAL, [parameters, float("nan"), float("nan")])
        word = 4.0 * parameters
        rows.append(
            {
                **columns,
                "method": name,
                "parameters": parameters,
                "formula_words": _formula(name, columns["ranks"], parameters, tau),
                "peak_words": round((peak - base[1]) / word, 3),
                "resident_words": round((resident - base[2]) / word, 3),
                "peak_MB": round(peak / 1e6, 1),
                "resident_MB": round(resident / 1e6, 1),
            }
        )
    return rows


def _formula(name: str, ranks: int, parameters: int, tau: int) -> float:
    """What docs/limits.md says of a method's device memory, in words of float32 for each parameter."""
    if name == "easgd":  # center, wire, and one bucket of the all-reduce
        return round(2 + 1 / max(1, min(tau, 4 * parameters // BUCKET_BYTES)), 3)
    if name == "easgd_async":
        return 1.0
    codec = {"easgd bfloat16": BFloat16Codec, "easgd int8": Int8Codec}.get(name)
    if codec is None:
        return 0.0
    encoded = codec().nbytes(parameters) / (4 * parameters)
    # Center, wire, residual; messages of all that go out and of all that come in, and the one to all.
    return round(3 + 2 * encoded + encoded / ranks, 3)


class _MemoryWatch(Callback):
    """Bytes beyond what the rank had before it made the model; the peak is that of two periods after the first."""

    def __init__(self, method: Method) -> None:
        self._skip, count = method.window(2 * (method.tau or 10), warm_up=11)
        self.steps = self._skip + count
        gc.collect()
        self._on_gpu = torch.cuda.is_initialized()
        self._host = PeakMemory()
        if self._on_gpu:
            torch.cuda.synchronize()
        self._before = torch.cuda.memory_allocated() if self._on_gpu else 0

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        """Begin to look for the peak."""
        self._on_gpu = torch.cuda.is_initialized()
        if index == self._skip and self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Read both."""
        if index != self.steps - 1:
            return
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        if self._on_gpu:
            torch.cuda.synchronize()
            self.peak = float(torch.cuda.max_memory_allocated() - self._before)
            self.resident = float(torch.cuda.memory_allocated() - self._before)
        else:
            self.peak, self.resident = self._host.bytes(), float("nan")
