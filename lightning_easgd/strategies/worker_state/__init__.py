"""What a checkpoint holds beside the center: each worker's own state."""

from lightning_easgd.strategies.worker_state.fingerprints import fingerprints, with_edits
from lightning_easgd.strategies.worker_state.gathering import gather_states
from lightning_easgd.strategies.worker_state.layouts import Layout, merged
from lightning_easgd.strategies.worker_state.random_state import (
    FetchObserver,
    random_state,
    set_random_state,
)
from lightning_easgd.strategies.worker_state.state_sums import EditedState, StateSums
from lightning_easgd.strategies.worker_state.worker_states import (
    EmbeddedStates,
    NoStates,
    SidecarStates,
    WorkerStates,
    read_worker_state,
    remove_sidecar,
    sidecar_folder,
)

__all__ = [
    "EditedState",
    "EmbeddedStates",
    "FetchObserver",
    "Layout",
    "NoStates",
    "SidecarStates",
    "StateSums",
    "WorkerStates",
    "fingerprints",
    "gather_states",
    "merged",
    "random_state",
    "read_worker_state",
    "remove_sidecar",
    "set_random_state",
    "sidecar_folder",
    "with_edits",
]
