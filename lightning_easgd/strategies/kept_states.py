"""Keeping each worker's own state with a checkpoint, under a Trainer and under Fabric."""

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_easgd.checkpointing import (
    EmbeddedStates,
    NoStates,
    SidecarStates,
    WorkerStates,
    read_worker_state,
    sidecar_folder,
)

__all__ = ["KEY", "KeptStates", "WorkerState", "named_tensors"]

WorkerState = Literal["embed", "sidecar", "none"]

KEY = "easgd"
"""The key of a checkpoint under which all lies that is not Lightning's."""

_FORMAT = 1

if TYPE_CHECKING:

    class _Base:
        """What the strategies of each tree have."""

        _timeout: timedelta | None

        def __init__(self, *arguments: Any, **keywords: Any) -> None: ...
        @property
        def world_size(self) -> int: ...
        @property
        def global_rank(self) -> int: ...
        def broadcast(self, obj: Any, src: int = 0) -> Any: ...
        def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool: ...
else:
    _Base = object


class KeptStates(_Base):
    """Says where the workers' states are kept, and which of them a resumed worker may go on from."""

    _same_everywhere: frozenset[str] = frozenset()  # names of tensors that no averager holds, at the last meeting
    _method: ClassVar[str]
    """Workers of one method can go on where workers of the same method stopped."""

    def __init__(self, *arguments: Any, worker_state: str = "embed", **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if worker_state not in ("embed", "sidecar", "none"):
            raise ValueError(
                f"{type(self).__name__}(worker_state={worker_state!r}): unknown; use 'embed' (inside the checkpoint),"
                " 'sidecar' (one file of each worker beside it, for large models) or 'none'."
            )
        self.worker_state = worker_state
        self._generations: dict[str, str] = {}  # that the checkpoints name, by the folder beside each

    def _keep(self, center: Mapping[str, Any], state: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Keep the workers' states; returns what rank 0 puts into the checkpoint under :data:`KEY`."""
        return {
            "format": _FORMAT,
            "method": self._method,
            "world_size": self.world_size,
            "center": center,
            **self._states().save(dict(state), path),
        }

    def _states(self) -> WorkerStates:
        assert self._timeout is not None
        if self.worker_state == "none" or (self.world_size > 1 and not dist.is_initialized()):  # a worker is lost
            return NoStates()
        if self.worker_state == "embed":
            return EmbeddedStates(self._timeout)
        return SidecarStates(self.global_rank, self.broadcast, self.reduce_boolean_decision, self._generations)

    def _find(
        self, saved: Mapping[str, Any] | None, path: str, weights_only: bool | None = None
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The center's state and this worker's, as far as all workers can go on from theirs."""
        if saved is None:
            return {}, None
        at_center = f"{path}: every worker starts at the center, with the optimizer state of worker 0"
        if saved["method"] != self._method:
            rank_zero_warn(f"{at_center}: the checkpoint was saved by workers of another method, {saved['method']}.")
            return {}, None
        center = saved["center"]
        if self.worker_state == "none":
            return center, None
        if saved["world_size"] != self.world_size:
            rank_zero_warn(
                f"{at_center}: the checkpoint was saved by {saved['world_size']} workers, and now there are"
                f" {self.world_size}."
            )
            return center, None
        if "generation" in saved:
            self._generations[sidecar_folder(path)] = saved["generation"]
        state = read_worker_state(dict(saved), path, self.global_rank, weights_only)
        if self.reduce_boolean_decision(state is not None):
            return center, state
        if "workers" in saved or "generation" in saved:
            rank_zero_warn(f"{at_center}: the state of a worker is missing or torn.")
        else:
            rank_zero_info(f"{at_center}: it holds no worker's own state.")
        return center, None


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not part of the module's state."""
    return {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}
