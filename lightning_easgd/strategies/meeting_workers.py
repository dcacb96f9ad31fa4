"""When workers under a Trainer wait for each other: where Lightning or one of its callbacks communicates."""

import math
from typing import Any, ClassVar

from lightning_easgd.averagers import Averaging, Meeting, WorkersStoppedError
from lightning_easgd.strategies.lightning_private import (
    communicates_at_epoch_end,
    has_new_loader,
    reads_common_clock,
    request_stop,
    saves_after_batch,
    saves_in_epoch,
)
from lightning_easgd.strategies.workers import LocalWorkers

__all__ = ["MeetingWorkers"]

_LOADER_BARRIERS = {"train_dataloader()": Meeting.EPOCH_END, "val_dataloader()": Meeting.VALIDATION}


class MeetingWorkers(LocalWorkers):
    """Workers that run freely, and meet before anything else communicates: nobody waits for one that never comes."""

    _stop_exception: ClassVar[type[BaseException]]

    _averaging: Averaging | None = None  # from setup to teardown of a fit
    _training = False  # while exchanges may happen
    _even_batches = True
    _step_savers: tuple[Any, ...] = ()  # the callbacks that save after a number of steps
    _has_common_clock = False  # whether a callback asks for one and ranks may have different numbers of batches

    def _look_for_meetings(self) -> None:
        """Find out where ranks must meet in this fit; all ranks call it when training starts."""
        batches = self._trainer.num_training_batches
        same = batches == self.broadcast(batches) and math.isfinite(batches)
        self._even_batches = self.reduce_boolean_decision(same)
        callbacks = self._trainer.callbacks
        self._step_savers = tuple(filter(saves_in_epoch, callbacks))
        self._has_common_clock = not self._even_batches and any(map(reads_common_clock, callbacks))

    def note_progress(self) -> None:
        """Show the other ranks that this one gets on."""
        if self._averaging is not None:
            self._averaging.note_progress()

    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; where they make their data loaders anew, let them meet before.

        Lightning comes there before it calls any hook, and others may still be in their epoch.
        """
        if self._training and not self._alone and name in _LOADER_BARRIERS:
            self._wait_for_all(_LOADER_BARRIERS[name])
        super().barrier(name, *args, **kwargs)

    def on_train_epoch_start(self) -> None:
        """Look again whether ranks have equally many batches, where their data loaders are new."""
        if self._training and has_new_loader(self._trainer):
            self._look_for_meetings()

    def on_train_batch_end(self) -> None:
        """Let ranks meet before a callback communicates inside the epoch: where one never comes, all end with an error.

        Ranks with equally many batches read a common clock without it.
        """
        self.note_progress()
        if not self._training:
            return
        saves = any(saves_after_batch(callback, self._trainer.global_step) for callback in self._step_savers)
        if saves or self._has_common_clock:
            self._wait_for_all(Meeting.BATCH_END)

    def on_train_epoch_end(self) -> None:
        """Let ranks that end an epoch at different times meet before Lightning communicates, else they may hang."""
        if not self._training or self._averaging is None:
            return
        communicates = communicates_at_epoch_end(self._trainer)
        if self._averaging.waits_for_all:
            wait = communicates or not self._even_batches
        else:  # only to tell a rank that waits for all inside its epoch that this one is at the end
            wait = communicates and (self._has_common_clock or bool(self._step_savers))
        if wait:
            self._wait_for_all(Meeting.EPOCH_END)

    def _on_sigterm(self) -> None:
        if self._averaging is not None:
            self._averaging.request_stop()
        else:
            super()._on_sigterm()

    def _stop_if_agreed(self) -> None:
        assert self._averaging is not None
        if self._averaging.stop_agreed:
            request_stop(self._trainer)

    def _wait_for_all(self, meeting: Meeting) -> None:
        """Wait for all ranks, and apply every exchange."""
        assert self._averaging is not None
        try:
            self._averaging.meet(meeting)
        except WorkersStoppedError:
            raise self._stop_exception from None
        self._stop_if_agreed()
