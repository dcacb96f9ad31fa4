"""Whether a module holds, after a checkpoint was loaded, what it held when the checkpoint was saved."""

import weakref
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from lightning_easgd.tensors.checksums import checksum

__all__ = ["EditedState", "StateSums"]


@final
class StateSums:
    """The checksums of a module's state, taken when a checkpoint of it is made: hooks may change what is written.

    Args:
        state: The module's state.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._sums = _sums(state)
        self._seen = {name: (weakref.ref(tensor), _version(tensor)) for name, tensor in _tensors(state).items()}

    def saved(self, written: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """What :class:`EditedState` must know, in primitives.

        Args:
            written: The state that goes into the file.
        """
        changed = {
            name: checksum(tensor) for name, tensor in _tensors(written).items() if not self._is_as_seen(name, tensor)
        }
        return {
            "module": self._sums,
            "written": {name: value for name, value in changed.items() if value != self._sums.get(name)},
        }

    def _is_as_seen(self, name: str, tensor: Tensor) -> bool:
        seen, version = self._seen.get(name, (None, 0))
        return seen is not None and seen() is tensor and _version(tensor) == version


@final
class EditedState:
    """Which tensors of a module's state are not those that were saved: edited in the file, by a hook, or after it.

    A tensor is the one that was saved if the module's has the same checksum; or if what was loaded is what was
    written, and the module's is that in its own dtype (another precision, or a hook that writes half the bits).

    Args:
        saved: What :meth:`StateSums.saved` has returned.
        loaded: The state that has been loaded, after the hooks.
        held: The module's state after that.
    """

    def __init__(self, saved: Mapping[str, Mapping[str, int]], loaded: Mapping[str, Any], held: Mapping[str, Any]):
        self._saved = saved["module"]
        self._held = _sums(held)
        self._names = {
            name
            for name, tensor in _tensors(held).items()
            if name in saved["module"]
            and self._held[name] != saved["module"][name]
            and not _is_as_written(name, tensor, saved, loaded)
        }

    def names(self, now: Mapping[str, Any]) -> set[str]:
        """The keys of the tensors that are not those that were saved, also of those changed since they were loaded.

        Args:
            now: The module's state where training starts.
        """
        sums = _sums(now)
        return self._names | {name for name, value in sums.items() if value != self._held.get(name, value)}

    def handed_on(self, sums: Mapping[str, dict[str, int]], now: Mapping[str, Any]) -> dict[str, dict[str, int]]:
        """Sums for a checkpoint of the same workers, by which the same tensors are found to be edited.

        Args:
            sums: What :meth:`StateSums.saved` has returned of what is saved.
            now: The module's state.
        """
        edited = self.names(now)
        return {
            "module": sums["module"] | {name: self._saved[name] for name in edited & self._saved.keys()},
            "written": {name: value for name, value in sums["written"].items() if name not in edited},
        }


def _is_as_written(name: str, held: Tensor, saved: Mapping[str, Mapping[str, int]], loaded: Mapping[str, Any]) -> bool:
    tensor = loaded.get(name)
    if not isinstance(tensor, Tensor) or tensor.shape != held.shape:
        return False
    if checksum(tensor) != saved["written"].get(name, saved["module"][name]):
        return False
    return torch.equal(tensor.to(held.device, held.dtype), held)


def _sums(state: Mapping[str, Any]) -> dict[str, int]:
    return {name: checksum(tensor) for name, tensor in _tensors(state).items()}


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state's tensors; what a module adds by ``get_extra_state`` may be anything."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
