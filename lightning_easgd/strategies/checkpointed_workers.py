"""Workers whose own states are kept with a checkpoint, so that a resumed run goes on exactly: free of a class tree."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_easgd._compat import begins_epoch, fetches_next, renew_training_iterator, watch_fetching
from lightning_easgd.checkpointing import FetchObserver, random_state, remove_sidecar, set_random_state
from lightning_easgd.strategies.center_workers import CenterWorkers
from lightning_easgd.strategies.kept_states import KEY, KeptStates, named_tensors

__all__ = ["CheckpointedWorkers"]


class CheckpointedWorkers(KeptStates, CenterWorkers):
    """Workers around a center whose checkpoints hold, beside the center, each worker's own state.

    A checkpoint is one ordinary Lightning checkpoint whose weights are the center. Under the key ``"easgd"``, in
    tensors and primitives, it also holds for each worker: parameters and buffers, optimizer and scheduler states,
    clocks, the state of the precision plugin (loss scale), of the loops and resumable data loaders, and of the random
    number generators.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._resumed: dict[str, Any] | None = None  # the own state to go on from, until training starts
        self._resumed_center: dict[str, Any] = {}
        self._random: dict[str, Any] | None = None  # of the generators, to set when the first batch has been fetched
        self._fetching = FetchObserver()
        self._end_watching: Callable[[], None] | None = None
        self._final: dict[str, Any] | None = None  # of a fit that has ended
        self._begins_epoch = False  # the epoch that goes on, rather than to go on within it
        self._read_from: tuple[str, bool | None] = ("", None)

    def setup(self, trainer: Any) -> None:
        """Set up the workers; a fit knows nothing of the one before it, which may have ended anywhere."""
        super().setup(trainer)
        if trainer.state.fn == "fit":
            self._resumed, self._resumed_center = None, {}
            self._random = self._final = None
            device, observer = self.root_device, self._fetching
            self._end_watching = watch_fetching(
                trainer, lambda: observer.fetch_begins(device), lambda: observer.fetch_ended(device)
            )

    def teardown(self) -> None:
        """Undo :meth:`setup`."""
        if self._end_watching is not None:
            self._end_watching()
            self._end_watching = None
        super().teardown()

    # Saving

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, with the workers' states unless it is for weights only or cannot wait for all."""
        if self._alone or "optimizer_states" not in checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        with self.worker_weights():
            averaging = self._averaging_state() if self._training else self._final
            if averaging is not None:
                own = self._own_state(checkpoint, averaging)
                checkpoint[KEY] = self._keep(averaging["center"], own, str(filepath))
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, and the files beside it."""
        super().remove_checkpoint(filepath)
        if self.local_rank == 0:
            remove_sidecar(str(filepath))

    def _averaging_state(self) -> dict[str, Any]:
        """This worker's parameters and what its averaging knows, and the center."""
        assert self._averaging is not None
        assert self.lightning_module is not None
        return {
            "center": {} if self._is_center_in_module else self._averaging.center_state_dict(),
            "tensors": named_tensors(self.lightning_module),
            "averagers": [averager.state_dict() for averager in self._averagers],
        }

    def _own_state(self, checkpoint: Mapping[str, Any], averaging: Mapping[str, Any]) -> dict[str, Any]:
        # Every rank's checkpoint holds its own optimizers, schedulers and loops; only that of rank 0 is written.
        return {
            "tensors": averaging["tensors"],
            "averagers": averaging["averagers"],
            "optimizer_states": checkpoint["optimizer_states"],
            "lr_schedulers": checkpoint["lr_schedulers"],
            "precision": self.precision_plugin.state_dict(),
            "fit_loop": checkpoint["loops"]["fit_loop"],
            "random": self._random_outside or random_state(self.root_device),
            "fetching_draws": self._fetching.draws,
        }

    # Resuming

    def load_checkpoint(self, checkpoint_path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        checkpoint = super().load_checkpoint(checkpoint_path, *arguments, **keywords)
        self._read_from = (str(checkpoint_path), keywords.get("weights_only"))
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what this worker had where the checkpoint was saved, else what worker 0 had."""
        self._resumed_center, self._resumed = self._find(checkpoint.get(KEY), *self._read_from)
        super().load_optimizer_state_dict(checkpoint if self._resumed is None else self._resumed)
        if self._resumed is not None:
            self._trainer.fit_loop.load_state_dict(self._resumed["fit_loop"])
            self._begins_epoch = begins_epoch(self._trainer)

    def on_train_start(self) -> None:
        """Let the center begin where the workers are; go on where a checkpoint was saved."""
        super().on_train_start()
        resumed, self._resumed = self._resumed, None
        center, self._resumed_center = self._resumed_center, {}
        self._final = None
        if not self._training:
            return
        assert self._averaging is not None
        if center:
            self._averaging.load_center_state_dict(center)
            for averager in self._averagers:
                averager.start_at_center()
        if resumed is not None:
            self._go_on(resumed)

    @torch.no_grad()
    def _go_on(self, state: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        tensors = named_tensors(self.lightning_module)
        for name in tensors.keys() & state["tensors"].keys():
            tensors[name].copy_(state["tensors"][name])
        if new := sorted(tensors.keys() - state["tensors"].keys()):
            rank_zero_warn(
                f"{type(self).__name__}: {', '.join(new)} had other names, or did not exist, where the checkpoint was"
                " saved, and start at the center."
            )
        for averager, own in zip(self._averagers, state["averagers"], strict=True):
            averager.load_state_dict(own)
        # As Lightning does it, a scheduler that has come since begins anew.
        for config, own in zip(self._trainer.lr_scheduler_configs, state["lr_schedulers"], strict=False):
            config.scheduler.load_state_dict(own)
        if state["precision"]:
            self.precision_plugin.load_state_dict(state["precision"])
        set_random_state(state["random"], self.root_device)
        self._fetching.draws = state["fetching_draws"]  # until it is seen again
        if self._begins_epoch:
            renew_training_iterator(self._trainer)  # its order is drawn from the generators
        elif fetches_next(self._trainer) and not state["fetching_draws"]:
            self._random = state["random"]

    def on_batch_fetched(self) -> None:
        """A batch has been fetched."""
        if self._random is not None:
            set_random_state(self._random, self.root_device)
            self._random = None

    # A checkpoint of a fit that has ended

    def on_train_end(self) -> None:
        """Let all ranks finish; keep what a later checkpoint of this fit needs, and leave the center in the module."""
        was_training = self._training
        super().on_train_end()
        if was_training and self.worker_state != "none":
            assert self._averaging is not None
            with self.worker_weights():
                # Callbacks such as EMA may yet leave something else than the center in the module.
                state = self._averaging_state() | {"center": self._averaging.center_state_dict()}
                self._final = apply_to_collection(state, Tensor, _copy_on_host)


def _copy_on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
