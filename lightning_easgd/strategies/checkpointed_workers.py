"""Workers whose own states are kept with a checkpoint, so that a resumed run goes on exactly: free of a class tree."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_easgd.strategies.center_workers import CenterWorkers
from lightning_easgd.strategies.kept_states import KEY, Kept, KeptStates, edited_tensors
from lightning_easgd.strategies.lightning_private import (
    begins_epoch,
    fetches_next,
    renew_training_iterator,
    watch_fetching,
)
from lightning_easgd.strategies.worker_state import (
    EditedState,
    FetchObserver,
    StateSums,
    fingerprints,
    random_state,
    remove_sidecar,
    set_random_state,
)

__all__ = ["CheckpointedWorkers"]


class CheckpointedWorkers(KeptStates, CenterWorkers):
    """Workers around a center whose checkpoints hold, beside the center, each worker's own state.

    A checkpoint is one ordinary Lightning checkpoint whose weights are the center. Under the key ``"easgd"``, in
    tensors and primitives, it also holds the clocks, and for each worker: the parameters and buffers that are its own,
    optimizer and scheduler states, clocks, the state of the precision plugin (loss scale), of the loops and resumable
    data loaders, and of the random number generators. A checkpoint on an error or from a signal handler, which waits
    for nobody, holds the center and the clocks alone.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._resumed: Kept | None = None  # what to go on from, until training starts
        self._edits: EditedState | None = None  # of what was loaded, on rank 0
        self._sums: StateSums | None = None  # of what is being saved, on rank 0
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
            self._resumed = self._edits = self._sums = None
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

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state at the center. During training all ranks ask for it at the same point of their work."""
        state = super().lightning_module_state_dict()
        self._sums = StateSums(state) if self._training and self.is_global_zero and not self._alone else None
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, with the workers' states unless it is for weights only or cannot wait for all."""
        sums, self._sums = self._sums, None
        if "optimizer_states" not in checkpoint or not (self._training or self._final):
            super().save_checkpoint(checkpoint, filepath, storage_options)
        elif self._alone:
            checkpoint[KEY] = self._final["common"] if self._final else self._common_state({})
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            with self.worker_weights():
                averaging = self._final or self._averaging_state()
                states = self._states()
                kept = states.save(self._own_state(checkpoint, averaging), str(filepath))
                checkpoint[KEY] = averaging["common"] | kept
                if self.is_global_zero:
                    written = checkpoint["state_dict"]
                    checkpoint[KEY]["sums"] = (sums or StateSums(written)).saved(written)
                    checkpoint[KEY]["fingerprints"] = fingerprints(_progress(checkpoint))
                with self._written_or_discarded(states, str(filepath)):
                    super().save_checkpoint(checkpoint, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, and the files beside it."""
        super().remove_checkpoint(filepath)
        if self.local_rank == 0:
            remove_sidecar(str(filepath))

    def _common_state(self, center: Mapping[str, Any]) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._common_part(self.lightning_module, self._averagers, center)

    def _averaging_state(self) -> dict[str, Any]:
        """What checkpoints of this fit hold of its averaging, and this worker's own tensors, which the module shows."""
        assert self._averaging is not None
        assert self.lightning_module is not None
        wanted = self.worker_state != "none"
        return {
            "common": self._common_state({} if self._is_center_in_module else self._averaging.center_state_dict()),
            "tensors": self._own_tensors(self.lightning_module) if wanted else {},
            "averagers": [averager.state_dict() for averager in self._averagers] if wanted else [],
        }

    def _own_state(self, checkpoint: Mapping[str, Any], averaging: Mapping[str, Any]) -> dict[str, Any]:
        # Every rank's checkpoint holds its own optimizers, schedulers and loops; only that of rank 0 is written.
        return {
            "tensors": averaging["tensors"],
            "averagers": averaging["averagers"],
            **_progress(checkpoint),
            "precision": self.precision_plugin.state_dict(),
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
        kept = self._find(checkpoint.get(KEY), *self._read_from)
        if not kept.clocks:  # it was saved by another strategy
            steps = checkpoint.get("global_step", 0) // max(1, len(self.optimizers))
            kept = replace(kept, clocks=[steps] * len(self.optimizers))
        kept = self._resumed = self._with_edits(kept, _progress(checkpoint))
        if kept.sums is not None and self.is_global_zero:
            self._edits = EditedState(kept.sums, checkpoint["state_dict"], super().lightning_module_state_dict())
        super().load_optimizer_state_dict(checkpoint if kept.own is None else kept.own)
        if kept.own is not None:
            self._trainer.fit_loop.load_state_dict(kept.own["fit_loop"])
            self._begins_epoch = begins_epoch(self._trainer)

    def on_train_start(self) -> None:
        """Let the center begin where the workers are; go on where a checkpoint was saved."""
        kept, self._resumed = self._resumed, None
        self._trained_before = kept.trained if kept is not None and kept.own is not None else frozenset()
        super().on_train_start()
        self._final = None
        if not self._training or kept is None:
            return
        assert self._averaging is not None
        assert self.lightning_module is not None
        edited = self._edited(kept)
        self._start_center(kept, self.lightning_module, self._averaging, edited)
        self._restore(kept, self.lightning_module, self._averaging, edited)
        if kept.own is not None:
            self._go_on(kept.own)

    def _edited(self, kept: Kept) -> set[str]:
        """The names of the tensors that are not those that were saved, on all ranks as rank 0 sees them."""
        edits, self._edits = self._edits, None
        if kept.sums is None:
            return set()
        assert self.lightning_module is not None
        names: set[str] = set()
        if edits is not None:
            names = edited_tensors(self.lightning_module, edits.names(self.lightning_module.state_dict()))
        return set(self.broadcast(names))

    def _go_on(self, state: Mapping[str, Any]) -> None:
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
        if was_training and self.worker_state == "none":
            self._final = {"common": self._common_state({}), "tensors": {}, "averagers": []}
        elif was_training:
            assert self._averaging is not None
            with self.worker_weights():
                state = self._averaging_state()
                # Callbacks such as EMA may yet leave something else than the center in the module.
                state["common"]["center"] = self._averaging.center_state_dict()
                self._final = apply_to_collection(state, Tensor, _copy_on_host)


def _progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint is each worker's own, and of worker 0 what Lightning sees."""
    return {
        "optimizer_states": checkpoint["optimizer_states"],
        "lr_schedulers": checkpoint["lr_schedulers"],
        "fit_loop": checkpoint["loops"]["fit_loop"],
    }


def _copy_on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
