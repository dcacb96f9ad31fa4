"""The processes of the workers: the part that all strategies of this package share, in every class tree."""

import inspect
from datetime import timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.utils import _sync_module_states

from lightning_easgd.strategies.class_trees import check_tree, describe

__all__ = ["DEFAULT_TIMEOUT", "StartMethod", "WorkerProcesses", "broadcast_states"]

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""Of ``torch.distributed`` and so of DDPStrategy."""

_IGNORED_DDP_ARGUMENTS = frozenset(
    ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers")
)
_REFUSED_DDP_ARGUMENTS = frozenset(("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"))
_BROADCAST_BYTES = 250 * 1024 * 1024

if TYPE_CHECKING:

    class _Base:
        """What the ``DDPStrategy`` of each tree has."""

        parallel_devices: list[torch.device] | None
        num_nodes: int
        root_device: torch.device
        _timeout: timedelta | None

        def __init__(self, *arguments: Any, **keywords: Any) -> None: ...
        @property
        def num_processes(self) -> int: ...
        @property
        def node_rank(self) -> int: ...
        def _configure_launcher(self) -> None: ...
        @property
        def process_group_backend(self) -> str | None: ...
else:
    _Base = object


class WorkerProcesses(_Base):
    """p workers, each a process with its own model; mixed into the ``DDPStrategy`` of a class tree.

    It keeps DDPStrategy's processes, ranks, samplers and collectives. What it needs of the tree below is in ``_Base``.

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        process_group_backend: As for ``DDPStrategy``.
        timeout: How long a collective operation may wait for the slowest rank before it fails.
        start_method: As for ``DDPStrategy``: "popen", "spawn", "fork" or "forkserver".
        **ddp_arguments: Arguments of the DDP wrapper. ``find_unused_parameters``, ``static_graph``,
            ``gradient_as_bucket_view`` and ``broadcast_buffers`` are accepted and have no effect.

    Raises:
        TypeError: If an argument is unknown, or changes how DDP reduces gradients.
        ValueError: If ``timeout`` is not positive.
    """

    def __init__(
        self,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta = DEFAULT_TIMEOUT,
        start_method: StartMethod = "popen",
        **ddp_arguments: Any,
    ) -> None:
        _check_timeout(type(self).__name__, timeout)
        _check_ddp_arguments(type(self), ddp_arguments)
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,  # by position: Fabric calls it otherwise
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    def _who_is_missing(self) -> str:
        """A sentence on who is to blame when a collective operation has failed; empty if nobody can tell."""
        return ""

    def __repr__(self) -> str:
        # Lightning's error for an instance of another class tree shows this and nothing else.
        return describe(self)

    def _configure_launcher(self) -> None:
        check_tree(self)
        for device in self.parallel_devices or ():
            if str(device).partition(":")[0] == "mps":  # a third party's accelerator may have any objects for devices
                raise ValueError(
                    f"{type(self).__name__}(parallel_devices=[{device}]): torch.distributed has no backend for MPS;"
                    " use Trainer(accelerator='cpu')."
                )
        super()._configure_launcher()


def broadcast_states(module: nn.Module) -> None:
    """Give all ranks rank 0's parameters and buffers, as DDP's constructor does."""
    _sync_module_states(module, _get_default_group(), _BROADCAST_BYTES, 0, [])


def _check_timeout(strategy: str, timeout: object) -> None:
    if not isinstance(timeout, timedelta):
        raise TypeError(
            f"{strategy}(timeout={timeout!r}): give a datetime.timedelta, such as timedelta(seconds={timeout!r})."
        )
    if timeout <= timedelta(0):
        raise ValueError(f"{strategy}(timeout={timeout}): the time to wait for the slowest rank is positive.")


def _check_ddp_arguments(cls: type, arguments: dict[str, Any]) -> None:
    strategy = cls.__name__
    for name, value in arguments.items():
        if name in _REFUSED_DDP_ARGUMENTS:
            raise TypeError(
                f"{strategy}({name}={value!r}): this argument changes how DDP reduces gradients, and here gradients"
                " are not reduced; remove it, or use strategy='ddp'."
            )
        if name not in _IGNORED_DDP_ARGUMENTS:
            known = get_close_matches(name, inspect.signature(cls).parameters, n=1)
            hint = f"did you mean {known[0]}?" if known else "see its docstring for the arguments it takes."
            raise TypeError(f"{strategy}({name}={value!r}): unknown argument; {hint}")
        rank_zero_warn(
            f"{strategy}({name}={value!r}) has no effect: it is an argument of the DDP wrapper, which this strategy"
            " does not use; remove it."
        )
