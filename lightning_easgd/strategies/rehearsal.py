"""Call a module's ``training_step`` once more as a rehearsal: nothing of what it changes stays."""

import contextlib
import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_easgd.strategies.worker_state import random_state, set_random_state

__all__ = ["copy_batch", "rehearsal", "rehearse_step"]

_SEED = 0
"""Of torch's generators in every rehearsal: its dropout masks are the same each time, whatever training has drawn."""


_CONTAINERS = (list, dict, OrderedDict, defaultdict, set, deque)


@contextlib.contextmanager
def rehearsal(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context that leaves a module, but for its parameters and buffers, and the random number generators as they were.

    Put back are all attributes of the module and its submodules, with the values of tensors and the contents of lists,
    dictionaries, sets and deques among them: the states of metrics, counters, ``training``. Inside, ``self.log`` does
    nothing, ``self.all_gather`` raises, compiled functions run uncompiled, and torch's generators have a fixed seed.
    What a ``training_step`` writes elsewhere (a file, ``self.logger.experiment``) is beyond this.

    Args:
        module: The module.
        device: Its device.
    """
    random = random_state(device)
    kept = [_KeptAttributes(part) for part in module.modules()]
    try:
        for part in module.modules():
            if hasattr(type(part), "all_gather"):  # a LightningModule
                vars(part).update(log=_say_nothing, log_dict=_say_nothing, all_gather=_refuse)
        torch.default_generator.manual_seed(_SEED)
        if device.type == "cuda":
            torch.cuda.manual_seed(_SEED)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for attributes in kept:
            attributes.restore()
        set_random_state(random, device)


def rehearse_step(module: Any, batch: Any, index: int) -> Any:
    """What ``training_step`` returns for a batch, which it may write to.

    Args:
        module: A LightningModule.
        batch: A batch on its device.
        index: The batch's index in its epoch.

    Raises:
        TypeError: If ``training_step`` takes an iterator in place of batches.
    """
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise TypeError(f"{type(module).__name__}.training_step(dataloader_iter): it cannot be given one batch alone.")
    batch = copy_batch(batch)
    takes_index = "batch_idx" in parameters or len(parameters) > 1
    return module.training_step(batch, index) if takes_index else module.training_step(batch)


def copy_batch(batch: Any) -> Any:
    """A batch whose tensors are copies."""
    return apply_to_collection(batch, Tensor, torch.clone)


class _KeptAttributes:
    """The attributes of one module, its submodules' not among them, as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._contents = [
            (value, value.copy())
            for name, value in self._attributes.items()
            if name not in ("_parameters", "_buffers", "_modules") and type(value) in _CONTAINERS
        ]
        # Tensors of inference mode cannot be written to outside of it.
        self._tensors = [
            (value, value._version, value.detach().clone())
            for value in self._attributes.values()
            if isinstance(value, Tensor) and not value.is_inference()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        attributes = vars(self._module)
        for name in attributes.keys() - self._attributes.keys():
            del attributes[name]
        attributes.update(self._attributes)
        for container, content in self._contents:
            container.clear()
            if isinstance(container, list | deque):
                container.extend(content)
            else:
                container.update(content)
        for tensor, version, value in self._tensors:
            if tensor._version != version:
                tensor.copy_(value)


def _say_nothing(*_: Any, **__: Any) -> None:
    """In place of ``self.log``."""


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("training_step gathers from all ranks, and ranks rehearse it each at its own time")
