"""Where the workers' own states are kept: inside the checkpoint, in files beside it, or nowhere."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, final

import torch
from fsspec.core import url_to_fs
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_easgd.checkpointing.gathering import gather_states

__all__ = [
    "EmbeddedStates",
    "NoStates",
    "SidecarStates",
    "WorkerStates",
    "read_worker_state",
    "remove_sidecar",
    "sidecar_folder",
]


class WorkerStates(ABC):
    """Keeps the state of every worker with a checkpoint."""

    @abstractmethod
    def save(self, state: dict[str, Any], path: str) -> dict[str, Any]:
        """Keep the workers' states; all workers call it before rank 0 writes the checkpoint.

        Args:
            state: This worker's state.
            path: Where the checkpoint will be, on rank 0.

        Returns:
            What rank 0 puts into the checkpoint so that :func:`read_worker_state` finds the states.
        """


@final
class NoStates(WorkerStates):
    """Nowhere: the checkpoint holds the center alone."""

    @override
    def save(self, state: dict[str, Any], path: str) -> dict[str, Any]:
        return {}


@final
class EmbeddedStates(WorkerStates):
    """Inside the checkpoint; rank 0 needs memory for the states of all workers while it is written.

    Args:
        timeout: How long to wait for the slowest worker.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout

    @override
    def save(self, state: dict[str, Any], path: str) -> dict[str, Any]:
        states = gather_states(state, self._timeout)
        return {} if states is None else {"workers": states}


@final
class SidecarStates(WorkerStates):
    """In one file of each worker, written at the same time: ``<checkpoint>.easgd/<generation>/rank_<k>.pt``.

    The checkpoint names the generation that belongs to it and is written after it is complete. The generation before
    is kept until the next one, so that the checkpoint that is about to be replaced stays whole meanwhile.

    Args:
        rank: This worker's rank.
        broadcast: Gives rank 0's object to all ranks.
        all_true: Whether all ranks say so.
        current: The generation that the checkpoint names, by the folder of its generations, as far as known. Kept up
            to date. The newest need not be it: a run may have been killed before it wrote the checkpoint.
    """

    def __init__(
        self,
        rank: int,
        broadcast: Callable[[Any], Any],
        all_true: Callable[[bool], bool],
        current: dict[str, str],
    ) -> None:
        self._rank = rank
        self._current = current
        self._broadcast = broadcast
        self._all_true = all_true

    @override
    def save(self, state: dict[str, Any], path: str) -> dict[str, Any]:
        # Names of checkpoints may hold metrics that differ between the ranks.
        path, generation = self._broadcast((path, f"{time.time_ns():020d}"))
        problem: Exception | None = None
        try:
            self._write(state, path, generation)
        except Exception as error:
            problem = error
        if not self._all_true(problem is None):
            raise RuntimeError(
                f"EASGDStrategy(worker_state='sidecar'): some rank could not write beside {path!r}, and the checkpoint"
                " is not written either, the previous one is whole. All ranks need access to the place and room"
                f" there; or use worker_state='embed' or 'none'. On this rank: {problem or 'no problem'}"
            ) from problem
        self._current[url_to_fs(_folder(path))[1]] = generation
        return {"generation": generation}

    def _write(self, state: dict[str, Any], path: str, generation: str) -> None:
        fs, folder = url_to_fs(_folder(path))
        with suppress(FileNotFoundError):
            generations = [str(name) for name in fs.ls(folder, detail=False) if not name.endswith(generation)]
            current = self._current.get(folder, max(generations, default=""))
            for old in generations:
                if old.endswith(current):
                    continue
                with suppress(FileNotFoundError):
                    fs.rm(_file(old, self._rank))
                with suppress(OSError):  # until the last rank has taken its file away
                    fs.rmdir(old)
        fs.makedirs(f"{folder}/{generation}", exist_ok=True)
        with fs.open(_file(f"{folder}/{generation}", self._rank), "wb") as file:
            torch.save(state, file)


def read_worker_state(
    saved: dict[str, Any], path: str, rank: int, weights_only: bool | None = None
) -> dict[str, Any] | None:
    """The state of one worker that a checkpoint keeps, None if it keeps none or it cannot be read.

    Args:
        saved: What :meth:`WorkerStates.save` has put into the checkpoint.
        path: Where the checkpoint was read.
        rank: The worker.
        weights_only: As for :func:`torch.load`.
    """
    if "workers" in saved:
        state: dict[str, Any] = saved["workers"][rank]
        return state
    if "generation" not in saved:
        return None
    fs, folder = url_to_fs(_folder(_named(path)))
    name = _file(f"{folder}/{saved['generation']}", rank)
    try:
        with fs.open(name, "rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # torn files fail in many ways
        rank_zero_warn(f"The state of worker {rank} cannot be read from {name}: {type(error).__name__}: {error}")
        return None
    return state


def sidecar_folder(path: str) -> str:
    """The folder of the files beside a checkpoint, as its file system names it."""
    return str(url_to_fs(_folder(_named(path)))[1])


def remove_sidecar(path: str) -> None:
    """Remove the files beside a checkpoint, if there are any."""
    fs, folder = url_to_fs(_folder(path))
    with suppress(FileNotFoundError):
        fs.rm(folder, recursive=True)


def _named(path: str) -> str:
    """The checkpoint that a link names (``ModelCheckpoint(save_last="link")``): the workers' states are beside that."""
    return os.path.realpath(path) if os.path.islink(path) else path


def _folder(path: str) -> str:
    return f"{path}.easgd"


def _file(generation: str, rank: int) -> str:
    return f"{generation}/rank_{rank}.pt"
