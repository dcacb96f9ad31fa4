"""The process group of workers that come and go, which torchft makes anew whenever their number changes."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
from torch._C._distributed_c10d import ErrorType
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

__all__ = ["GroupKind", "make_group"]

GroupKind = Literal["gloo", "nccl"]


def make_group(kind: GroupKind, timeout: timedelta) -> Any:
    """A process group of torchft's: through gloo alone, or what is on a GPU through NCCL.

    Args:
        kind: Which.
        timeout: Of an operation through gloo, and for a GPU's communicator to be made, the first time in a process.
            What has been put into a GPU's queue has none: whoever waits for it calls ``abort`` where it does not end.
    """
    import torchft  # noqa: PLC0415 - an extra

    return torchft.ProcessGroupGloo(timeout=timeout) if kind == "gloo" else _make_nccl_beside_gloo(timeout)


def _make_nccl_beside_gloo(timeout: timedelta) -> Any:
    from torchft import process_group as torchft  # noqa: PLC0415 - an extra

    class NCCLBesideGloo(torchft.ProcessGroupNCCL):  # type: ignore[misc]
        """What is on the host, as who takes part, goes through gloo, and never waits for the GPU."""

        def _create_pg(self, store: Store, rank: int, world_size: int) -> ProcessGroup:
            group: ProcessGroup = super()._create_pg(PrefixStore("nccl", store), rank, world_size)
            on_host = torchft.ProcessGroupGloo._create_pg(self, PrefixStore("gloo", store), rank, world_size)
            cpu = torch.device("cpu")
            group._register_backend(cpu, ProcessGroup.BackendType.GLOO, on_host._get_backend(cpu))
            return group

        @contextmanager
        def _run_context(self) -> Iterator[None]:
            # torchft's own timer goes on after an error, and would abort the next group.
            yield

        def _wrap_work(self, work: Any, opts: object) -> Any:  # noqa: ARG002
            return work  # torchft's own would abort by a clock that runs while the GPU is busy with something else

        def errored(self) -> Exception | None:
            group, known = self._pg, self._errored
            if known is not None or group is None:
                return known or RuntimeError("there is no process group")
            problem = group._get_backend(torch.device("cuda")).get_error()
            return None if problem == ErrorType.SUCCESS else RuntimeError(f"NCCL has lost another worker ({problem})")

    # A worker that is lost must not end this process, as NCCL's watchdog would have it. Read when a group is made.
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ.setdefault("TORCH_NCCL_NONBLOCKING_TIMEOUT", str(math.ceil(timeout.total_seconds())))
    return NCCLBesideGloo(timeout=timeout)
