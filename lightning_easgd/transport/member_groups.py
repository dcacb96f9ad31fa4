"""The process group of workers that come and go, which torchft makes anew whenever their number changes."""

import math
import os
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

__all__ = ["GroupKind", "make_group"]

GroupKind = Literal["gloo", "nccl"]

_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_LONGEST_START = "TORCH_NCCL_NONBLOCKING_TIMEOUT"


def make_group(kind: GroupKind, timeout: timedelta) -> Any:
    """A process group of torchft's: through gloo alone, or what is on a GPU through NCCL.

    Args:
        kind: Which.
        timeout: Of an operation through gloo, and for a GPU's communicator to be made. What has been put into a GPU's
            queue has none: whoever waits for it calls ``abort`` where it does not end.
    """
    import torchft  # noqa: PLC0415 - an extra

    return torchft.ProcessGroupGloo(timeout=timeout) if kind == "gloo" else _make_nccl_beside_gloo(timeout)


def _make_nccl_beside_gloo(timeout: timedelta) -> Any:
    from torchft import process_group as torchft  # noqa: PLC0415 - an extra

    class NCCLBesideGloo(torchft.ProcessGroupNCCL):  # type: ignore[misc]
        """What is on the host, as who takes part, goes through gloo, and never waits for the GPU."""

        def _create_pg(self, store: Store, rank: int, world_size: int) -> ProcessGroup:
            # A worker that is lost must not end this process, as NCCL's watchdog would have it.
            before = os.environ.get(_ERROR_HANDLING)
            os.environ[_ERROR_HANDLING] = "0"
            try:
                group: ProcessGroup = super()._create_pg(PrefixStore("nccl", store), rank, world_size)
            finally:
                if before is None:
                    del os.environ[_ERROR_HANDLING]
                else:
                    os.environ[_ERROR_HANDLING] = before
            on_host = torchft.ProcessGroupGloo._create_pg(self, PrefixStore("gloo", store), rank, world_size)
            cpu = torch.device("cpu")
            group._register_backend(cpu, ProcessGroup.BackendType.GLOO, on_host._get_backend(cpu))
            return group

        def _wrap_work(self, work: Any, opts: object) -> Any:  # noqa: ARG002
            return work  # torchft's own would abort by a clock that runs while the GPU is busy with something else

        def errored(self) -> Exception | None:
            known: Exception | None = self._errored
            if known is not None or self._pg is None:
                return known
            problem = self._pg._get_backend(torch.device("cuda")).get_error()
            is_well = problem == torch._C._distributed_c10d.ErrorType.SUCCESS
            return None if is_well else RuntimeError(f"NCCL has lost another worker ({problem})")

    os.environ.setdefault(_LONGEST_START, str(math.ceil(timeout.total_seconds())))
    return NCCLBesideGloo(timeout=timeout)
