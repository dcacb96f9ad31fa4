"""How the ranks of a run bring up the served center together."""

import hashlib
import secrets
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from lightning_easgd.method.compression import WireDtype, make_codec
from lightning_easgd.method.rules import ServedExchange
from lightning_easgd.served_center.compressed_link import ServingEnd, WorkersEnd
from lightning_easgd.served_center.in_process import InProcessCenter
from lightning_easgd.served_center.interface import CenterService
from lightning_easgd.served_center.layout import CHUNK_ELEMENTS, Layout, place_chunks
from lightning_easgd.served_center.placed import ServedCenter
from lightning_easgd.served_center.shared_memory import SharedMemoryCenter
from lightning_easgd.served_center.tcp_client import RemoteShard
from lightning_easgd.served_center.tcp_server import ShardServer
from lightning_easgd.transport.control import ControlPlane
from lightning_easgd.transport.discovery import Rendezvous
from lightning_easgd.transport.errors import CenterError, SharedMemoryUnavailableError
from lightning_easgd.transport.liveness import Presence
from lightning_easgd.transport.network import own_address
from lightning_easgd.transport.store_client import StoreClient, store_server

__all__ = ["open_center"]

_openings: Counter[str] = Counter()  # a run may open its center again; the keys of the last time are still there


def open_center(
    store: Store | StoreClient,
    *,
    rank: int,
    nodes: Sequence[Sequence[int]],
    segments: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    exchange: ServedExchange,
    initial: Tensor | None,
    timeout: float = 60.0,
    name: str = "center",
    chunk_elements: int = CHUNK_ELEMENTS,
    presence: Presence | None = None,
    wire_dtype: WireDtype | None = None,
    user: str = "open_center",
) -> ServedCenter:
    """Open the served center; every rank calls it once, and gets its own end.

    Ranks of one node share memory; where the platform cannot, each rank keeps a part of its own and all talk over
    sockets, with a warning. Rank j of a node talks to rank j of every other node.

    Args:
        store: The ranks' store; keys are set under a prefix of this center's own. It is cloned; a client is used as it
            is, and left open.
        rank: This process's rank.
        nodes: The ranks of each node; together they are 0 … world size - 1.
        segments: (start, stop) of each part of the flat vector that has one rate. Together they are the vector.
        dtype: float32 or float64.
        exchange: What a message does; the same on all ranks.
        initial: The center's initial value as a flat vector; only that of rank 0 is used.
        timeout: Seconds that any operation waits for another rank.
        name: Distinguishes the centers that are opened on one store.
        chunk_elements: The most elements of one chunk.
        presence: Who the ranks are, if they have told that before.
        wire_dtype: What messages between nodes are rounded to; None to send them as they are.
        user: Whose center it is, for errors.

    Raises:
        WorkerLostError: If a rank dies, or fails, before the center is open.
        CenterTimeoutError: If a rank does not come, or the store does not answer.
        CenterError: If the center cannot be set up on some rank; on every rank, with that rank's reason.
    """
    world_size = sum(map(len, nodes))
    if sorted(other for node in nodes for other in node) != list(range(world_size)):
        raise ValueError(f"open_center(nodes={nodes}): every rank from 0 to {world_size - 1} must be in one node.")
    if rank == 0 and initial is None:
        raise ValueError("open_center(initial=None): rank 0 gives the center's initial value.")
    _openings[name] += 1
    plan = _Plan(Layout.cut(segments, chunk_elements), dtype, exchange, timeout)
    with ExitStack() as opened:  # closed again if something fails
        client = store if isinstance(store, StoreClient) else StoreClient(store, timeout, server=store_server())
        if client is not store:
            opened.callback(client.close)
        own_store = client.under(f"easgd/{name}/{_openings[name]}")
        if presence is None:
            presence = Presence(own_store, rank)
            presence.enter()
        rendezvous = Rendezvous(own_store, presence, rank, world_size, timeout, user=user)
        secret = _agree(
            rendezvous,
            arguments={"the center's exchange": exchange, "the wire's dtype": wire_dtype},
            layout=[plan.layout, dtype, [list(ranks) for ranks in nodes]],
        )
        shard, nodes = _open_shard(rendezvous, nodes, plan)
        opened.callback(shard.close)
        lost: set[int] = set()
        node, position = _place(rank, nodes)
        server, remote = _connect(rendezvous, nodes, shard, opened, secret, lost, client.address, wire_dtype)
        processes = {other: presence.process(other) for other in range(world_size)}
        control = ControlPlane(
            own_store,
            rank=rank,
            nodes=nodes,
            processes={other: process for other, process in processes.items() if process is not None},
            lost=lost,
            timeout=timeout,
        )
        opened.callback(control.close)
        center = ServedCenter(
            plan.layout,
            dtype,
            placement=place_chunks(plan.layout, len(nodes)),
            node=node,
            position=position / len(nodes[node]),
            shard=shard,
            remote=remote,
            server=server,
            control=control,
            store=None if client is store else client,
        )
        opened.callback(center.close)
        if rank == 0:
            assert initial is not None
            for number, values in enumerate(
                exchange.rule.initial_stores(initial.detach().to("cpu", dtype).contiguous())
            ):
                center.write_all(values, number)
        rendezvous.gather("ready", None)
        opened.pop_all()
        return center


def _connect(
    rendezvous: Rendezvous,
    nodes: Sequence[Sequence[int]],
    shard: CenterService,
    opened: ExitStack,
    secret: bytes,
    lost: set[int],
    store: tuple[str, int] | None,
    wire_dtype: WireDtype | None,
) -> tuple[ShardServer | None, dict[int, RemoteShard]]:
    """Connect this rank with one of every other node; what serves this node's part, and the others' parts."""
    if len(nodes) == 1:
        return None, {}
    rank, timeout = rendezvous.rank, rendezvous.timeout
    node, position = _place(rank, nodes)
    address = own_address(store, rendezvous.user)
    make_link = None if wire_dtype is None else partial(ServingEnd, partial(make_codec, wire_dtype))
    server = ShardServer(shard, secret, timeout, lost, host=address.listener, make_link=make_link)
    opened.callback(server.close)
    homes = rendezvous.gather("homes", [address.host, server.port])
    remote: dict[int, RemoteShard] = {}
    for other, ranks in enumerate(nodes):
        if other != node:
            peer = ranks[position % len(ranks)]
            home = tuple(homes[peer])
            link = None if wire_dtype is None else WorkersEnd(partial(make_codec, wire_dtype))
            remote[other] = RemoteShard(
                home, server=peer, rank=rank, secret=secret, timeout=timeout, lost=lost, link=link
            )
            opened.callback(remote[other].close)
    rendezvous.gather("connected", None)
    server.stop_accepting()
    return server, remote


@dataclass(frozen=True)
class _Plan:
    """What every part of the center is made from."""

    layout: Layout
    dtype: torch.dtype
    exchange: ServedExchange
    timeout: float

    def in_process(self, held: Sequence[int]) -> InProcessCenter:
        return InProcessCenter(self.layout, self.dtype, self.exchange, held=held, timeout=self.timeout)

    def shared(self, held: Sequence[int], rank: int, address: str | None = None) -> SharedMemoryCenter:
        return SharedMemoryCenter(
            self.layout, self.dtype, self.exchange, held=held, rank=rank, timeout=self.timeout, address=address
        )

    def held(self, node: int, nodes: int) -> list[int]:
        return [chunk for chunk, owner in enumerate(place_chunks(self.layout, nodes)) if owner == node]


def _agree(rendezvous: Rendezvous, arguments: Mapping[str, object], layout: object) -> bytes:
    """Make sure that all ranks open the same center, and return the secret that rank 0 draws.

    Args:
        rendezvous: Where the ranks meet.
        arguments: What follows from the user's arguments, which the error shows.
        layout: What follows from the model, its optimizers and where the ranks are.
    """
    own = {name: repr(value) for name, value in arguments.items()}
    digest = hashlib.sha256(repr(layout).encode()).hexdigest()
    answers = rendezvous.gather("terms", [own, digest, secrets.token_hex(16) if rendezvous.rank == 0 else ""])
    firsts, first_digest, secret = answers[0]
    for other, (theirs, their_digest, _) in enumerate(answers):
        for name, first in firsts.items():
            if theirs[name] != first:
                raise CenterError(
                    f"{rendezvous.user}: {name} is {first} on rank 0 and {theirs[name]} on rank {other}; give the"
                    " strategies of all ranks the same arguments."
                )
        if their_digest != first_digest:
            raise CenterError(
                f"{rendezvous.user}: the center of rank {other} has another layout (chunks, dtype or nodes) than that"
                " of rank 0; build the same model and optimizers on every rank."
            )
    return bytes.fromhex(secret)


def _place(rank: int, nodes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """This rank's node, and its position in it."""
    return next((node, list(ranks).index(rank)) for node, ranks in enumerate(nodes) if rank in ranks)


def _open_shard(
    rendezvous: Rendezvous, nodes: Sequence[Sequence[int]], plan: _Plan
) -> tuple[CenterService, Sequence[Sequence[int]]]:
    """This rank's view of its node's part, and the nodes as they turn out to be."""
    rank = rendezvous.rank
    node, position = _place(rank, nodes)
    held = plan.held(node, len(nodes))
    shard: CenterService | None = None
    address, problem = "", _NO_PROBLEM
    try:
        if len(nodes[node]) == 1:
            shard = plan.in_process(held)
        elif position == 0:
            shard = created = plan.shared(held, rank)
            address = created.address
    except CenterError as error:
        problem = _describe(error)
    answers = rendezvous.gather("memory", [address, problem])
    if shard is None and not any(kind for _, (kind, _) in answers):
        try:
            shard = plan.shared(held, rank, answers[nodes[node][0]][0])
        except CenterError as error:
            problem = _describe(error)
    problems = {other: told for other, told in enumerate(rendezvous.gather("mapped", problem)) if told != _NO_PROBLEM}
    if not problems:
        assert shard is not None
        return shard, nodes
    if shard is not None:
        shard.close()
    for other, (kind, text) in problems.items():
        if kind != SharedMemoryUnavailableError.__name__:
            raise CenterError(f"{rendezvous.user}: rank {other}: {text}")
    if rank == 0:
        other, (_, text) = min(problems.items())
        warnings.warn(
            f"{rendezvous.user}: rank {other} cannot share memory ({text}) All ranks use sockets instead, which is"
            " slower.",
            RuntimeWarning,
            stacklevel=3,
        )
    alone = [[other] for ranks in nodes for other in ranks]
    return plan.in_process(plan.held(_place(rank, alone)[0], len(alone))), alone


_NO_PROBLEM = ["", ""]


def _describe(error: Exception) -> list[str]:
    return [type(error).__name__, str(error)]
