"""Workers that train on their own under a Trainer, of either class tree."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from lightning_easgd.averagers import ExchangeError
from lightning_easgd.strategies.failures import first_line, is_of_process_group
from lightning_easgd.strategies.lightning_private import free_running, request_stop
from lightning_easgd.strategies.processes import WorkerProcesses
from lightning_easgd.strategies.worker_state import random_state, set_random_state
from lightning_easgd.transport.roll_call import RollCall
from lightning_easgd.transport.store_client import store_server

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object

__all__ = ["LocalWorkers"]

_LAST_WORDS = 1.0  # seconds: three looks of a control plane


class LocalWorkers(WorkerProcesses, _Base):
    """p workers that train without any communication.

    They leave out DDPStrategy's module wrapper, and the broadcast with which Lightning keeps all ranks in step at
    every batch.
    """

    _launcher_class: ClassVar[Callable[..., Any]]

    _trainer: Any = None  # from setup to teardown
    _end_free_running: Callable[[], None] | None = None
    _in_signal_handler = False
    _has_failed = False  # whether an error ends the run
    _roll_call: RollCall | None = None  # from setup_environment on
    _random_outside: dict[str, Any] | None = None  # of the generators, where a validation of a fit is inside

    def setup_environment(self) -> None:
        """Set up the process group, and what tells who is missing if a collective operation fails."""
        super().setup_environment()
        if dist.is_initialized():  # it is not where somebody else makes the group
            self._roll_call = RollCall(_get_default_store(), self.global_rank, self.world_size)

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = self._launcher_class(self, start_method=self._start_method)

    def configure_ddp(self) -> None:
        """Leave the module as it is, as there are no gradients to reduce, but give all ranks rank 0's weights.

        DDP's constructor does so; here it comes before the optimizers, which may copy the parameters.
        """
        assert self.lightning_module is not None
        self._share_start(self.lightning_module)

    def setup(self, trainer: Any) -> None:
        """Set up as DDPStrategy does; for a fit, let the ranks run freely."""
        super().setup(trainer)
        self._trainer = trainer
        if trainer.state.fn == "fit":
            self._end_free_running = free_running(trainer, self._on_sigterm, self._handling_signal, self._in_validation)

    @contextlib.contextmanager
    def _in_validation(self) -> Iterator[None]:
        """Context of a validation of a fit: it leaves the random number generators as they were.

        Training then does not depend on whether a resumed run repeats a validation.
        """
        self._random_outside = random_state(self.root_device)
        try:
            yield
        finally:
            set_random_state(self._random_outside, self.root_device)
            self._random_outside = None

    def on_exception(self, exception: BaseException) -> None:
        """Leave word of the error for the others; beside an error of the process group's own say who was missing."""
        super().on_exception(exception)
        self._has_failed = True
        if self._roll_call is None:
            return
        if is_of_process_group(exception):
            exception.add_note(f"{type(self).__name__}: {self._who_is_missing()}")
        self._roll_call.fail(first_line(exception))

    def end_rank(self, error: BaseException) -> None:
        """Do what Lightning leaves out when an error ends a spawned or forked rank: tell the others, and tear down."""
        if self._trainer is not None:
            self._trainer.state.status = "interrupted"
            self.on_exception(error)
            self.teardown()

    def teardown(self) -> None:
        """Undo :meth:`setup`; after an error let the others read why, before the store goes with this process."""
        if self._has_failed and dist.is_initialized() and self.world_size > 1 and self.global_rank == store_server():
            time.sleep(_LAST_WORDS)
        self._has_failed = False
        if self._end_free_running is not None:
            self._end_free_running()
            self._end_free_running = None
        self._trainer = None
        self._roll_call = None
        super().teardown()

    def _on_sigterm(self) -> None:
        request_stop(self._trainer)

    # While an error ends the run, or in a signal handler, other ranks may be anywhere, so no collective can be matched:
    # rank 0's view counts.

    @property
    def _interrupted(self) -> bool:
        return self._trainer is not None and self._trainer.state.status == "interrupted"

    @property
    def _alone(self) -> bool:
        return self._interrupted or self._in_signal_handler

    @contextlib.contextmanager
    def _handling_signal(self) -> Iterator[None]:
        """Context of a signal handler that saves a checkpoint: this rank may be in the middle of anything."""
        self._in_signal_handler = True
        try:
            yield
        finally:
            self._in_signal_handler = False

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; not while an error ends the run."""
        if not self._alone:
            with self._naming_the_missing("barrier"):
                super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object; while an error ends the run every rank keeps its own."""
        if self._alone:
            return obj
        with self._naming_the_missing("broadcast"):
            return super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor; while an error ends the run every rank keeps its own."""
        if self._alone:
            return tensor
        with self._naming_the_missing("reduction"):
            return super().reduce(tensor, *args, **kwargs)

    def _who_is_missing(self) -> str:
        return "" if self._roll_call is None else self._roll_call.explain()

    @contextlib.contextmanager
    def _naming_the_missing(self, what: str) -> Iterator[None]:
        """Context of a collective operation of Lightning's: its error says who was missing, and what to do."""
        try:
            yield
        except RuntimeError as error:
            if not is_of_process_group(error):
                raise
            raise ExchangeError(
                f"{type(self).__name__}(timeout={self._timeout}): a {what} of Lightning's failed on rank"
                f" {self.global_rank}. {self._who_is_missing()} Cause: {error}"
            ) from error
