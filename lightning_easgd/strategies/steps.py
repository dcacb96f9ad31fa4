"""Every optimizer step of a process, whoever makes it."""

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, final
from weakref import WeakMethod, finalize

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lightning_easgd.averagers import Averager

__all__ = ["Steps", "averagers_of"]


@final
class Steps:
    """Calls functions before and after every step of every optimizer of this process, once: also of bare ones.

    A bare step is one that does not come through the strategy, as ``optimizer.optimizer.step()`` in manual optimization
    does not. torch's own hooks see it. They are called for each ``step`` of a class that calls its parent's, and again
    inside a step that the strategy makes: the outermost call counts. One that ends with an exception has no end for
    torch's hooks, so that what is open is found by the frames of the stack.

    Args:
        before: Method to call with the optimizer before a step, or before the closure of one that has one.
        after: Method to call with the optimizer after a step that has been made, and with whether it had a closure.
            Both are called until :meth:`close`, or as long as their object lives.
    """

    def __init__(self, before: Callable[[Optimizer], None], after: Callable[[Optimizer, bool], None]) -> None:
        self._before = WeakMethod(before)
        self._after = WeakMethod(after)
        self._open: dict[Optimizer, FrameType] = {}
        self._handles = (
            register_optimizer_step_pre_hook(self._begin),
            register_optimizer_step_post_hook(self._end),
        )
        finalize(before.__self__, self.close)  # type: ignore[attr-defined]  # a method's object

    def make(self, optimizer: Optimizer, step: Callable[[], Any], had_closure: bool = True) -> Any:
        """Make a step that comes through the strategy, whether the optimizer's own is called in it or skipped."""
        frame = sys._getframe()
        if self._is_open(optimizer, frame):
            return step()
        self._open[optimizer] = frame
        try:
            self._tell_before(optimizer)
            output = step()
        finally:
            self._open.pop(optimizer, None)
        self._tell_after(optimizer, had_closure)
        return output

    def is_under_way(self, optimizer: Optimizer) -> bool:
        """Whether a step of this optimizer is being made, further up the stack."""
        return self._is_open(optimizer, sys._getframe(1))

    def close(self) -> None:
        """Tell nobody any more."""
        for handle in self._handles:
            handle.remove()
        self._open.clear()

    def _begin(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        del arguments, keywords
        frame = sys._getframe(1)
        if not self._is_open(optimizer, frame):
            self._open[optimizer] = frame
            self._tell_before(optimizer)

    def _end(self, optimizer: Optimizer, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        if self._open.get(optimizer) is sys._getframe(1):
            del self._open[optimizer]
            closure = keywords.get("closure", arguments[1] if len(arguments) > 1 else None)
            self._tell_after(optimizer, had_closure=closure is not None)

    def _tell_before(self, optimizer: Optimizer) -> None:
        before = self._before()
        if before is not None:
            before(optimizer)

    def _tell_after(self, optimizer: Optimizer, had_closure: bool) -> None:
        after = self._after()
        if after is not None:
            after(optimizer, had_closure)

    def _is_open(self, optimizer: Optimizer, frame: FrameType | None) -> bool:
        """Whether a step of this optimizer is under way further up the stack; one that has been left is forgotten."""
        opened = self._open.get(optimizer)
        while opened is not None and frame is not None:
            if frame is opened:
                return True
            frame = frame.f_back
        return False


def averagers_of(optimizer: Optimizer, averagers: Mapping[Optimizer, Averager], steps: Steps) -> list[Averager]:
    """The averagers whose clocks a step counts on.

    That is its own; or, of an optimizer that the strategy does not know but that steps the parameters of those that it
    knows (as the inner one of SAM does), theirs, unless the step is part of one of them.
    """
    own = averagers.get(optimizer)
    if own is not None:
        return [own]
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    owners = [known for known, each in averagers.items() if not stepped.isdisjoint(map(id, each.parameters))]
    inside = any(steps.is_under_way(known) for known in owners)
    return [] if inside else [averagers[known] for known in owners]
