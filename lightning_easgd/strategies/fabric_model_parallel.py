"""The strategy of sharded workers for Fabric, made for the ``ModelParallelStrategy`` of each class tree."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, final

from torch import nn
from torch.optim import Optimizer

from lightning_easgd.method.compression import WireDtype
from lightning_easgd.method.rules import CenterRule
from lightning_easgd.method.schedules import Schedule
from lightning_easgd.strategies.center_method import OnNonFinite
from lightning_easgd.strategies.ddp_arguments import names_its_class
from lightning_easgd.strategies.easgd import EASGDMethod, PullTo
from lightning_easgd.strategies.fabric_strategy import FabricStrategy
from lightning_easgd.strategies.process_groups import unbind_group
from lightning_easgd.strategies.sharded_workers import DOCUMENTATION, Size, of_sharded_workers, resolve_sizes
from lightning_easgd.strategies.worker_arguments import DEFAULT_TIMEOUT
from lightning_easgd.strategies.worker_state.keeper import WorkerState

__all__ = ["fabric_model_parallel_strategy"]


def fabric_model_parallel_strategy(base: Any) -> Any:
    """Make the class ``EASGDModelParallelStrategy`` of a class tree.

    Args:
        base: Its ``ModelParallelStrategy``.
    """

    @final
    @of_sharded_workers
    class EASGDModelParallelStrategy(EASGDMethod, FabricStrategy, base):  # type: ignore[misc]
        __doc__ = DOCUMENTATION

        @names_its_class
        def __init__(
            self,
            parallelize_fn: Callable[[Any, Any], nn.Module],
            data_parallel_size: Size = "auto",
            tensor_parallel_size: Size = "auto",
            save_distributed_checkpoint: bool = True,
            *,
            tau: int = 10,
            beta: float | None = None,
            alpha: float | Schedule | None = None,
            rho: float | Schedule | None = None,
            momentum: float | None = None,
            outer_momentum: float | None = None,
            outer_nesterov: bool = False,
            pull_to: PullTo = "old",
            delay: int = 0,
            center_rule: CenterRule | None = None,
            wire_dtype: WireDtype | None = None,
            on_nonfinite: OnNonFinite = "fail",
            center_device: Literal["cpu"] | None = None,
            worker_state: WorkerState = "sidecar",
            process_group_backend: str | None = None,
            timeout: timedelta | None = DEFAULT_TIMEOUT,
        ) -> None:
            self._given_sizes = data_parallel_size, tensor_parallel_size
            self._of_lightning = parallelize_fn, *self._given_sizes, save_distributed_checkpoint
            resolve_sizes(type(self).__name__, *self._given_sizes, nodes=1, devices=0)
            super().__init__(
                tau=tau,
                beta=beta,
                alpha=alpha,
                rho=rho,
                momentum=momentum,
                outer_momentum=outer_momentum,
                outer_nesterov=outer_nesterov,
                pull_to=pull_to,
                delay=delay,
                center_rule=center_rule,
                wire_dtype=wire_dtype,
                on_nonfinite=on_nonfinite,
                center_device=center_device,
                worker_state=worker_state,
                process_group_backend=process_group_backend,
                timeout=timeout,
            )

        def _init_lightning(self, *_: Any, process_group_backend: str | None, timeout: timedelta, **__: Any) -> None:
            base.__init__(self, *self._of_lightning, process_group_backend=process_group_backend, timeout=timeout)
            self._start_method = "popen"
            self._ddp_kwargs: dict[str, Any] = {}

        def _set_up_groups(self) -> None:
            super(base, self).setup_environment()
            self._setup_distributed()
            unbind_group(self._get_process_group_backend())
            self._set_up_mesh()

        def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
            """Parallelize a module, and give the ranks of each coordinate what the one in worker 0 has."""
            with self._parallelizing():
                parallelized: nn.Module = base.setup_module(self, module)
            self._share_parts(parallelized, self._trained_tensors)
            self._take_in(parallelized)
            return parallelized

        def _write_checkpoint(self, path: Any, state: dict[str, Any], *arguments: Any, **keywords: Any) -> None:
            with self._without_steps(*(each for each in state.values() if isinstance(each, Optimizer))):
                if arguments or keywords.get("filter") is not None or not self._save_distributed_checkpoint:
                    super()._write_checkpoint(path, state, *arguments, **keywords)
                    return
                from torch.distributed.checkpoint import state_dict  # noqa: PLC0415 - it takes its time

                modules = [each for each in state.values() if isinstance(each, nn.Module)]
                if len(modules) != 1:
                    raise ValueError(
                        f"{type(self).__name__}.save_checkpoint(...): a distributed checkpoint is of one module and"
                        f" this state has {len(modules)}; save each in a checkpoint of its own."
                    )
                (module,) = modules
                options = state_dict.StateDictOptions(cpu_offload=True)
                shards: dict[str, Any] = {}
                metadata: dict[str, Any] = {}
                for name, each in state.items():
                    if isinstance(each, nn.Module):
                        shards[name] = state_dict.get_model_state_dict(each, options=options)
                    elif isinstance(each, Optimizer):
                        shards[name] = state_dict.get_optimizer_state_dict(module, each, options=options)
                    else:
                        metadata[name] = each.state_dict() if hasattr(each, "state_dict") else each
                self._write_shards(Path(self.broadcast(path)), shards, metadata)

    EASGDModelParallelStrategy.__qualname__ = EASGDModelParallelStrategy.__name__
    return EASGDModelParallelStrategy
