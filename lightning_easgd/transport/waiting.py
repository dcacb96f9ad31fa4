"""How a process waits for others: it asks, pauses, looks at whether they live, and at the end says what it knows."""

import time
from collections.abc import Callable

__all__ = ["in_vain", "wait_until"]

_FIRST_PAUSE = 20e-6  # seconds
_BETWEEN_LOOKS = 0.05  # seconds
_LONGEST_STEP = 1.0  # seconds from one question to the next that count as waiting


def wait_until(
    is_done: Callable[[], bool],
    timeout: float,
    *,
    longest_pause: float = 1e-3,
    look: Callable[[float], None] = lambda _: None,
) -> bool:
    """Return when something has come about, or the time is up.

    Time in which this process did not run itself is no time for which another has kept it waiting: one who was stopped
    by a signal does not find its deadlines passed when it goes on.

    Args:
        is_done: Whether it has come about. Asked at once, and then after pauses that grow, as an answer that does not
            come soon may be long in coming.
        timeout: Seconds; infinite if ``look`` ends the waiting.
        longest_pause: Seconds of the longest pause.
        look: Called several times a second with the seconds waited; raises if those who are waited for are lost.

    Returns:
        Whether it has come about.
    """
    if is_done():
        return True
    waited, next_look, pause = 0.0, _BETWEEN_LOOKS, min(_FIRST_PAUSE, longest_pause)
    last = time.monotonic()
    while True:
        if waited >= next_look:
            look(waited)
            next_look = waited + _BETWEEN_LOOKS
        if waited >= timeout:
            return False
        time.sleep(pause)
        if is_done():
            return True
        now = time.monotonic()
        waited += min(now - last, _LONGEST_STEP)
        last, pause = now, min(2 * pause, longest_pause)


def in_vain(
    who: str, what: str, waited: float, known: str, remedy: str = "Look for the first error among the ranks."
) -> str:
    """The text of an error after which nobody waits any more.

    Args:
        who: Who has waited, with the argument that says for how long: ``"Class(timeout=…)"``.
        what: For what.
        waited: Seconds.
        known: What is known of those who did not come.
        remedy: What to do.
    """
    return f"{who}: {what} failed after this worker had waited {waited:.1f} s; {known}. {remedy}"
