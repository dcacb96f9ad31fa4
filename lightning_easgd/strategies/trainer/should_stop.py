"""``trainer.should_stop`` of one rank of a worker that has several."""

from typing import Any, final

from lightning_easgd.averagers import Averaging
from lightning_easgd.strategies.trainer.lightning_private import reads_common_clock

__all__ = ["ShouldStop"]


@final
class ShouldStop:
    """What a rank sets, alone as far as it knows: a wish that all ranks end their training at one step.

    Ranks of a worker make their steps together, so that none can end alone. The wish rides on the headers of exchanges
    and meetings as SIGTERM does, and counts within two periods. What ranks have decided together, as ``Timer`` and
    ``EarlyStopping`` do, ends them at once.

    Args:
        trainer: The Trainer.
        averaging: What carries the wish.
    """

    def __init__(self, trainer: Any, averaging: Averaging) -> None:
        self._trainer = trainer
        self._averaging = averaging
        self._is_of_all = False

    def begin_batch(self) -> None:
        """A batch begins; what is set now the Trainer knows."""
        self._is_of_all = self._trainer.should_stop

    def note_decision(self, decision: bool) -> None:
        """Ranks have decided something together."""
        self._is_of_all |= decision

    def note_broadcast(self, value: object) -> None:
        """Ranks have heard a value of one of them, which may say that its time is over."""
        self._is_of_all |= value is True and any(map(reads_common_clock, self._trainer.callbacks))

    def ask(self) -> None:
        """Ask all for what has been set, before the Trainer looks."""
        if self._trainer.should_stop and not self._is_of_all:
            self._trainer.should_stop = False
            self._averaging.request_end()

    def hear(self) -> None:
        """End here, if all know of a rank that wishes to."""
        if self._averaging.end_agreed:
            self._is_of_all = self._trainer.should_stop = True
