"""Ranks of a Trainer that run at their own pace: what keeps them in step is off, and errors say who was missing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, final

import torch

from lightning_easgd.strategies.trainer.lightning_private import free_running
from lightning_easgd.strategies.worker_state import random_state, set_random_state

__all__ = ["FreeRanks"]


@final
class FreeRanks:
    """One fit of this rank, or another run of its Trainer, from setup to teardown.

    While an error ends the run, or in a signal handler, other ranks may be anywhere, so that no collective can be
    matched: rank 0's view counts.

    Args:
        trainer: The Trainer, before it registers its signal handlers.
        device: The rank's device.
        on_sigterm: Called by the handler of SIGTERM.

    Attributes:
        trainer: As given.
        has_failed: Whether an error ends the run.
        random_outside: Of the generators, where a validation of a fit is inside.
    """

    def __init__(self, trainer: Any, device: torch.device, on_sigterm: Callable[[], None]) -> None:
        self.trainer = trainer
        self.has_failed = False
        self.random_outside: dict[str, Any] | None = None
        self._device = device
        self._in_signal_handler = False
        self._undo: Callable[[], None] | None = None
        if trainer.state.fn == "fit":
            self._undo = free_running(trainer, on_sigterm, self._handling_signal, self._in_validation)

    @property
    def are_interrupted(self) -> bool:
        """Whether an error ends the run, as Lightning sees it."""
        return bool(self.trainer.state.status == "interrupted")

    @property
    def is_alone(self) -> bool:
        """Whether this rank must not wait for the others."""
        return self.are_interrupted or self._in_signal_handler

    def end(self) -> None:
        """Undo what was done to the Trainer."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    @contextlib.contextmanager
    def _in_validation(self) -> Iterator[None]:
        """Context of a validation of a fit: it leaves the random number generators as they were.

        Training then does not depend on whether a resumed run repeats a validation.
        """
        self.random_outside = random_state(self._device)
        try:
            yield
        finally:
            set_random_state(self.random_outside, self._device)
            self.random_outside = None

    @contextlib.contextmanager
    def _handling_signal(self) -> Iterator[None]:
        """Context of a signal handler that saves a checkpoint: this rank may be in the middle of anything."""
        self._in_signal_handler = True
        try:
            yield
        finally:
            self._in_signal_handler = False
