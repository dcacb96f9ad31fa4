"""The callback through which a strategy acts before all other callbacks."""

from typing import Any

__all__ = ["CenterHooks"]


class CenterHooks:
    """Calls the strategy before all other callbacks; Lightning calls a strategy's own hooks after them."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Show the center before other callbacks look at the module."""
        self._strategy.on_validation_start()

    def on_validation_batch_end(self, *_: Any) -> None:
        """Tell that this rank gets on."""
        self._strategy.note_progress()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Look at the epoch's data before other callbacks communicate."""
        self._strategy.on_train_epoch_start()

    def on_train_batch_start(self, *_: Any) -> None:
        """Tell the strategy before other callbacks draw random numbers."""
        self._strategy.note_progress()
        self._strategy.on_batch_fetched()

    def on_train_batch_end(self, *_: Any) -> None:
        """Meet before other callbacks communicate."""
        self._strategy.on_train_batch_end()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Meet before other callbacks communicate."""
        self._strategy.on_train_epoch_end()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Leave the center in the module before other callbacks write or read it."""
        self._strategy.on_train_end()
