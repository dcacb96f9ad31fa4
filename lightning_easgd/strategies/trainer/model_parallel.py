"""The strategy of sharded workers for a Trainer, made for the ``ModelParallelStrategy`` of each class tree."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, final

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_easgd.method.compression import WireDtype
from lightning_easgd.method.rules import CenterRule
from lightning_easgd.method.schedules import Schedule
from lightning_easgd.strategies.center_method import OnNonFinite
from lightning_easgd.strategies.ddp_arguments import names_its_class
from lightning_easgd.strategies.easgd import EASGDMethod, PullTo
from lightning_easgd.strategies.fault_tolerance import FaultTolerance
from lightning_easgd.strategies.process_groups import unbind_group
from lightning_easgd.strategies.sharded_workers import (
    DOCUMENTATION,
    Size,
    load_parts,
    of_sharded_workers,
    parts_of,
    resolve_sizes,
)
from lightning_easgd.strategies.trainer.lightning_private import give_mesh
from lightning_easgd.strategies.trainer.meetings import check_even_evaluation
from lightning_easgd.strategies.trainer.strategy import TrainerStrategy, TrainerTree
from lightning_easgd.strategies.worker_arguments import DEFAULT_TIMEOUT
from lightning_easgd.strategies.worker_state.keeper import WorkerState

__all__ = ["model_parallel_strategy"]


def model_parallel_strategy(base: Any, of_tree: TrainerTree) -> Any:
    """Make the class ``EASGDModelParallelStrategy`` of a class tree.

    Args:
        base: Its ``ModelParallelStrategy``.
        of_tree: What else of the tree is needed.
    """

    @final
    @of_sharded_workers
    class EASGDModelParallelStrategy(EASGDMethod, TrainerStrategy, base):  # type: ignore[misc]
        __doc__ = DOCUMENTATION

        tree = of_tree

        @names_its_class
        def __init__(
            self,
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
            fault_tolerance: bool | FaultTolerance | None = None,
            evaluate: Literal["center", "worker"] = "center",
            recalibrate_batchnorm: int = 0,
            worker_state: WorkerState = "sidecar",
            process_group_backend: str | None = None,
            timeout: timedelta | None = DEFAULT_TIMEOUT,
        ) -> None:
            self._given_sizes = data_parallel_size, tensor_parallel_size
            self._saves_distributed = save_distributed_checkpoint
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
                fault_tolerance=fault_tolerance,
                evaluate=evaluate,
                recalibrate_batchnorm=recalibrate_batchnorm,
                worker_state=worker_state,
                process_group_backend=process_group_backend,
                timeout=timeout,
            )

        def _init_lightning(self, *_: Any, process_group_backend: str | None, timeout: timedelta, **__: Any) -> None:
            base.__init__(
                self,
                *self._given_sizes,
                self._saves_distributed,
                process_group_backend=process_group_backend,
                timeout=timeout,
            )
            self._start_method = "popen"
            self._ddp_kwargs: dict[str, Any] = {}

        def _set_up_groups(self) -> None:
            self._setup_distributed()
            unbind_group(self._get_process_group_backend())
            self._set_up_mesh()
            give_mesh(self.lightning_module, self._device_mesh)

        @contextmanager
        def model_sharded_context(self) -> Iterator[None]:
            """Context in which Lightning calls ``configure_model``."""
            with super().model_sharded_context(), self._parallelizing():
                yield

        def model_to_device(self) -> None:
            """Move what is left, and give the ranks of each coordinate what the one in worker 0 has.

            It comes before the optimizers, which may copy the parameters.
            """
            super().model_to_device()
            self._share_parts(self.model)

        # Evaluation

        def on_validation_start(self) -> None:
            """Let all ranks meet, and show the center to a validation that is part of a fit."""
            if not self._validating:
                self._check_even("limit_val_batches", self._trainer.num_val_batches)
            super().on_validation_start()

        def on_test_start(self) -> None:
            """See that the ranks of this worker test together."""
            self._check_even("limit_test_batches", self._trainer.num_test_batches)
            super().on_test_start()

        def on_predict_start(self) -> None:
            """See that the ranks of this worker predict together: Lightning's sampler repeats no sample for that."""
            self._check_even("limit_predict_batches", self._trainer.num_predict_batches)
            super().on_predict_start()

        def _check_even(self, limit: str, batches: list[float]) -> None:
            check_even_evaluation(self._trainer, self, limit, batches)

        # Checkpoints

        def lightning_module_state_dict(self) -> dict[str, Any]:
            """The module's state at the center; nothing where this rank must not wait for others' shards."""
            return {} if self._is_alone else super().lightning_module_state_dict()

        def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
            """The state of an optimizer; torch may make a step of no size for it, which is none of the worker's."""
            if self._is_alone:
                return {}
            with self._without_steps(optimizer):
                state: dict[str, Any] = super().optimizer_state(optimizer)
            return state

        def own_optimizer_states(self, checkpoint: Mapping[str, Any]) -> list[Any]:  # noqa: ARG002
            """This rank's parts of the optimizers' states."""
            return [parts_of(optimizer.state_dict()) for optimizer in self.optimizers]

        def _write_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any) -> None:
            if self._is_alone:
                rank_zero_warn(
                    f"{type(self).__name__}: {filepath} is not written: after an error, or in a signal handler, no rank"
                    " can wait for the others' shards. Go on from the last checkpoint."
                )
                return
            if storage_options is not None or not self._saves_distributed:
                super()._write_checkpoint(checkpoint, filepath, storage_options)
                return
            state = {"state_dict": checkpoint.pop("state_dict")}
            states = enumerate(checkpoint.pop("optimizer_states", []))
            state |= {f"optimizer_{number}": each for number, each in states}
            self._write_shards(Path(self.broadcast(filepath)), state, checkpoint)

        def load_checkpoint(self, checkpoint_path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
            """Read a checkpoint into the module; in a fit also into optimizers, as on this rank if that is known."""
            optimizers = self.optimizers
            if self._session is None:  # those of a fit that has ended stay; of weights alone there are no states
                self.optimizers = []
            try:
                checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *arguments, **keywords)
            finally:
                self.optimizers = optimizers
            if self._session is not None and self._checkpoints is not None:
                found = self._checkpoints.find(checkpoint, *self._read_from)
                if found is not checkpoint:
                    for optimizer, own in zip(self.optimizers, found["optimizer_states"], strict=False):
                        load_parts(type(self).__name__, optimizer, own)
            return checkpoint

        def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
            """Wait for all ranks; where Lightning has restored the loops, let them go on where this worker's were."""
            super().barrier(name, *args, **kwargs)
            resumes = name == "_CheckpointConnector.resume_end" and self._session is not None
            if resumes and self._checkpoints is not None:
                self._checkpoints.restore_loops()

    EASGDModelParallelStrategy.__qualname__ = EASGDModelParallelStrategy.__name__
    return EASGDModelParallelStrategy
