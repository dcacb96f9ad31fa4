"""A thread that does one thing after the other, and that the end of the process does not wait for."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar, final

import torch

__all__ = ["Daemon"]

_Result = TypeVar("_Result")
_Job = tuple["Future[Any]", Callable[[], Any]]


@final
class Daemon:
    """As a ``ThreadPoolExecutor`` of one thread, for what may never come back.

    It has the device of the thread that makes it.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        has_device = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._device = torch.accelerator.current_device_index() if has_device else None
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._is_open = True
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[..., _Result], *arguments: Any, **keywords: Any) -> "Future[_Result]":
        """Call a function in the thread, after all that were given before."""
        future: Future[_Result] = Future()
        self._jobs.put((future, lambda: function(*arguments, **keywords)))
        return future

    def shutdown(self, *, wait: bool = False) -> None:  # noqa: ARG002 - as executors have it
        """Let the thread end after what it does now; the others never begin."""
        self._is_open = False
        self._jobs.put(None)

    def _work(self) -> None:
        if self._device is not None:
            torch.accelerator.set_device_index(self._device)
        while (job := self._jobs.get()) is not None and self._is_open:
            future, call = job
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
