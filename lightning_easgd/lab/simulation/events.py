"""What happens to the numbers, and when: the timelines' output and the learning core's input.

A schedule yields events in the order of simulated time. They say nothing about durations beyond their own time stamp,
and the learning core reads nothing else of the schedule: which worker computes how fast is the timeline's affair, what
an exchange does to the vectors is that of :class:`~lightning_easgd.lab.simulation.learning.Learner`.
"""

from dataclasses import dataclass
from typing import TypeAlias, final

__all__ = ["Event", "Exchange", "Failure", "Finish", "Forward", "Hop", "Reduction", "Return"]


@dataclass(frozen=True)
class _At:
    """Something that happens.

    Args:
        time: Simulated seconds.
    """

    time: float


@final
@dataclass(frozen=True)
class Reduction(_At):
    """The sum over all workers arrives, and the center moves.

    Args:
        clock: The steps that each worker had made when its vector was taken.
    """

    clock: int


@final
@dataclass(frozen=True)
class Exchange(_At):
    """A center takes a worker's vector and moves; the worker moves when it has made the step that is under way.

    Args:
        worker: Which worker.
        clock: The steps that the worker had made when its vector was taken.
        center: Number of the center; 0 is the one that is evaluated.
        sharing: The workers p that share this center and live; α = β / p unless α is given.
    """

    worker: int
    clock: int
    center: int
    sharing: int


@final
@dataclass(frozen=True)
class Forward(_At):
    """A center of a tree sends its vector to the center above it.

    Args:
        center: The sender.
    """

    center: int


@final
@dataclass(frozen=True)
class Hop(_At):
    """A center of a tree moves towards the vector that one below it has sent.

    Args:
        child: The sender.
        center: The center that moves.
        sharing: The centers below it.
    """

    child: int
    center: int
    sharing: int


@final
@dataclass(frozen=True)
class Return(_At):
    """The answer to a :class:`Forward` arrives, and its sender moves.

    Args:
        center: The sender.
    """

    center: int


@final
@dataclass(frozen=True)
class Failure(_At):
    """A worker dies; its vector drops out. What it has sent before counts.

    Args:
        worker: Which worker.
        ends_run: Whether the others end with it, as they do where each exchange needs all of them.
    """

    worker: int
    ends_run: bool


@final
@dataclass(frozen=True)
class Finish(_At):
    """A worker has made all its steps and its last exchange.

    Args:
        worker: Which worker.
        waited: Seconds in which it stood still for an exchange.
    """

    worker: int
    waited: float


Event: TypeAlias = Reduction | Exchange | Forward | Hop | Return | Failure | Finish
