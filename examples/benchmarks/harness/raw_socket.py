"""What the bytes of an exchange cost by themselves: plain sockets in threads beside local training."""

import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

__all__ = ["RawSocket"]

_TIMEOUT = 120.0  # seconds without a byte


class RawSocket(Callback):
    """Every ``tau`` steps each rank sends to its neighbour in a ring what an all-reduce of the parameters sends.

    In two halves, the second when the first has come: as a reduction that is scattered, and gathered. Nothing is added
    up, and the step waits only for an exchange that is still under way when the next is due: what this costs beyond
    local training is the network's, the kernel's and the other threads'. For ``LocalStrategy``.
    """

    def __init__(self, tau: int, address: str) -> None:
        self.tau, self.address = tau, address

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Connect the ring."""
        rank, size = trainer.global_rank, trainer.world_size
        with socket.create_server((self.address, 0)) as server:
            addresses: list[Any] = [None] * size
            dist.all_gather_object(addresses, server.getsockname()[:2])
            self._next = socket.create_connection(addresses[(rank + 1) % size])
            server.settimeout(_TIMEOUT)
            self._previous, _ = server.accept()
        for each in (self._next, self._previous):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.settimeout(_TIMEOUT)
        half = sum(parameter.nbytes for parameter in module.parameters()) * (size - 1) // size
        self._outgoing, self._incoming = bytearray(half), bytearray(half)
        self._sender, self._exchanger = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        """Begin an exchange where one is due."""
        if (index + 1) % self.tau == 0:
            if self._under_way is not None:
                self._under_way.result()
            self._under_way = self._exchanger.submit(self._exchange)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """End the last exchange, and the connections."""
        if self._under_way is not None:
            self._under_way.result()
        for executor in (self._exchanger, self._sender):
            executor.shutdown()
        for each in (self._next, self._previous):
            each.close()

    def _exchange(self) -> None:
        for _ in range(2):
            sent = self._sender.submit(self._next.sendall, self._outgoing)
            missing = memoryview(self._incoming)
            while missing:
                count = self._previous.recv_into(missing)
                if count == 0:
                    raise ConnectionError("RawSocket: another rank has ended its connection")
                missing = missing[count:]
            sent.result()
