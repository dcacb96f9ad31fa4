"""torchft's Manager of one rank: it finds the workers that live, and hands the others' state to one that comes."""

import importlib
import logging
import os
import socket
import warnings
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning_easgd.transport.daemon import Daemon
from lightning_easgd.transport.lighthouse import CONNECTING, DIRECT

__all__ = ["import_quietly", "make_manager"]

_RETRIES = 10**9  # ten a second while the lighthouse is away


def make_manager(
    group: Any,
    lighthouse: str,
    name: str,
    *,
    min_replica_size: int,
    timeout: timedelta,
    rank: int,
    ranks: int,
    store: tuple[str, int],
) -> Any:
    """A ``torchft.Manager`` whose requests are asynchronous, and that holds up neither its process nor the others.

    Args:
        group: The process group that it makes anew.
        lighthouse: Its address.
        name: The worker's.
        min_replica_size: How many workers an exchange must have to count.
        timeout: Of a transfer.
        rank: Of this rank in its worker.
        ranks: Of the worker.
        store: Host and port of the worker's own store.
    """
    from torchft import Manager  # noqa: PLC0415 - an extra

    manager: Any = Manager(
        pg=group,
        load_state_dict=None,
        state_dict=None,
        min_replica_size=min_replica_size,
        use_async_quorum=False,  # requests are made in a thread; so one who returns takes part at once
        timeout=timeout,
        connect_timeout=CONNECTING,
        rank=rank,
        world_size=ranks,
        store_addr=store[0],
        store_port=store[1],
        lighthouse_addr=lighthouse,
        replica_id=name,
        checkpoint_transport=_make_transport(timeout),
        init_sync=False,
        quorum_retries=_RETRIES,
    )
    # A request that nobody answers would hold up the end of this process.
    manager._executor.shutdown()
    manager._executor = Daemon("torchft_quorum")
    if ranks == 1:
        manager._client = _LoneClient(manager._client)
    return manager


def import_quietly() -> None:
    """Import torchft; what it says of each exchange, and of each that fails with a traceback, is said here."""
    os.environ.setdefault("RUST_LOG", "error")  # it is read at the import
    importlib.import_module("torchft")
    for name in ("torchft.manager", "torchft.checkpointing.http_transport"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # Where warnings are errors a state would never come, and no exchange would count.
    warnings.filterwarnings("ignore", "The given buffer is not writable", module=r"torch\.distributed\._serialization")
    warnings.filterwarnings("ignore", "The 'warn' method is deprecated", module=r"torchft\.manager")


class _LoneClient:
    """A client of torchft's of a worker of one rank, which need not ask its server whether all of them commit."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def should_commit(self, _rank: int, _step: int, should_commit: bool, *, timeout: timedelta) -> bool:  # noqa: ARG002
        return should_commit


def _make_transport(timeout: timedelta) -> Any:
    """What a worker that comes gets the others' state by.

    torchft's own would ask the proxy of the environment, and end a giver whose receiver is slow.
    """
    from torchft.checkpointing import http_transport  # noqa: PLC0415 - an extra

    class Direct(http_transport.HTTPTransport[Any]):  # type: ignore[misc]
        def __init__(self, **arguments: Any) -> None:
            self._receivers: set[socket.socket] = set()
            super().__init__(**arguments)
            serve = self._server.finish_request

            def finish_request(receiver: socket.socket, address: object) -> None:
                self._receivers.add(receiver)
                try:
                    with suppress(OSError):  # it is lost, or has been cut off
                        serve(receiver, address)
                finally:
                    self._receivers.discard(receiver)

            self._server.finish_request = finish_request

        def disallow_checkpoint(self) -> None:
            # The exchange is over: who is still receiving has taken no part in it, and must not hold up the giver.
            for receiver in tuple(self._receivers):
                with suppress(OSError):
                    receiver.shutdown(socket.SHUT_RDWR)
            super().disallow_checkpoint()

        @classmethod
        def _load_from_address(cls, address: str, timeout: timedelta) -> object:
            with DIRECT.open(address, timeout=timeout.total_seconds()) as answer:
                try:
                    return http_transport._streaming_load(answer, weights_only=False)
                except Exception as error:  # of what a part of a state may look like
                    raise ConnectionError(f"their state has not come whole: {error}") from error

    return Direct(timeout=timeout, num_chunks=0)
