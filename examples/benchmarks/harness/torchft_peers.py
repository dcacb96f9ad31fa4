"""torchft's LocalSGD and DiLoCo around the steps of a Trainer with ``LocalStrategy``."""

import json
import os
import sys
from abc import abstractmethod
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch.distributed import TCPStore

__all__ = ["TorchFTDiLoCo", "TorchFTLocalSGD"]

_TIMEOUT = timedelta(seconds=120)


class _TorchFT(Callback):
    """Each rank is a replica group of its own, and rank 0 runs the lighthouse.

    Args:
        tau: Steps between two synchronisations.
        address: The address at which other ranks reach this one.
    """

    def __init__(self, tau: int, address: str) -> None:
        self.tau = tau
        self._address = address
        self._lighthouse: Any = None

    @abstractmethod
    def _context(self, manager: Any, module: L.LightningModule, optimizer: Any) -> AbstractContextManager[Any]:
        """The algorithm's context manager, which hooks into the optimizer."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the services, and enter the context."""
        sys.stderr.flush()
        self._stderr = os.dup(2)  # its services log every message there, whatever the level of logging
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        from torchft import Manager, ProcessGroupGloo  # noqa: PLC0415 - an extra
        from torchft.coordination import LighthouseServer  # noqa: PLC0415

        if trainer.is_global_zero:
            self._lighthouse = LighthouseServer(bind="[::]:0", min_replicas=trainer.world_size, join_timeout_ms=100)
        # The server names itself by a host name, which other ranks may not know.
        port = urlsplit(self._lighthouse.address()).port if trainer.is_global_zero else None
        lighthouse = [f"http://{self._address}:{port}"]
        dist.broadcast_object_list(lighthouse, src=0)
        optimizer = trainer.optimizers[0]
        self._store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
        group = ProcessGroupGloo(timeout=_TIMEOUT)
        # So does its store, and what it calls itself.
        group._rendezvous_store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
        handle = json.loads(group.get_reconfigure_handle())
        handle["store"] = f"{self._address}:{group._rendezvous_store.port}"
        group.get_reconfigure_handle = lambda: json.dumps(handle)
        self._manager = Manager(
            pg=group,
            load_state_dict=module.load_state_dict,
            state_dict=module.state_dict,
            min_replica_size=trainer.world_size,
            use_async_quorum=False,
            timeout=_TIMEOUT,
            quorum_timeout=_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr=self._address,
            store_port=self._store.port,
            lighthouse_addr=lighthouse[0],
            replica_id=f"rank_{trainer.global_rank}",
            hostname=self._address,
            init_sync=False,  # all ranks start from rank 0's weights
        )
        self._entered = self._context(self._manager, module, optimizer)
        self._entered.__enter__()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Leave the context, and end the services when no rank needs them any more."""
        self._entered.__exit__(None, None, None)
        committed = self._manager.current_step()
        dist.barrier()
        self._manager.shutdown(wait=False)
        dist.barrier()
        if self._lighthouse is not None:
            self._lighthouse.shutdown()
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        due = trainer.global_step // self.tau
        if committed != due:  # torchft goes on after an error; its time would be that of doing nothing
            raise RuntimeError(f"{type(self).__name__}: torchft has committed {committed} of {due} synchronisations")


class TorchFTLocalSGD(_TorchFT):
    """``torchft.local_sgd.LocalSGD``: averages every parameter by itself, blocking, every ``tau`` steps."""

    def _context(self, manager: Any, module: L.LightningModule, optimizer: Any) -> AbstractContextManager[Any]:
        from torchft.local_sgd import LocalSGD  # noqa: PLC0415

        context: AbstractContextManager[Any] = LocalSGD(manager, module, optimizer, sync_every=self.tau)
        return context


class TorchFTDiLoCo(_TorchFT):
    """``torchft.local_sgd.DiLoCo``, whole model at once, with the outer optimizer of the DiLoCo paper."""

    def _context(self, manager: Any, module: L.LightningModule, optimizer: Any) -> AbstractContextManager[Any]:
        from torchft.local_sgd import DiLoCo  # noqa: PLC0415

        outer = torch.optim.SGD(module.parameters(), lr=0.7, momentum=0.9, nesterov=True)
        context: AbstractContextManager[Any] = DiLoCo(manager, [module], optimizer, outer, sync_every=self.tau)
        return context
