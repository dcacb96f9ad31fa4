"""Workers that do not communicate while they train: the control of every comparison, free of a class tree."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Unpack

import torch
from torch.optim import Optimizer

from lightning_easgd.averagers import Averaging
from lightning_easgd.method.rules import CenterRule, PlainRule
from lightning_easgd.strategies.ddp_arguments import DDPArguments, takes_ddp_arguments
from lightning_easgd.strategies.worker_arguments import DEFAULT_TIMEOUT, StartMethod
from lightning_easgd.strategies.worker_process import WorkerProcess

__all__ = ["LocalMethod"]


class LocalMethod(WorkerProcess):
    """p workers that train without any communication.

    They leave out DDPStrategy's module wrapper, and the broadcast with which Lightning keeps all ranks in step at
    every batch. The arguments are those of ``DDPStrategy``, of which those of the wrapper have no effect.

    Args:
        accelerator: As for ``DDPStrategy``.
        parallel_devices: As for ``DDPStrategy``.
        cluster_environment: As for ``DDPStrategy``.
        checkpoint_io: As for ``DDPStrategy``.
        precision_plugin: As for ``DDPStrategy``.
        process_group_backend: As for ``DDPStrategy``.
        timeout: How long a collective operation may wait for the slowest rank before it fails; None for 30 minutes.
        start_method: As for ``DDPStrategy``: "popen", "spawn", "fork" or "forkserver".
        **ddp_arguments: As for ``EASGDStrategy``.

    Raises:
        TypeError: If an argument is unknown, or changes how DDP reduces gradients.
        ValueError: If ``timeout`` is not positive.
    """

    method = "local training"
    has_center = False
    on_nonfinite = "fail"

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
        **ddp_arguments: Unpack[DDPArguments],
    ) -> None:
        super().__init__(
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            **ddp_arguments,
        )

    @property
    def is_served(self) -> bool:
        """Whether the center is a served one."""
        return False

    @property
    def rule(self) -> CenterRule:
        """That of no center."""
        return PlainRule()

    def make_averaging(self, optimizers: Sequence[Optimizer]) -> Averaging | None:  # noqa: ARG002
        """None: there is nothing to average."""
        return None

    def prepare_optimizer(self, optimizer: Optimizer) -> None:
        """Any will do."""

    def is_prepared(self, optimizer: Optimizer) -> bool:  # noqa: ARG002
        """Whether an optimizer still is what :meth:`prepare_optimizer` has made it."""
        return True
