"""Workers that train on their own: the part that every strategy of this package shares, free of a class tree."""

import inspect
from collections.abc import Callable
from datetime import timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.distributed.distributed_c10d import _get_default_group
from torch.distributed.utils import _sync_module_states

from lightning_easgd._compat import free_running, request_stop

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DDPStrategy as _Base
else:
    _Base = object

__all__ = ["DEFAULT_TIMEOUT", "LocalWorkers", "StartMethod"]

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]

DEFAULT_TIMEOUT = timedelta(minutes=30)
"""Of ``torch.distributed`` and so of DDPStrategy."""

_IGNORED_DDP_ARGUMENTS = frozenset(
    ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers")
)
_REFUSED_DDP_ARGUMENTS = frozenset(("ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"))
_BROADCAST_BYTES = 250 * 1024 * 1024


class LocalWorkers(_Base):
    """p workers that train without any communication; mixed into the ``DDPStrategy`` of a class tree.

    It keeps DDPStrategy's processes, ranks, samplers and collectives, and leaves out its module wrapper and the
    broadcast with which Lightning keeps all ranks in step at every batch.
    """

    _launcher_class: ClassVar[Callable[..., Any]]

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
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._trainer: Any = None
        self._end_free_running: Callable[[], None] | None = None

    def _configure_launcher(self) -> None:
        for device in self.parallel_devices or ():
            if str(device).partition(":")[0] == "mps":  # a third party's accelerator may have any objects for devices
                raise ValueError(
                    f"{type(self).__name__}(parallel_devices=[{device}]): torch.distributed has no backend for MPS;"
                    " use Trainer(accelerator='cpu')."
                )
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = self._launcher_class(self, start_method=self._start_method)

    def configure_ddp(self) -> None:
        """Leave the module as it is, as there are no gradients to reduce, but give all ranks rank 0's weights.

        DDP's constructor does so; here it comes before the optimizers, which may copy the parameters.
        """
        assert self.lightning_module is not None
        _sync_module_states(self.lightning_module, _get_default_group(), _BROADCAST_BYTES, 0, [])

    def setup(self, trainer: Any) -> None:
        """Set up as DDPStrategy does; for a fit, let the ranks run freely."""
        super().setup(trainer)
        self._trainer = trainer
        if trainer.state.fn == "fit":
            self._end_free_running = free_running(trainer, self._on_sigterm)

    def end_rank(self, error: BaseException) -> None:
        """Do what Lightning leaves out when an error ends a spawned or forked rank: tell the others, and tear down."""
        if self._trainer is not None:
            self._trainer.state.status = "interrupted"
            self.on_exception(error)
            self.teardown()

    def teardown(self) -> None:
        """Undo :meth:`setup`."""
        if self._end_free_running is not None:
            self._end_free_running()
            self._end_free_running = None
        self._trainer = None
        super().teardown()

    def _on_sigterm(self) -> None:
        request_stop(self._trainer)

    # While an error ends the run other ranks may be anywhere, so no collective can be matched: rank 0's view counts.

    @property
    def _interrupted(self) -> bool:
        return self._trainer is not None and self._trainer.state.status == "interrupted"

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; not while an error ends the run."""
        if not self._interrupted:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Broadcast an object; while an error ends the run every rank keeps its own."""
        return obj if self._interrupted else super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor; while an error ends the run every rank keeps its own."""
        return tensor if self._interrupted else super().reduce(tensor, *args, **kwargs)


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
