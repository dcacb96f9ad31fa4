"""What ranks say of themselves a few times a second, and what can be concluded from it."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

__all__ = ["Heartbeats", "alive", "dead", "left"]

_ALIVE, _LEFT, _DEAD = "alive", "left", "dead"


def alive(beat: int, moves: int) -> str:
    """The state of a rank that lives.

    Args:
        beat: Of the thread that says so.
        moves: How often the rank's main thread has shown that it gets on.
    """
    return f"{_ALIVE} {beat} {moves}"


def left() -> str:
    """The state of a rank that has left in good order."""
    return _LEFT


def dead(reason: str = "") -> str:
    """The state of a rank that has failed, or was seen to have died, and why."""
    return f"{_DEAD} {reason}"


@final
class Heartbeats:
    """The states of all ranks as they were last seen, and since when they have not changed.

    Silence is measured up to the last look, not up to now: nothing is known of a rank while the store does not answer.

    Args:
        ranks: The ranks.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.seen = time.monotonic()
        self._states = {rank: _State("", 0, self.seen, self.seen) for rank in ranks}

    def see(self, states: Mapping[int, str]) -> None:
        """Take notice of the states that the ranks have now."""
        self.seen = time.monotonic()
        for rank, text in states.items():
            known = self._states[rank]
            if text != known.text:
                moves = int(text.split(" ")[2]) if text.startswith(_ALIVE) else known.moves
                moved = self.seen if moves != known.moves else known.moved
                self._states[rank] = _State(text, moves, self.seen, moved)

    @property
    def left(self) -> frozenset[int]:
        """The ranks that have left in good order."""
        return frozenset(rank for rank, state in self._states.items() if state.text == _LEFT)

    @property
    def dead(self) -> dict[int, str]:
        """The ranks that have failed, or of which others say that they have died; with the reason, or an empty text."""
        dead = {rank: state.text for rank, state in self._states.items() if state.text.startswith(_DEAD)}
        return {rank: text.partition(" ")[2] for rank, text in dead.items()}

    def unheard(self, seconds: float) -> frozenset[int]:
        """The ranks whose heartbeat has not changed for so long: their processes do not run, or are cut off."""
        return frozenset(rank for rank, state in self._states.items() if self.seen - state.heard > seconds)

    def unmoved(self, seconds: float) -> frozenset[int]:
        """The ranks whose main thread has not got on for so long."""
        return frozenset(rank for rank, state in self._states.items() if self.seen - state.moved > seconds)


@final
@dataclass(frozen=True)
class _State:
    text: str
    moves: int
    heard: float  # when the text last changed
    moved: float
