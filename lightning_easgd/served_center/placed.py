"""The whole center as one rank sees it: its own node's part in memory, the others' over the network."""

import atexit
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_easgd.served_center.compressed_link import LinkState
from lightning_easgd.served_center.interface import CenterService, Pending
from lightning_easgd.served_center.layout import Layout
from lightning_easgd.served_center.tcp_client import RemoteShard
from lightning_easgd.served_center.tcp_server import ShardServer
from lightning_easgd.transport.control import ControlPlane
from lightning_easgd.transport.errors import CenterError
from lightning_easgd.transport.store_client import StoreClient

__all__ = ["ServedCenter"]


@final
class ServedCenter(CenterService):
    """A :class:`CenterService` whose chunks are spread over the nodes; :func:`open_center` makes one.

    Args:
        layout: The chunks.
        dtype: float32 or float64.
        placement: For each chunk the node that keeps it.
        node: This rank's node.
        position: This rank's position among the ranks of its node: ranks start at different chunks.
        shard: This node's part.
        remote: The other nodes' parts, by node.
        server: What serves this node's part to the other nodes, None if there are none.
        control: The control plane.
        store: A client of the store that is the center's own and goes with it, None if there is none.

    Attributes:
        control: As given; who lives, and the flag to stop.
    """

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        *,
        placement: Sequence[int],
        node: int,
        position: float,
        shard: CenterService,
        remote: Mapping[int, RemoteShard],
        server: ShardServer | None,
        control: ControlPlane,
        store: StoreClient | None = None,
    ) -> None:
        super().__init__(layout, dtype)
        self.control = control
        self._parts: dict[int, CenterService | RemoteShard] = {**remote, node: shard}
        self._node = node
        self._server = server
        self._store = store
        self._placement = placement
        self._order = _order(placement, node, position)
        self._closed = False
        atexit.register(self.close)

    @property
    @override
    def order(self) -> Sequence[int]:
        return self._order

    @override
    def nbytes(self, chunk: int) -> int:
        keeper = self._keeper(chunk)
        if isinstance(keeper, CenterService):
            return keeper.nbytes(chunk)
        return keeper.nbytes(chunk, self.layout.size(chunk), self.dtype.itemsize)

    @override
    def link_state(self, chunk: int) -> LinkState | None:
        return self._keeper(chunk).link_state(chunk)

    @override
    def load_link_state(self, chunk: int, state: LinkState) -> None:
        self._keeper(chunk).load_link_state(chunk, state)

    @override
    def exchange(self, chunk: int, message: Tensor, rate: float) -> int:
        return self.begin(chunk, message, rate).wait()

    @override
    def begin(self, chunk: int, message: Tensor, rate: float) -> Pending:
        self.control.note_progress()
        return self._keeper(chunk).begin(chunk, message, rate)

    @override
    def read(self, chunk: int, into: Tensor, store: int = 0) -> int:
        return self._keeper(chunk).read(chunk, into, store)

    @override
    def write(self, chunk: int, value: Tensor, store: int = 0, version: int | None = None) -> None:
        self._keeper(chunk).write(chunk, value, store, version)

    def close(self) -> None:
        """Leave: end the connections, stop serving, and give the memory back.

        The others' exchanges with this rank end with an error; meet them first (``control.meet``) where they may
        still need it.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self.control.close()
        for node in self._parts.keys() - {self._node}:
            self._parts[node].close()
        if self._server is not None:
            self._server.close()
        self._parts[self._node].close()
        if self._store is not None:
            self._store.close()

    def _keeper(self, chunk: int) -> CenterService | RemoteShard:
        if self._closed:
            raise CenterError("ServedCenter: it has been closed on this rank.")
        return self._parts[self._placement[chunk]]


def _order(placement: Sequence[int], node: int, position: float) -> list[int]:
    """Remote chunks first, as their answers travel while the local ones are exchanged; ranks start apart."""
    remote = [chunk for chunk, owner in enumerate(placement) if owner != node]
    local = [chunk for chunk, owner in enumerate(placement) if owner == node]
    return _rotated(remote, position) + _rotated(local, position)


def _rotated(chunks: list[int], position: float) -> list[int]:
    start = int(position * len(chunks))
    return chunks[start:] + chunks[:start]
