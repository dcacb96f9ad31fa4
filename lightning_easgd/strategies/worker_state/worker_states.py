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

from lightning_easgd.strategies.worker_state.gathering import gather_states
from lightning_easgd.strategies.worker_state.interning import interned
from lightning_easgd.transport.worker_layout import WorkerLayout

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

    def discard(self) -> None:  # noqa: B027 - what is inside the checkpoint goes with it
        """Take back what :meth:`save` kept: the checkpoint could not be written."""


@final
class NoStates(WorkerStates):
    """Nowhere: the checkpoint holds the center alone."""

    @override
    def save(self, state: dict[str, Any], path: str) -> dict[str, Any]:
        return {}


@final
class EmbeddedStates(WorkerStates):
    """Inside the checkpoint; rank 0 needs memory for the states of all workers while it is written.

    What all workers have in common, such as buffers that are no part of the module's state, is there once; and so is
    what the ranks of one worker have in common.

    Args:
        strategy: The strategy's name, for errors.
        timeout: How long to wait for the slowest worker.
        layout: Which ranks make up which worker.
    """

    def __init__(self, strategy: str, timeout: timedelta, layout: WorkerLayout) -> None:
        self._strategy = strategy
        self._timeout = timeout
        self._layout = layout

    @override
    def save(self, state: dict[str, Any], path: str) -> dict[str, Any]:
        states = gather_states(state, self._timeout, f"{self._strategy}(worker_state='embed')")
        if states is None:
            return {}
        for ranks in self._layout.inside:
            states[ranks[0]] = interned(states[ranks[0]], states[0])
            for rank in ranks[1:]:
                states[rank] = interned(states[rank], states[ranks[0]])
        return {"workers": states}


@final
class SidecarStates(WorkerStates):
    """In one file of each worker, written at the same time: ``<checkpoint>.easgd/<generation>/rank_<k>.pt``.

    The checkpoint names the generation that belongs to it and is written after it is complete. The generation before
    is kept until the next one, so that the checkpoint that is about to be replaced stays whole meanwhile.

    Args:
        strategy: The strategy's name, for errors.
        rank: This worker's rank.
        broadcast: Gives rank 0's object to all ranks.
        all_true: Whether all ranks say so.
        current: The generation that the checkpoint names, by the folder of its generations, as far as known. Kept up
            to date. The newest need not be it: a run may have been killed before it wrote the checkpoint.
    """

    def __init__(
        self,
        strategy: str,
        rank: int,
        broadcast: Callable[[Any], Any],
        all_true: Callable[[bool], bool],
        current: dict[str, str],
    ) -> None:
        self._strategy = strategy
        self._rank = rank
        self._current = current
        self._saved: tuple[str, str] | None = None  # the path and the generation
        self._before: str | None = None  # the generation that the checkpoint named
        self._broadcast = broadcast
        self._all_true = all_true

    @override
    def save(self, state: dict[str, Any], path: str) -> dict[str, Any]:
        # Names of checkpoints may hold metrics that differ between the ranks.
        path, generation = self._saved = self._broadcast((path, f"{time.time_ns():020d}"))
        problem: Exception | None = None
        try:
            self._write(state, path, generation)
        except Exception as error:
            problem = error
        if not self._all_true(problem is None):
            self.discard()
            raise RuntimeError(
                f"{self._strategy}(worker_state='sidecar'): some rank could not write beside {path!r}, and the"
                " checkpoint is not written either, the previous one is whole. All ranks need access to the place and"
                " room there; or use worker_state='embed' or 'none'. On this rank (rank"
                f" {self._rank}): {problem or 'no problem'}"
            ) from problem
        folder = url_to_fs(_folder(path))[1]
        self._before = self._current.get(folder)
        self._current[folder] = generation
        return {"generation": generation}

    @override
    def discard(self) -> None:
        assert self._saved is not None
        path, generation = self._saved
        with suppress(Exception):  # the place may be out of reach, and the first error counts
            fs, folder = url_to_fs(_folder(path))
            if self._current.get(folder) == generation:
                del self._current[folder]
                if self._before is not None:
                    self._current[folder] = self._before
            _remove(fs, f"{folder}/{generation}", self._rank)
            with suppress(OSError):  # of a checkpoint that has never been written
                fs.rmdir(folder)

    def _write(self, state: dict[str, Any], path: str, generation: str) -> None:
        fs, folder = url_to_fs(_folder(path))
        with suppress(FileNotFoundError):
            generations = [str(name) for name in fs.ls(folder, detail=False) if not name.endswith(generation)]
            current = self._current.get(folder, max(generations, default=""))
            for old in generations:
                if not old.endswith(current):
                    _remove(fs, old, self._rank)
        fs.makedirs(f"{folder}/{generation}", exist_ok=True)
        with fs.open(_file(f"{folder}/{generation}", self._rank), "wb") as file:
            _save(state, file)


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


def _save(state: dict[str, Any], file: Any) -> None:
    """Save to a file object; what goes wrong there is raised as it is, such as a full disk."""
    watched = _WatchedFile(file)
    try:
        torch.save(state, watched)  # type: ignore[arg-type]  # all that it needs of a file
    except Exception:
        if watched.error is None:
            raise
        raise watched.error from None


@final
class _WatchedFile:
    """A file that remembers its first error: ``torch.save`` raises another one in its place.

    Args:
        file: A binary file, open for writing.

    Attributes:
        error: What the first write that failed has raised.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: Exception | None = None

    def write(self, part: Any) -> int:
        """Write to the file."""
        try:
            return int(self._file.write(part))
        except Exception as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Flush the file."""
        try:
            self._file.flush()
        except Exception as error:
            self.error = self.error or error
            raise


def _remove(fs: Any, generation: str, rank: int) -> None:
    """Remove a worker's file of a generation, and with the last file its folder."""
    with suppress(FileNotFoundError):
        fs.rm(_file(generation, rank))
    with suppress(OSError):  # until the last rank has taken its file away
        fs.rmdir(generation)


def _named(path: str) -> str:
    """The checkpoint that a link names (``ModelCheckpoint(save_last="link")``): the workers' states are beside that."""
    return os.path.realpath(path) if os.path.islink(path) else path


def _folder(path: str) -> str:
    return f"{path}.easgd"


def _file(generation: str, rank: int) -> str:
    return f"{generation}/rank_{rank}.pt"
