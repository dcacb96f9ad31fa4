"""What can go wrong with the served center."""

__all__ = [
    "CenterError",
    "CenterTimeoutError",
    "SharedMemoryUnavailableError",
    "StoreLostError",
    "WorkerLostError",
]


class CenterError(RuntimeError):
    """An operation on the served center failed; the message says which and why."""


class CenterTimeoutError(CenterError):
    """Somebody did not answer, or did not let a chunk go, within the timeout."""


class StoreLostError(CenterTimeoutError):
    """The store that the ranks share has gone, or does not answer; the message names who serves it."""


class WorkerLostError(CenterError):
    """A rank that is needed has died, or its connection is gone.

    Args:
        message: What happened and what to do.
        ranks: The ranks that are lost.
    """

    def __init__(self, message: str, ranks: frozenset[int]) -> None:
        super().__init__(message)
        self.ranks = ranks


class SharedMemoryUnavailableError(CenterError):
    """This platform cannot share memory as the center needs it; sockets can serve the same ranks."""
