"""Keeping each worker's own state with a checkpoint, under a Trainer and under Fabric: the one owner of the format."""

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import chain
from typing import Any, Literal, Protocol, final

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.averagers import Averager, Averaging
from lightning_easgd.method.rules import CenterRule
from lightning_easgd.strategies.session import CenterSession
from lightning_easgd.strategies.worker_state import (
    EmbeddedStates,
    Layout,
    NoStates,
    SidecarStates,
    WorkerStates,
    fingerprints,
    merged,
    read_worker_state,
    sidecar_folder,
    with_edits,
)
from lightning_easgd.tensors.flat_tensors import as_real
from lightning_easgd.tensors.shards import local
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = ["KEY", "Kept", "StateKeeper", "WorkerState", "edited_tensors", "named_tensors"]

WorkerState = Literal["embed", "sidecar", "none"]

KEY = "easgd"
"""The key of a checkpoint under which all lies that is not Lightning's."""

_FORMAT = 1


class Ranks(Protocol):
    """What a keeper asks of the strategy that owns it."""

    @property
    def rule(self) -> CenterRule: ...
    @property
    def world_size(self) -> int: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def layout(self) -> WorkerLayout: ...
    @property
    def worker_shape(self) -> tuple[int, ...]: ...
    @property
    def is_sharded(self) -> bool: ...
    @property
    def replica_id(self) -> int | None: ...
    def broadcast(self, obj: Any, src: int = 0) -> Any: ...
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool: ...


@dataclass(frozen=True)
class Kept:
    """What a checkpoint keeps for a worker beside the module's state.

    Attributes:
        center: What the center is beyond the parameters' values at the center.
        center_in_parts: Whether each rank has its own part of that, where the checkpoint was saved or here.
        stores: What each store of the center is; None if that is not known.
        clocks: The clock of each optimizer.
        layouts: The layout of each optimizer's flat vectors; None if that is not known.
        shared: The tensors that no worker has of its own: they are what the module's state says.
        sums: The checksums of the module's state; None if they are not known.
        exchanged: Of each optimizer, whether workers had exchanged with its center; before, the module's state is their
            mean. None for all.
        trained: Names of the parameters that were averaged.
        fingerprints: Of the state that Lightning sees and each worker has of its own; None if they are not known.
        own: This worker's own state, if all workers can go on from theirs.
    """

    center: Mapping[str, Any] = field(default_factory=dict)
    center_in_parts: bool = False
    stores: Sequence[str] | None = None
    clocks: Sequence[int] = ()
    layouts: Sequence[Layout] | None = None
    shared: frozenset[str] = frozenset()
    sums: Mapping[str, Any] | None = None
    exchanged: Sequence[bool] | None = None
    trained: frozenset[str] = frozenset()
    fingerprints: Mapping[str, Any] | None = None
    own: Mapping[str, Any] | None = None


@final
class StateKeeper:
    """Says where the workers' states are kept, and which of them a resumed worker may go on from.

    Args:
        strategy: The strategy; its class's name stands in errors.
        method: Workers of one method can go on where workers of the same method stopped.
        worker_state: "embed" (inside the checkpoint), "sidecar" (one file of each worker beside it) or "none".
        timeout: How long to wait for the slowest rank.

    Raises:
        ValueError: If ``worker_state`` is unknown.
    """

    def __init__(self, strategy: Ranks, method: str, worker_state: str, timeout: timedelta) -> None:
        self._name = type(strategy).__name__
        if worker_state not in ("embed", "sidecar", "none"):
            raise ValueError(
                f"{self._name}(worker_state={worker_state!r}): unknown; use 'embed' (inside the checkpoint),"
                " 'sidecar' (one file of each worker beside it, for large models) or 'none'."
            )
        self._ranks = strategy
        self._method = method
        self._worker_state = worker_state
        self._timeout = timeout
        self._generations: dict[str, str] = {}  # that the checkpoints name, by the folder beside each

    @property
    def keeps_workers(self) -> bool:
        """Whether each worker's own state is kept."""
        return self._worker_state != "none"

    # Saving

    def common(self, session: CenterSession, center: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds under :data:`KEY` whether or not the workers' own states are kept."""
        module, averagers = session.module, session.averagers
        shape = self._ranks.worker_shape
        return {
            "format": _FORMAT,
            "method": self._method,
            "world_size": self._ranks.world_size,
            **({} if shape == (1,) else {"worker_shape": list(shape)}),
            "center": center,
            "exchanged": [averager.has_exchanged for averager in averagers],
            "trained": sorted(_names_of_averaged(module, averagers)),
            "stores": list(self._ranks.rule.names),
            "clocks": [averager.clock for averager in averagers],
            "layouts": self.layouts(session),
            "shared": sorted(_shared_tensors(session)),
            **({} if self._ranks.replica_id is None else {"replica_id": self._ranks.replica_id}),
        }

    def layouts(self, session: CenterSession) -> list[list[tuple[str, int]]]:
        """The layout of each optimizer's flat vectors on this rank."""
        return [list(layout) for layout in layouts_of(session.module, session.averagers)]

    def own_tensors(self, session: CenterSession) -> dict[str, Tensor]:
        """The tensors that are each worker's own."""
        shared = _shared_tensors(session)
        return {name: tensor for name, tensor in named_tensors(session.module).items() if name not in shared}

    def states(self) -> WorkerStates:
        """Where the workers' states of the next checkpoint go."""
        if not self.keeps_workers or (self._ranks.world_size > 1 and not dist.is_initialized()):  # a worker is lost
            return NoStates()
        if self._worker_state == "embed":
            return EmbeddedStates(self._name, self._timeout, self._ranks.layout)
        return SidecarStates(
            self._name,
            self._ranks.global_rank,
            self._ranks.broadcast,
            self._ranks.reduce_boolean_decision,
            self._generations,
        )

    @contextlib.contextmanager
    def written_or_discarded(self, states: WorkerStates, path: str) -> Iterator[None]:
        """Context in which rank 0 writes the checkpoint; if it cannot, all ranks end, and without what they kept."""
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        # A worker is lost where the ranks' group is gone: rank 0 alone knows whether it could write.
        together = self._ranks.world_size == 1 or dist.is_initialized()
        if self._ranks.reduce_boolean_decision(problem is None) if together else problem is None:
            return
        states.discard()
        if problem is not None:
            raise problem
        raise RuntimeError(
            f"{self._name}: rank 0 could not write the checkpoint {path!r}; look for its error. The previous"
            " one is whole."
        )

    # Resuming

    def find(self, saved: Mapping[str, Any] | None, path: str, weights_only: bool | None = None) -> Kept:
        """What a checkpoint keeps for this worker, as far as all workers can go on from theirs."""
        if saved is None:
            return Kept()
        at_center = f"{path}: every worker starts at the center, with the optimizer state of worker 0"
        clocks = _clocks(saved)
        if saved["method"] != self._method:
            rank_zero_warn(f"{at_center}: the checkpoint was saved by workers of another method, {saved['method']}.")
            return Kept(clocks=clocks)
        common = Kept(
            center_in_parts=self._ranks.is_sharded or len(saved.get("worker_shape", [1])) > 1,
            center={} if self._ranks.is_sharded else saved["center"],  # a rank's part of it is in that rank's own
            stores=saved.get("stores"),
            clocks=clocks,
            layouts=saved.get("layouts"),
            shared=frozenset(saved.get("shared", ())),
            sums=None if self._ranks.is_sharded else saved.get("sums"),
            exchanged=saved.get("exchanged"),
            trained=frozenset(saved.get("trained", ())),
            fingerprints=None if self._ranks.is_sharded else saved.get("fingerprints"),
        )
        if not self.keeps_workers:
            return common
        before = _described(saved["world_size"], saved.get("worker_shape", [1]), saved.get("replica_id"))
        now = _described(self._ranks.world_size, self._ranks.worker_shape, self._ranks.replica_id)
        if before != now:
            rank_zero_warn(f"{at_center}: the checkpoint was saved by {before}, and now there are {now}.")
            return common
        if "generation" in saved:
            self._generations[sidecar_folder(path)] = saved["generation"]
        state = read_worker_state(dict(saved), path, self._ranks.global_rank, weights_only)
        if self._ranks.reduce_boolean_decision(state is not None):
            assert state is not None
            return replace(common, own=state, **state.get("parts", {}))
        what = (
            "the state of a worker is missing or torn"
            if "workers" in saved or "generation" in saved
            else ("it holds no worker's own state")
        )
        rank_zero_warn(f"{at_center}: {what}.")
        return common

    def with_edits(self, kept: Kept, loaded: Mapping[str, Any]) -> Kept:
        """The same, but in this worker's state what has been edited in the common one since it was saved.

        Args:
            kept: What the checkpoint keeps.
            loaded: The state that all workers see, under the names that it has in a worker's own.
        """
        if kept.own is None or kept.fingerprints is None:
            return kept
        mine = {name: kept.own[name] for name in loaded}
        merged, edited = with_edits(mine, loaded, kept.fingerprints, fingerprints(loaded))
        if edited:
            rank_zero_warn(
                f"{self._name}: {', '.join(edited)} changed since the checkpoint was saved, and every worker"
                " goes on with what is there now."
            )
        return replace(kept, own={**kept.own, **merged})

    def start_center(self, kept: Kept, session: CenterSession, edited: Collection[str]) -> None:
        """Let the center begin where it was saved, edited tensors where the module is, and the workers there."""
        module, averaging, averagers = session.module, session.averaging, session.averagers
        if kept.stores is not None and self._ranks.rule.has_memory:
            self._warn_of_what_begins_anew(kept, kept.stores)
        if averagers and kept.center:
            layouts = layouts_of(module, averagers)
            if kept.own is None:  # the mean of workers that had not exchanged yet is more than where they began
                apart = zip(kept.layouts or layouts, kept.exchanged or (), strict=False)
                edited = {*edited, *(name for layout, exchanged in apart if not exchanged for name, _ in layout)}
            averaging.load_center_state_dict(_center_of(kept, averaging, layouts, self._ranks.rule.names, edited))
            for averager in averagers:
                averager.start_at_center()

    def _warn_of_what_begins_anew(self, kept: Kept, stores: Sequence[str]) -> None:
        rule = self._ranks.rule
        kind = type(rule).__name__
        if kept.center_in_parts and not kept.center:
            what = (
                "of sharded workers each rank's part of the center goes with the rank's own state, which is not gone"
                f" on from here, and there is only what the module shows; what else {kind} keeps begins anew"
            )
        elif list(stores) != list(rule.names):
            others = [*(name for name in rule.names if name not in stores), "the count of exchanges"]
            verb = "begins" if len(others) == 1 else "begin"
            what = (
                f"the checkpoint was saved with another rule of the center, with the stores {', '.join(stores)}: of"
                f" {kind} {' and '.join(others)} {verb} anew"
            )
        elif not kept.center.get("versions"):
            what = (
                "the checkpoint, of another rule or saved on an error or by a signal, holds of the center only what the"
                f" module shows; what else {kind} keeps begins anew"
            )
        else:
            return
        rank_zero_warn(f"{self._name}: {what}.")

    @torch.no_grad()
    def restore(self, kept: Kept, session: CenterSession, edited: Collection[str]) -> None:
        """Let this worker go on where it was saved, edited tensors at the center; or its clocks alone.

        The optimizers have their states already.
        """
        module, averagers = session.module, session.averagers
        if kept.own is None:
            for averager, clock in zip(averagers, kept.clocks, strict=False):
                averager.go_on_at(clock)
            return
        self._restore_tensors(kept, module, edited)
        _forget_other_shapes(session.averaging.averagers, module, kept.own["tensors"])
        layouts = layouts_of(module, averagers)
        saved = kept.own["averagers"]
        names = {name for name, _ in chain.from_iterable(layouts)} - set(edited)
        # Of another number of optimizers those that are new start anew, as Lightning does it.
        for averager, exchanged in zip(averagers, kept.exchanged or [True] * len(averagers), strict=False):
            averager.has_exchanged |= exchanged
        for averager, own, new, old in zip(averagers, saved, layouts, kept.layouts or layouts, strict=False):
            averager.load_state_dict(merged(own, averager.state_dict(), old, new, names))

    def _restore_tensors(self, kept: Kept, module: nn.Module, edited: Collection[str]) -> None:
        assert kept.own is not None
        saved = kept.own["tensors"]
        changed = []
        for name, tensor in named_tensors(module).items():
            if name in edited or (name in saved and saved[name].shape != tensor.shape):
                changed.append(name)
            elif name in saved:
                tensor.copy_(saved[name])
            elif name not in kept.shared:
                changed.append(name)
        if changed:
            rank_zero_warn(
                f"{self._name}: {', '.join(sorted(changed))} had other names, shapes or values, or did not"
                " exist, where the checkpoint was saved, and start at the center."
            )


def _forget_other_shapes(optimizers: Iterable[Optimizer], module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Let optimizers begin anew with parameters whose state has the shape that they had where it was saved."""
    for name, parameter in module.named_parameters():
        now = local(parameter).shape
        before = saved[name].shape if name in saved else now
        if before == now:
            continue
        for optimizer in optimizers:
            values = optimizer.state.get(parameter, {}).values()
            if any(isinstance(value, Tensor) and value.shape == before for value in values):
                del optimizer.state[parameter]


def _described(ranks: int, shape: Sequence[int], replica_id: int | None) -> str:
    devices = "" if list(shape) == [1] else f" of {' x '.join(map(str, shape))} devices"
    if replica_id is not None:
        return f"workers{devices} that come and go, of which this is number {replica_id}"
    return f"{ranks // math.prod(shape)} workers{devices}"


def _clocks(saved: Mapping[str, Any]) -> list[int]:
    if "clocks" not in saved and "workers" in saved:  # version 0.1.0
        return [averager["clock"] for averager in saved["workers"][0]["averagers"]]
    return list(saved.get("clocks", ()))


def _center_of(
    kept: Kept, averaging: Averaging, layouts: Sequence[Layout], names: Sequence[str], edited: Collection[str]
) -> dict[str, Any]:
    """The saved state of the center, as this run's parameters are, those that were edited as they are now."""
    fresh = averaging.center_state_dict()["stores"]
    old, new = ([*chain.from_iterable(each)] for each in (kept.layouts or layouts, layouts))
    keep = {name for name, _ in new} - set(edited)
    sizes = [sum(size for _, size in layout) for layout in layouts]
    stores = []
    saved = dict(zip(kept.stores or names, kept.center["stores"], strict=False))
    for name, now in zip(names, fresh, strict=False):
        store = torch.cat(list(now)).cpu()
        if name in saved:
            store = merged(torch.cat(list(saved[name])).cpu(), store, old, new, keep)
        stores.append(list(torch.split(store, sizes)))
    versions = kept.center.get("versions") if list(kept.stores or names) == list(names) else None
    if versions and old != new:
        versions = [max(versions)]  # for all parts, which are others now
    return {"stores": stores, **({"versions": versions} if versions else {})}


def layouts_of(module: nn.Module, averagers: Sequence[Averager]) -> list[list[tuple[str, int]]]:
    """The layout of each averager's flat vectors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    return [
        [
            (names.get(parameter, f"optimizers.{number}.{index}"), as_real(parameter).numel())
            for index, parameter in enumerate(averager.laid_out)
        ]
        for number, averager in enumerate(averagers)
    ]


def _names_of_averaged(module: nn.Module, averagers: Sequence[Averager]) -> set[str]:
    averaged = {id(parameter) for averager in averagers for parameter in averager.parameters}
    return {name for name, parameter in module.named_parameters() if id(parameter) in averaged}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not part of the module's state; of shards this rank's parts."""
    return {name: local(value).detach() for name, value in (*module.named_parameters(), *module.named_buffers())}


def _shared_tensors(session: CenterSession) -> frozenset[str]:
    module = session.module
    return session.same_everywhere & named_tensors(module).keys() - _unsaved_buffers(module)


def _unsaved_buffers(module: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }


def edited_tensors(module: nn.Module, keys: Collection[str]) -> set[str]:
    """The names of the tensors that keys of the module's state stand for.

    A key of another one, as a metric may have, can stand for those that are in the state under no key of their own, if
    the module makes its state otherwise.
    """
    tensors = named_tensors(module)
    if not keys - tensors.keys():
        return set(keys)
    places = {tensor.data_ptr(): name for name, tensor in tensors.items() if tensor.numel()}
    state = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    found = {key: key if key in tensors else places.get(value.data_ptr()) for key, value in state.items()}
    names = {found.get(key) for key in keys}
    if None in names:
        names |= tensors.keys() - found.values() - _unsaved_buffers(module)
    return {name for name in names if name is not None}
