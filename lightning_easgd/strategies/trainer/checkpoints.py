"""Checkpoints of a Trainer that hold, beside the center, each worker's own state, and resuming from them."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol, final

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.trainer.free_ranks import FreeRanks
from lightning_easgd.strategies.trainer.lightning_private import (
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
    set_random_state,
)
from lightning_easgd.strategies.worker_state.keeper import KEY, Kept, StateKeeper, edited_tensors

__all__ = ["TrainerCheckpoints"]

_OF_ONE_FILE = ("workers", "generation", "sums", "fingerprints")
"""What another checkpoint of the same state has anew."""


class Strategy(Protocol):
    """What checkpoints ask of the strategy."""

    precision_plugin: Any
    optimizers: list[Any]

    @property
    def root_device(self) -> torch.device: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def is_sharded(self) -> bool: ...
    @property
    def lightning_module(self) -> Any: ...
    def broadcast(self, obj: Any, src: int = 0) -> Any: ...
    def gather(self, obj: Any) -> list[Any]: ...
    def own_optimizer_states(self, checkpoint: Mapping[str, Any]) -> list[Any]: ...


@final
class TrainerCheckpoints:
    """The checkpoints of one fit: one ordinary Lightning checkpoint each, whose weights are the center.

    Under the key ``"easgd"``, in tensors and primitives, it also holds the clocks, and for each worker: the parameters
    and buffers that are its own, optimizer and scheduler states, clocks, the state of the precision plugin (loss
    scale), of the loops and resumable data loaders, and of the random number generators. A checkpoint on an error or
    from a signal handler, which waits for nobody, holds the center and the clocks alone.

    Args:
        strategy: The strategy, for its device, rank and precision plugin.
        keeper: Where the workers' states are kept.
        session: The averaging.
        ranks: This rank's fit.
    """

    def __init__(self, strategy: Strategy, keeper: StateKeeper, session: CenterSession, ranks: FreeRanks) -> None:
        self._strategy = strategy
        self._keeper = keeper
        self._of_session: CenterSession | None = session  # until the fit is torn down, as the ranks
        self._ranks: FreeRanks | None = ranks
        self._resumed: Kept | None = None  # what to go on from, until training starts
        self._read: dict[str, Any] | None = None  # what all workers share of that; a fit may have no steps left
        self._edits: EditedState | None = None  # of what was loaded, on rank 0
        self._sums: StateSums | None = None  # of what is being saved, on rank 0
        self._random: dict[str, Any] | None = None  # of the generators, to set when the first batch has been fetched
        self._final: dict[str, Any] | None = None  # of a fit that has ended
        self._begins_epoch = False  # the epoch that goes on, rather than to go on within it
        self._fetching = observer = FetchObserver()
        device = strategy.root_device
        self._end_watching: Callable[[], None] | None = watch_fetching(
            ranks.trainer, lambda: observer.fetch_begins(device), lambda: observer.fetch_ended(device)
        )

    def close(self) -> None:
        """Let go of the fit; what a later checkpoint needs is kept."""
        if self._end_watching is not None:
            self._end_watching()
            self._end_watching = None
        self._of_session = self._ranks = None

    @property
    def _session(self) -> CenterSession:
        assert self._of_session is not None
        return self._of_session

    @property
    def _trainer(self) -> Any:
        assert self._ranks is not None
        return self._ranks.trainer

    # Saving

    def note_state(self, state: Mapping[str, Any] | None) -> None:
        """The module's state at a meeting, which a checkpoint that is saved next may hold; None if there is none."""
        checks = self._strategy.is_global_zero and not self._strategy.is_sharded
        self._sums = StateSums(state) if state is not None and checks else None

    def save(
        self, checkpoint: dict[str, Any], path: str, write: Callable[[], None], *, training: bool, alone: bool
    ) -> None:
        """Write a checkpoint, with the workers' states unless it is for weights only or cannot wait for all.

        Args:
            checkpoint: Lightning's, to which this rank's part is added.
            path: Where it goes.
            write: Writes it, on rank 0.
            training: Whether exchanges may happen.
            alone: Whether this rank must not wait for the others, also in a run after the fit.
        """
        sums, self._sums = self._sums, None
        if "optimizer_states" not in checkpoint or not (training or self._final or self._read):
            write()
        elif alone:
            common = self._final["common"] if self._final else self._read
            checkpoint[KEY] = common or self._keeper.common(self._session, {})
            write()
        else:
            if training:
                self._session.agree_on_writes(self._strategy.gather)
            with nullcontext() if self._of_session is None else self._of_session.worker():
                common, own = self._state(checkpoint)
                states = self._keeper.states()
                checkpoint[KEY] = common if own is None else common | states.save(own, path)
                if self._strategy.is_global_zero and not self._strategy.is_sharded:
                    written = checkpoint["state_dict"]
                    checkpoint[KEY]["sums"] = self._with_edits((sums or StateSums(written)).saved(written))
                    checkpoint[KEY]["fingerprints"] = fingerprints(_progress(checkpoint))
                with self._keeper.written_or_discarded(states, path):
                    write()

    def end_training(self) -> None:
        """Keep what a later checkpoint of this fit needs; the module shows the center, or what callbacks want there."""
        if not self._keeper.keeps_workers:
            common = self._keeper.common(self._session, self._center())
            state: dict[str, Any] = {"common": common, "parts": {}, "tensors": {}, "averagers": []}
            self._final = apply_to_collection(state, Tensor, _copy_on_host)
            return
        with self._session.worker():
            state = self._averaging_state()
            # Callbacks such as EMA may yet leave something else than the center in the module.
            state["parts" if self._strategy.is_sharded else "common"]["center"] = (
                self._session.averaging.center_state_dict()
            )
            self._final = apply_to_collection(state, Tensor, _copy_on_host)

    def _state(self, checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """What a checkpoint holds for all workers, and this worker's own; None if that is not known."""
        if self._read is not None:  # no step has been made since
            assert self._resumed is not None
            return self._read, None if self._resumed.own is None else dict(self._resumed.own)
        averaging = self._final or self._averaging_state()
        return averaging["common"], self._own_state(checkpoint, averaging)

    def _with_edits(self, sums: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        """The sums of a module's state; what was edited in the checkpoint that was read is so in the next one, too."""
        if self._read is None or self._edits is None:
            return sums
        return self._edits.handed_on(sums, self._strategy.lightning_module.state_dict())

    def _averaging_state(self) -> dict[str, Any]:
        """What checkpoints of this fit hold of its averaging, and this worker's own tensors, which the module shows."""
        session, wanted = self._session, self._keeper.keeps_workers
        center, sharded = self._center(), self._strategy.is_sharded
        return {
            "common": self._keeper.common(session, {} if sharded else center),
            "parts": {"center": center, "layouts": self._keeper.layouts(session)} if sharded else {},
            "tensors": self._keeper.own_tensors(session) if wanted else {},
            "averagers": [averager.state_dict() for averager in session.averagers] if wanted else [],
        }

    def _center(self) -> dict[str, Any]:
        """What the center is beyond the module's state."""
        return {} if self._session.is_center_in_module else self._session.averaging.center_state_dict()

    def _own_state(self, checkpoint: Mapping[str, Any], averaging: Mapping[str, Any]) -> dict[str, Any]:
        # Every rank's checkpoint holds its own optimizers, schedulers and loops; only that of rank 0 is written.
        return {
            "tensors": averaging["tensors"],
            "averagers": averaging["averagers"],
            **({"parts": averaging["parts"]} if averaging["parts"] else {}),
            **_progress(checkpoint),
            "optimizer_states": self._strategy.own_optimizer_states(checkpoint),
            "precision": self._strategy.precision_plugin.state_dict(),
            "random": self._random_outside or random_state(self._strategy.root_device),
            "fetching_draws": self._fetching.draws,
        }

    @property
    def _random_outside(self) -> dict[str, Any] | None:
        return None if self._ranks is None else self._ranks.random_outside

    # Resuming, in the order in which Lightning comes by

    def find(self, checkpoint: Mapping[str, Any], path: str, weights_only: bool | None) -> Mapping[str, Any]:
        """Find what this worker had where a checkpoint was saved; its module's state has been loaded.

        Returns:
            What holds the optimizers' states that this worker goes on with: its own, or else the checkpoint.
        """
        saved = checkpoint.get(KEY)
        self._read = None if saved is None else {name: saved[name] for name in saved if name not in _OF_ONE_FILE}
        kept = self._keeper.find(saved, path, weights_only)
        optimizers = self._strategy.optimizers
        if not kept.clocks:  # it was saved by another strategy
            steps = checkpoint.get("global_step", 0) // max(1, len(optimizers))
            kept = replace(kept, clocks=[steps] * len(optimizers))
        if kept.fingerprints is not None:
            kept = self._keeper.with_edits(kept, _progress(checkpoint))
        self._resumed = kept
        if kept.sums is not None and self._strategy.is_global_zero:
            module = self._strategy.lightning_module
            assert module is not None
            self._edits = EditedState(kept.sums, checkpoint["state_dict"], module.state_dict())
        return checkpoint if kept.own is None else kept.own

    def restore_loops(self) -> None:
        """Let the loops go on where this worker's were."""
        if self._resumed is not None and self._resumed.own is not None:
            self._trainer.fit_loop.load_state_dict(self._resumed.own["fit_loop"])
            self._begins_epoch = begins_epoch(self._trainer)

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that have been averaged in the run that is resumed."""
        kept = self._resumed
        return kept.trained if kept is not None and kept.own is not None else frozenset()

    def resume(self) -> None:
        """Go on where a checkpoint was saved, if one has been found; the session has been started."""
        kept, self._resumed = self._resumed, None
        self._final = self._read = None
        if kept is None:
            return
        edited = self._edited(kept)
        self._keeper.start_center(kept, self._session, edited)
        self._keeper.restore(kept, self._session, edited)
        if kept.own is not None:
            self._go_on(kept.own)

    def _edited(self, kept: Kept) -> set[str]:
        """The names of the tensors that are not those that were saved, on all ranks as rank 0 sees them."""
        edits, self._edits = self._edits, None
        if kept.sums is None:
            return set()
        names: set[str] = set()
        if edits is not None:
            module = self._session.module
            names = edited_tensors(module, edits.names(module.state_dict()))
        return set(self._strategy.broadcast(names))

    def _go_on(self, state: Mapping[str, Any]) -> None:
        # As Lightning does it, a scheduler that has come since begins anew.
        for config, own in zip(self._trainer.lr_scheduler_configs, state["lr_schedulers"], strict=False):
            config.scheduler.load_state_dict(own)
        if state["precision"]:
            self._strategy.precision_plugin.load_state_dict(state["precision"])
        set_random_state(state["random"], self._strategy.root_device)
        self._fetching.draws = state["fetching_draws"]  # until it is seen again
        if self._begins_epoch:
            renew_training_iterator(self._trainer)  # its order is drawn from the generators
        elif fetches_next(self._trainer) and not state["fetching_draws"]:
            self._random = state["random"]

    def batch_fetched(self) -> None:
        """A batch has been fetched: the generators go on where this worker's were."""
        if self._random is not None:
            set_random_state(self._random, self._strategy.root_device)
            self._random = None


def _progress(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint is each worker's own, and of worker 0 what Lightning sees."""
    return {
        "optimizer_states": checkpoint["optimizer_states"],
        "lr_schedulers": checkpoint["lr_schedulers"],
        "fit_loop": checkpoint["loops"]["fit_loop"],
    }


def _copy_on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()
