"""A worker's process: the part that all strategies of this package share, in every class tree."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_easgd.averagers import Averaging
from lightning_easgd.method.rules import CenterRule
from lightning_easgd.strategies.common_start import broadcast_states, check_alike, check_whole
from lightning_easgd.strategies.data_loaders import check_loader
from lightning_easgd.strategies.ddp_arguments import (
    REFUSED_INSIDE,
    REFUSED_WITHOUT,
    DDPArguments,
    check_ddp_arguments,
    takes_ddp_arguments,
    warn_without_effect,
)
from lightning_easgd.strategies.elastic_worker import ElasticWorker
from lightning_easgd.strategies.process_groups import ProcessGroups, unbind_group
from lightning_easgd.strategies.trainer.lightning_private import interactive_error
from lightning_easgd.strategies.trees.class_trees import check_tree, describe, tree_of
from lightning_easgd.strategies.worker_arguments import (
    DEFAULT_TIMEOUT,
    DevicesPerWorker,
    StartMethod,
    check_devices_per_worker,
    check_parallel_devices,
    check_ranks,
    check_timeout,
)
from lightning_easgd.strategies.worker_group import WorkerGroup
from lightning_easgd.transport.torchrun_attempt import set_up_group
from lightning_easgd.transport.worker_layout import WorkerLayout

__all__ = ["WorkerProcess"]

if TYPE_CHECKING:

    class _Base:
        """What the ``DDPStrategy`` of each tree has."""

        parallel_devices: list[torch.device] | None
        cluster_environment: Any
        num_nodes: int
        root_device: torch.device
        _timeout: timedelta | None
        _ddp_kwargs: dict[str, Any]
        _start_method: StartMethod
        _launcher: Any

        def __init__(self, *arguments: Any, **keywords: Any) -> None: ...
        @property
        def num_processes(self) -> int: ...
        @property
        def world_size(self) -> int: ...
        @property
        def global_rank(self) -> int: ...
        @property
        def node_rank(self) -> int: ...
        @property
        def launcher(self) -> Any: ...
        def _configure_launcher(self) -> None: ...
        def _get_process_group_backend(self) -> str: ...
        def setup_environment(self) -> None: ...
        @property
        def distributed_sampler_kwargs(self) -> dict[str, Any]: ...
        @property
        def process_group_backend(self) -> str | None: ...
        def process_dataloader(self, dataloader: Any) -> Any: ...
else:
    _Base = object


class WorkerProcess(_Base):
    """A rank of a worker; mixed into the ``DDPStrategy`` of a class tree.

    A worker is one process with a model of its own, or several whose gradients DDP reduces. It keeps DDPStrategy's
    processes, ranks, samplers and collectives. What it needs of the tree below is in ``_Base``.

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        process_group_backend: As for ``DDPStrategy``.
        timeout: How long a collective operation may wait for the slowest rank before it fails; None for 30 minutes.
        start_method: As for ``DDPStrategy``: "popen", "spawn", "fork" or "forkserver".
        devices_per_worker: Ranks of a worker, or "node" for those of a node. Where it is not 1 the arguments of the DDP
            wrapper have their effect inside of each worker.
        ddp_comm_state: Refused for workers of one rank: it changes how DDP reduces gradients, and there they are not
            reduced. None, or a state whose process group is None, is given the group of the worker's ranks.
        ddp_comm_hook: As ``ddp_comm_state``.
        ddp_comm_wrapper: As ``ddp_comm_state``.
        model_averaging_period: Refused unless None; ``tau`` is the period here.
        broadcast_buffers: False: each rank's buffers stay its own; checkpoints hold rank 0's.
        forward_sync_buffers: What newer releases of torch call ``broadcast_buffers``.
        find_unused_parameters: Of the DDP wrapper: no effect for workers of one rank.
        static_graph: Of the DDP wrapper: no effect.
        gradient_as_bucket_view: Of the DDP wrapper: no effect.
        init_sync: Of the DDP wrapper: no effect, all ranks start with rank 0's weights.
        bucket_cap_mb: Of the DDP wrapper: no effect.
        bucket_cap_mb_list: Of the DDP wrapper: no effect.
        batched_grad_copy: Of the DDP wrapper: no effect.
        check_reduction: Of the DDP wrapper: no effect.
        skip_all_reduce_unused_params: Of the DDP wrapper: no effect.
        delay_all_reduce_named_params: Of the DDP wrapper: no effect.
        param_to_hook_all_reduce: Of the DDP wrapper: no effect.
        mixed_precision: Of the DDP wrapper: no effect, ``Trainer(precision=...)`` has one.
        dim: Of the DDP wrapper: no effect.
        output_device: Of the DDP wrapper: no effect.
        process_group: Of the DDP wrapper: no effect.
        device_mesh: Of the DDP wrapper: no effect.

    Raises:
        TypeError: If an argument is unknown, or changes how DDP reduces gradients.
        ValueError: If ``timeout`` is not positive.
    """

    method: ClassVar[str]
    """Its name in checkpoints: workers of one method can go on where workers of the same method stopped."""

    has_center: ClassVar[bool] = True
    """Whether the workers of this method have a center."""

    may_come_and_go: ClassVar[bool] = False
    """Whether this class's workers may be launches of their own that come and go."""

    elastic: ElasticWorker | None = None
    """This worker, where they do."""

    on_nonfinite: str

    _is_rank = False
    _is_saving = False  # or loading

    _alike: tuple[str, ...] = ("devices_per_worker",)
    """The arguments that all ranks must have been given alike."""

    _ddp_arguments_with_effect: ClassVar[frozenset[str]] = frozenset()

    @takes_ddp_arguments
    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
        devices_per_worker: DevicesPerWorker = 1,
        **ddp_arguments: Unpack[DDPArguments],
    ) -> None:
        check_devices_per_worker(type(self).__name__, devices_per_worker)
        self.devices_per_worker = devices_per_worker
        self._given_backend = process_group_backend
        timeout = DEFAULT_TIMEOUT if timeout is None else timeout
        check_timeout(type(self).__name__, timeout)
        wraps = devices_per_worker != 1
        self._groups = ProcessGroups(type(self).__name__, timeout)
        given = check_ddp_arguments(type(self), ddp_arguments, REFUSED_INSIDE if wraps else REFUSED_WITHOUT)
        self._init_lightning(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,  # by position: Fabric calls it otherwise
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **given,
        )
        if not wraps:
            without_effect = {name: given[name] for name in given if name not in self._ddp_arguments_with_effect}
            warn_without_effect(type(self).__name__, without_effect)

    def _init_lightning(self, *arguments: Any, **keywords: Any) -> None:
        """Initialize Lightning's strategy below, with the arguments of ``DDPStrategy``."""
        super().__init__(*arguments, **keywords)

    def setup_environment(self) -> None:
        """Become a rank, which the process that only spawns or forks the ranks never does; set up the process group.

        And what tells who is missing if a collective operation fails.

        Raises:
            ValueError: If ranks have been given different arguments, or are more or fewer than the user has said.
        """
        set_up_group(self._get_process_group_backend(), self._timeout or DEFAULT_TIMEOUT, self.root_device)
        check_ranks(type(self).__name__, self.num_nodes, self.num_processes, self.world_size)
        self._set_up_groups()
        self._is_rank = True
        if dist.is_initialized():  # it is not where somebody else makes the group
            self._groups.enter(self.global_rank, self.world_size)
            arguments = {name: getattr(self, name) for name in self._alike}
            check_alike(type(self).__name__, arguments | {"process_group_backend": self._given_backend})

    def _set_up_groups(self) -> None:
        """Set up the process group, and what else Lightning's strategy below makes of the ranks."""
        super().setup_environment()
        unbind_group(self._get_process_group_backend())

    # What a method says

    @property
    @abstractmethod
    def is_served(self) -> bool:
        """Whether the center is a served one."""

    @property
    @abstractmethod
    def rule(self) -> CenterRule:
        """How the center moves."""

    @abstractmethod
    def make_averaging(self, optimizers: Sequence[Optimizer]) -> Averaging | None:
        """Make the averaging of one training, None if there is no center; all ranks do it at the same point."""

    @abstractmethod
    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Check an optimizer, and make it what a worker trains with, in place.

        Raises:
            TypeError: If this strategy cannot work with it.
        """

    @abstractmethod
    def is_prepared(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer still is what :meth:`prepare_optimizer` has made it; asked before every step."""

    @property
    def synchronous(self) -> str:
        """What has no served center, for errors: the strategy, and how it is asked for that."""
        return "EASGDStrategy(mode='sync')"

    def _assemble(self) -> None:
        """Wait for all ranks, before they open together what :meth:`make_averaging` makes.

        There they wait for each other in the store, which does not tell that one is lost: they would until the timeout.

        Raises:
            ExchangeError: If one is lost; it says why.
        """
        if dist.is_initialized() and self.world_size > 1:
            self._groups.gather(None)

    def _check_center(self, what: str) -> None:
        if not self.has_center:
            raise RuntimeError(f"{type(self).__name__}.{what}: the workers of this strategy have no center.")

    # The process

    @property
    def layout(self) -> WorkerLayout:
        """Which ranks make up which worker; known once Trainer or Fabric has this strategy.

        Raises:
            ValueError: If the number of ranks cannot be cut into such workers.
        """
        ranks, per_worker = self.num_nodes * self.num_processes, self.devices_per_worker
        if per_worker == "node":
            per_worker = self.num_processes
        if ranks % per_worker:
            raise ValueError(
                f"{type(self).__name__}(devices_per_worker={per_worker}): {ranks} ranks ({self.num_nodes} nodes of"
                f" {self.num_processes} devices) cannot be cut into workers of {per_worker}; give a number that divides"
                f" {ranks}."
            )
        return WorkerLayout(ranks, per_worker)

    @property
    def replica_id(self) -> int | None:
        """This worker's number where workers come and go; None in a fixed world."""
        return None if self.elastic is None else self.elastic.replica_id

    @property
    def worker_shape(self) -> tuple[int, ...]:
        """How the ranks of a worker are arranged; one worker's state is another's where these are the same."""
        return (self.layout.per_worker,)

    @property
    def _as_one(self) -> str:
        """The argument that makes all ranks one worker, for errors."""
        return f"devices_per_worker={self.num_nodes * self.num_processes}"

    @property
    def is_sharded(self) -> bool:
        """Whether each rank of a worker has its own part of the parameters."""
        return False

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How data are shared out."""
        return self._ranks_shares

    @property
    def _ranks_shares(self) -> dict[str, Any]:
        """The same, over the ranks of this launch."""
        return super().distributed_sampler_kwargs

    def process_dataloader(self, dataloader: Any) -> Any:
        """Take a data loader of a Trainer's or Fabric's, if the ranks of a worker can draw from it.

        Raises:
            TypeError: If each rank would draw as much as it likes, and a worker is several, or comes and goes.
        """
        check_loader(type(self).__name__, dataloader, self.layout.per_worker, is_elastic=self.elastic is not None)
        return super().process_dataloader(dataloader)

    @contextmanager
    def _reading_checkpoint(self) -> Iterator[None]:
        """Context in which Lightning reads a checkpoint.

        Raises:
            IsADirectoryError: If it is a folder, and this strategy reads files.
        """
        try:
            yield
        except IsADirectoryError as error:
            raise IsADirectoryError(
                f"{type(self).__name__}: {error.filename} is a folder, as EASGDModelParallelStrategy saves it, and"
                " workers that are not sharded read files; save it with save_distributed_checkpoint=False, or make a"
                " file of it (python -m lightning.fabric.utilities.consolidate_checkpoint) and load its 'state_dict'"
                " into the module."
            ) from error

    @property
    def workers(self) -> int:
        """p, the number of workers."""
        return self.layout.workers

    @property
    def only_launches(self) -> bool:
        """Whether this process only spawned or forked the ranks, or is to do so."""
        return self._start_method != "popen" and not self._is_rank

    @property
    def has_common_buffers(self) -> bool:
        """Whether buffers are of the center, as DDP would broadcast them, and not each rank's own.

        That is ``broadcast_buffers``, or ``forward_sync_buffers``, which torch prefers where both are given.
        """
        broadcast = self._ddp_kwargs.get("broadcast_buffers", True)
        return bool(self._ddp_kwargs.get("forward_sync_buffers", broadcast))

    def _share_start(self, module: nn.Module, trained: Collection[Tensor] = ()) -> None:
        """Give all ranks rank 0's weights; as torch has it, ``forward_sync_buffers`` concerns what follows only.

        Args:
            module: The module.
            trained: What of it is each rank's own already, as training has begun with it.

        Raises:
            TypeError: If this rank has only a part of them.
        """
        check_whole(type(self).__name__, module)
        buffers = bool(self._ddp_kwargs.get("broadcast_buffers", True))
        broadcast_states(module, with_buffers=buffers, strategy=type(self).__name__, trained=trained)

    @property
    def _inside(self) -> WorkerGroup | None:
        """The ranks of this worker where there are several, while something is wrapped or sharded."""
        return self._groups.inside

    def _open_inside(self, backend: str) -> WorkerGroup:
        """Make the group of the worker's ranks, which is there from now on; all ranks do it at the same point."""
        owner = f"{type(self).__name__}(devices_per_worker={self.devices_per_worker!r})"
        return self._groups.open_inside(owner, backend, self.layout)

    def _wrapping(self, module: nn.Module) -> AbstractContextManager[None]:
        """Context in which DDP wraps a module: gradients are reduced inside of this worker alone."""
        return self._open_inside(self.process_group_backend or "gloo").reducing(module, self._ddp_kwargs)

    def _leave_inside(self) -> None:
        """Give back the group of the worker's ranks; nothing is wrapped any more."""
        self._groups.close_inside()

    def __repr__(self) -> str:
        # Lightning's error for an instance of another class tree shows this and nothing else.
        return describe(self)

    def _configure_launcher(self) -> None:
        check_tree(self)
        check_parallel_devices(type(self).__name__, self.parallel_devices or ())
        layout = self.layout  # before any process starts
        if self.elastic is not None:
            self.elastic.resolve(layout, self._as_one, self.root_device)
        super()._configure_launcher()
        self._check_interactive()
        launcher = self._make_launcher()
        if launcher is not None:
            self._launcher = launcher
        self._warn_of_arguments()

    def _make_launcher(self) -> Any:
        """The launcher in place of Lightning's; None for that."""
        return None

    @contextmanager
    def _without_steps(self, *saved: Optimizer) -> Iterator[None]:
        """Context in which a step is none of a worker's: torch makes steps of no size to fill optimizers' states.

        Args:
            saved: Optimizers whose state is empty again afterwards, if it was: Adam would count that step.
        """
        empty = [optimizer for optimizer in saved if not optimizer.state]
        self._is_saving = True
        try:
            yield
        finally:
            self._is_saving = False
            for optimizer in empty:
                optimizer.state.clear()

    def _warn_of_arguments(self) -> None:
        """Warn of arguments that do not go with the number of workers, which is known now."""

    def _check_interactive(self) -> None:
        """Raise where Lightning is about to, but name what this package has for notebooks."""
        if self.launcher is None or self.launcher.is_interactive_compatible:
            return
        cls = type(self).__name__
        registered = f"strategy='{self._registered_name}_notebook' or " if self._registered_name else ""
        remedy = f"Use {registered}{cls}(start_method='fork'), or run the code as a script."
        error = interactive_error(tree_of(type(self)), remedy)
        if error is not None:
            raise error

    @property
    def _registered_name(self) -> str | None:
        """The name under which this strategy is registered with these arguments, as far as it is."""
        return None
