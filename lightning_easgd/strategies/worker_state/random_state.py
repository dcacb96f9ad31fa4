"""The random number generators of one worker, as tensors and primitives."""

import random
from typing import Any, final

import numpy as np
import torch

__all__ = ["FetchObserver", "random_state", "set_random_state"]


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, and of the device's own.

    Args:
        device: The worker's device.
    """
    kind, keys, position, has_gauss, cached_gaussian = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached_gaussian],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what :func:`random_state` has returned, as far as the device is of the same kind."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, cached_gaussian = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached_gaussian))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@final
class FetchObserver:
    """Finds out, once, whether fetching a batch draws random numbers in this process, as augmentation there does.

    Where a run goes on in the middle of an epoch the generators must be set before such a fetch. Where it draws none,
    they are best set after it, as the loader may draw to get to where it was.

    Attributes:
        draws: Whether it does; False until it is known.
    """

    def __init__(self) -> None:
        self.draws = False
        self._before: dict[str, Any] | None = None
        self._known = False

    def fetch_begins(self, device: torch.device) -> None:
        """Called before each fetch."""
        if not self._known:
            self._before = random_state(device)

    def fetch_ended(self, device: torch.device) -> None:
        """Called after each fetch."""
        if self._before is not None:
            self.draws = not _are_equal(self._before, random_state(device))
            self._known = True
            self._before = None


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_are_equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return all(map(_are_equal, one, other))
    return bool(one == other)
