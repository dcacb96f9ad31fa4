"""The methods that are compared, each as a strategy of the Lightning Trainer with the callbacks that it needs."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from harness.averaging_peers import AccelerateLocalSGD, FlatLocalSGD
from harness.ranks import Place
from harness.raw_socket import RawSocket
from harness.torchft_peers import TorchFTDiLoCo, TorchFTLocalSGD
from lightning_easgd import EASGDStrategy, LocalStrategy
from lightning_easgd.lab.baselines.post_local_sgd import PostLocalSGDStrategy

__all__ = ["LOCAL", "NAMES", "Method", "methods", "why_missing"]

LOCAL = "local"


class _HalfPrecisionDDP(DDPStrategy):
    """DDP whose gradients travel as float16; Lightning registers hooks on CUDA devices only."""

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(dist.group.WORLD, fp16_compress_hook)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: What it is called.
        tau: Its communication period in steps, None where it has none.
        strategy: Makes a strategy.
        callbacks: Makes its callbacks for a rank.
        every_step: Whether the ranks wait for each other at every step.
    """

    name: str
    tau: int | None
    strategy: Callable[[], Strategy]
    callbacks: Callable[[Place], list[Callback]] = lambda place: []
    every_step: bool = False

    @property
    def label(self) -> str:
        """The name, with the period where there is one."""
        return self.name if self.tau is None else f"{self.name} tau={self.tau}"

    def window(self, steps: int, warm_up: int) -> tuple[int, int]:
        """Steps before the counted ones, and the counted ones, at least ``steps``: whole periods.

        Args:
            steps: Counted steps, at least.
            warm_up: Steps before them where there is no period.
        """
        if self.tau is None:
            return warm_up, steps
        # An exchange is begun in step tau (from 0), over connections whose windows have yet to grow; the first counted
        # step is the first after the next one.
        return 2 * self.tau + 1, -(-steps // self.tau) * self.tau


_WITHOUT_PERIOD: dict[str, Callable[[], Method]] = {
    "local": lambda: Method(LOCAL, None, LocalStrategy),
    "local again": lambda: Method("local again", None, LocalStrategy),
    "ddp": lambda: Method("ddp", None, DDPStrategy, every_step=True),
    "ddp fp16": lambda: Method("ddp fp16", None, _HalfPrecisionDDP, every_step=True),
}


def _elastic(name: str, **arguments: Any) -> Callable[[int], Method]:
    return lambda tau: Method(name, tau, partial(EASGDStrategy, tau=tau, **arguments))


def _delayed(name: str, **arguments: Any) -> Callable[[int], Method]:
    """With pulls that come as late as they can."""
    return lambda tau: Method(name, tau, partial(EASGDStrategy, tau=tau, delay=tau - 1, **arguments))


def _torchft(name: str, peer: type[Any]) -> Callable[[int], Method]:
    return lambda tau: Method(name, tau, LocalStrategy, lambda place: [peer(tau, place.address)])


_WITH_PERIOD: dict[str, Callable[[int], Method]] = {
    "easgd": _elastic("easgd"),
    "eamsgd": _elastic("eamsgd", momentum=0.9),
    "easgd bfloat16": _elastic("easgd bfloat16", wire_dtype="bfloat16"),
    "easgd int8": _elastic("easgd int8", wire_dtype="int8"),
    "easgd_async": _elastic("easgd_async", mode="async"),
    "easgd_async delayed": _delayed("easgd_async delayed", mode="async"),
    "easgd_async delayed int8": _delayed("easgd_async delayed int8", mode="async", wire_dtype="int8"),
    "local_sgd delayed": _delayed("local_sgd delayed", alpha=1.0, beta=1.0, pull_to="new"),
    "raw_socket": lambda tau: Method("raw_socket", tau, LocalStrategy, lambda place: [RawSocket(tau, place.address)]),
    "post_local_sgd": lambda tau: Method("post_local_sgd", tau, lambda: PostLocalSGDStrategy(tau=tau)),
    "flat_local_sgd": lambda tau: Method("flat_local_sgd", tau, LocalStrategy, lambda place: [FlatLocalSGD(tau)]),
    "accelerate": lambda tau: Method("accelerate", tau, DDPStrategy, lambda place: [AccelerateLocalSGD(tau)]),
    "torchft": _torchft("torchft", TorchFTLocalSGD),
    "torchft_diloco": _torchft("torchft_diloco", TorchFTDiLoCo),
}

NAMES = ("local", "local again", *_WITH_PERIOD, "ddp", "ddp fp16")


def methods(names: Iterable[str], taus: Iterable[int]) -> list[Method]:
    """The named methods that exist here, those with a period once for each period."""
    taus = list(taus)
    chosen = []
    for name in names:
        if why_missing(name) is not None:
            continue
        chosen += [_WITHOUT_PERIOD[name]()] if name in _WITHOUT_PERIOD else [_WITH_PERIOD[name](tau) for tau in taus]
    return chosen


def why_missing(name: str) -> str | None:
    """Why a method cannot be had here; None if it can."""
    if name.startswith("easgd ") and "wire_dtype" not in inspect.signature(EASGDStrategy.__init__).parameters:
        return "this EASGDStrategy has no wire_dtype"
    package = next((package for package in ("accelerate", "torchft") if name.startswith(package)), None)
    if package is not None and find_spec(package) is None:
        return f"{package} is not installed; pip install -c constraints.txt 'lightning_easgd[bench]'"
    return None
