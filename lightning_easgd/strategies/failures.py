"""What an exception says about the run."""

import torch.distributed as dist

__all__ = ["first_line", "is_of_process_group"]

_LONGEST = 500
_MARKS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")


def is_of_process_group(error: BaseException) -> bool:
    """Whether an error is a process group's own: a member did not come in time, or its connection is gone."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(mark in str(error).lower() for mark in _MARKS)


def first_line(error: BaseException) -> str:
    """An error in one line, for the other ranks' errors to quote."""
    text = next(iter(str(error).splitlines()), "").encode("utf-8", "replace").decode()[:_LONGEST]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
