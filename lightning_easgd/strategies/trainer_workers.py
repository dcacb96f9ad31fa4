"""Workers around a center under a Trainer that may serve it: what would keep asynchronous ranks in step."""

from abc import abstractmethod
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_easgd.strategies.lightning_private import reads_common_clock
from lightning_easgd.strategies.recalibrated_workers import RecalibratedWorkers

__all__ = ["TrainerWorkers"]


class TrainerWorkers(RecalibratedWorkers):
    """Workers of a Trainer whose center may be a served one."""

    @property
    @abstractmethod
    def is_served(self) -> bool:
        """Whether the center is a served one."""

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if self.is_served and self._layer_sync is not None:
            raise ValueError(
                f"{type(self).__name__} with Trainer(sync_batchnorm=True): SyncBatchNorm communicates in every forward"
                " pass and asynchronous workers do not run in step; leave it out, the center's statistics are the"
                " workers' mean."
            )

    def setup(self, trainer: Any) -> None:
        """Set up as usual; refuse what adds parameters, and name what would keep asynchronous ranks in step.

        Raises:
            ValueError: If a callback such as ``BackboneFinetuning`` adds parameters to an optimizer in mid-training.
        """
        if trainer.state.fn == "fit" and self.is_served:
            for callback in trainer.callbacks:
                if "BaseFinetuning" in (cls.__name__ for cls in type(callback).__mro__):
                    raise ValueError(
                        f"{type(self).__name__} with {type(callback).__name__}: a finetuning callback gives the"
                        " optimizer parameters while it trains, and a served center has a fixed size. Use"
                        " EASGDStrategy(mode='sync'), or give the optimizer all parameters at the start and switch"
                        " their requires_grad in a callback of your own."
                    )
        super().setup(trainer)
        if trainer.state.fn == "fit" and self.is_served:
            for callback in trainer.callbacks:
                if reads_common_clock(callback):
                    rank_zero_warn(
                        f"{type(self).__name__}: {type(callback).__name__} asks all ranks for the time after every"
                        " batch, so that they run in step; leave out max_time and train_time_interval."
                    )
