"""Workers around a center whose BatchNorm statistics are estimated at the center, where that is asked for."""

import contextlib
from typing import Any

from lightning_easgd.strategies.checkpointed_workers import CheckpointedWorkers

__all__ = ["RecalibratedWorkers"]


class RecalibratedWorkers(CheckpointedWorkers):
    """Workers that bring :class:`~lightning_easgd.callbacks.RecalibrateBatchNorm` along with their strategy."""

    def __init__(self, *arguments: Any, recalibrate_batchnorm: int = 0, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        name = type(self).__name__
        if not isinstance(recalibrate_batchnorm, int) or isinstance(recalibrate_batchnorm, bool):
            raise TypeError(
                f"{name}(recalibrate_batchnorm={recalibrate_batchnorm!r}): give the number of mini-batches of each"
                " worker, an int."
            )
        if recalibrate_batchnorm < 0:
            raise ValueError(
                f"{name}(recalibrate_batchnorm={recalibrate_batchnorm}): give the number of mini-batches of each"
                " worker, or 0 to keep the mean of the workers' statistics."
            )
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self._recalibration: Any = None  # from setup to teardown of a fit

    def setup(self, trainer: Any) -> None:
        """Set up the workers, and the callback that estimates the statistics."""
        super().setup(trainer)
        if trainer.state.fn != "fit" or not self.recalibrate_batchnorm:
            return
        # It imports lightning.pytorch, whatever the tree of this class is.
        from lightning_easgd.strategies.batchnorm import RecalibrateBatchNorm  # noqa: PLC0415

        self._recalibration = RecalibrateBatchNorm(self.recalibrate_batchnorm)
        assert self.lightning_module is not None
        self._recalibration.setup(trainer, self.lightning_module, "fit")  # the others' has been called
        trainer.callbacks.insert(1, self._recalibration)  # the first is the strategy's own

    def teardown(self) -> None:
        """Undo :meth:`setup`."""
        trainer, recalibration = self._trainer, self._recalibration
        self._recalibration = None
        try:
            super().teardown()
        finally:
            if recalibration is not None:
                with contextlib.suppress(ValueError):
                    trainer.callbacks.remove(recalibration)
                recalibration.teardown(trainer, self.lightning_module, "fit")
