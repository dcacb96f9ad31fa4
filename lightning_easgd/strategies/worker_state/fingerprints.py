"""Whether a nested state is still what it was when it was saved, part by part."""

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_easgd.tensors.checksums import checksum

__all__ = ["fingerprints", "with_edits"]


def fingerprints(state: Any, depth: int = 3) -> Any:
    """A number for each part of a nested state.

    Args:
        state: Tensors, primitives, and mappings, lists and tuples of them. Of other objects only the type counts, as
            they need not look the same in another process; a tuple is a list.
        depth: How many containers deep the parts are.

    Returns:
        Such containers as the state's, with an integer of 63 bits for each part.
    """
    if depth and isinstance(state, Mapping):
        return {key: fingerprints(value, depth - 1) for key, value in state.items()}
    if depth and isinstance(state, list | tuple):
        return [fingerprints(value, depth - 1) for value in state]
    digest = hashlib.blake2b(_described(state).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def with_edits(own: Any, loaded: Any, saved: Any, now: Any, place: str = "") -> tuple[Any, list[str]]:
    """A worker's own state, but for the parts of the common one that were edited since they were saved.

    Args:
        own: The worker's state.
        loaded: The state in the same form that all workers see.
        saved: The fingerprints of that when it was saved.
        now: Its fingerprints now.
        place: The name of the part.

    Returns:
        The state, and the names of the parts that were edited.
    """
    if saved == now:
        return own, []
    if (
        all(isinstance(each, Mapping) for each in (own, loaded, saved, now))
        and own.keys() == saved.keys() == now.keys()
    ):
        keys: Any = own.keys()
    elif all(isinstance(each, list) for each in (own, loaded, saved, now)) and len(own) == len(saved) == len(now):
        keys = range(len(own))
    else:
        return loaded, [place]
    parts = {key: with_edits(own[key], loaded[key], saved[key], now[key], f"{place}.{key}".strip(".")) for key in keys}
    names = [name for _, edited in parts.values() for name in edited]
    values = {key: value for key, (value, _) in parts.items()}
    return values if isinstance(own, Mapping) else list(values.values()), names


def _described(state: Any) -> str:
    if isinstance(state, Tensor):
        return f"tensor {checksum(state)}"
    if isinstance(state, Mapping):
        return "{" + ",".join(f"{key!r}:{_described(value)}" for key, value in state.items()) + "}"
    if isinstance(state, list | tuple):
        return "[" + ",".join(map(_described, state)) + "]"
    if state is None or isinstance(state, bool | int | float | str | bytes):
        return repr(state)
    return type(state).__qualname__
