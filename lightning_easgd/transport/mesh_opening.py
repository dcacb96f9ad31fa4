"""How the workers of a mesh connect with each other."""

import itertools
import secrets
import socket
from contextlib import ExitStack

from torch.distributed.distributed_c10d import Store

from lightning_easgd.transport.channel import ExchangeError, Failure
from lightning_easgd.transport.discovery import Rendezvous
from lightning_easgd.transport.errors import CenterError, CenterTimeoutError
from lightning_easgd.transport.liveness import Presence
from lightning_easgd.transport.mesh import LANES, Mesh
from lightning_easgd.transport.network import OwnAddress, listen, own_address
from lightning_easgd.transport.store_client import StoreClient, store_server
from lightning_easgd.transport.strangers import Strangers
from lightning_easgd.transport.tcp_wire import GREETING, configure
from lightning_easgd.transport.waiting import wait_until

__all__ = ["connections", "open_mesh"]

_LOOK = 0.02  # seconds
_meshes = itertools.count()  # keys of those of before are still in the store


def open_mesh(rank: int, size: int, store: Store, failure: Failure) -> Mesh:
    """Connect every worker with every other; all of them call it at the same point.

    Args:
        rank: This worker's number.
        size: How many there are, at least two.
        store: The workers' store; it is cloned.
        failure: What the error of a transfer says; its timeout is that of the opening, too.

    Raises:
        ExchangeError: If a worker does not come, or cannot be reached.
    """
    timeout = failure.timeout.total_seconds()
    client = StoreClient(store, timeout, server=store_server())
    try:
        keys = client.under(f"easgd/mesh/{next(_meshes)}")
        presence = Presence(keys, rank)
        presence.enter()
        rendezvous = Rendezvous(keys, presence, rank, size, timeout, user=failure.user)
        try:
            return Mesh(rank, connections(rendezvous, own_address(client.address, failure.user)), failure)
        except OSError as error:
            presence.fail(f"it cannot connect: {error}")
            raise
    except (CenterError, OSError) as error:
        raise ExchangeError(
            f"{failure.user}: worker {rank} cannot connect with the others ({error}) Workers connect directly, at ports"
            " that the system chooses: let the hosts of a job reach each other, name the network's interface in"
            " GLOO_SOCKET_IFNAME, or exchange through process_group_backend='gloo'."
        ) from error
    finally:
        client.close()


def connections(rendezvous: Rendezvous, own: OwnAddress) -> dict[tuple[int, int], socket.socket]:
    """Connections with all others, by worker and lane: those of lower rank are called, the others call.

    Args:
        rendezvous: Where the workers find each other.
        own: This worker's address.

    Raises:
        CenterError: If a worker does not come.
        OSError: If one cannot be reached.
    """
    rank, size = rendezvous.rank, rendezvous.world_size
    links: dict[tuple[int, int], socket.socket] = {}
    with ExitStack() as opened:  # closed again if something fails
        listener = opened.enter_context(listen(own.listener, LANES * size))
        said = [own.host, listener.getsockname()[1], secrets.token_hex(16) if rank == 0 else ""]
        everyone = rendezvous.gather("address", said)
        secret = bytes.fromhex(everyone[0][2])
        for peer, lane in itertools.product(range(rank), range(LANES)):
            host, port, _ = everyone[peer]
            links[peer, lane] = opened.enter_context(socket.create_connection((host, port), rendezvous.timeout))
            links[peer, lane].sendall(GREETING.pack(secret, LANES * rank + lane))
        rendezvous.gather("called", None)  # now those who call are at the listener
        strangers = Strangers(listener, secret)
        opened.callback(strangers.close)

        def all_are_in() -> bool:
            for connection, number in strangers.welcome(_LOOK):
                links[divmod(number, LANES)] = opened.enter_context(connection)
            return len(links) == LANES * (size - 1)

        if not wait_until(all_are_in, rendezvous.timeout, longest_pause=0.0):
            raise CenterTimeoutError("the connections of some workers have been lost.")
        for connection in links.values():
            configure(connection, rendezvous.timeout)
        opened.pop_all()
        strangers.close()
        listener.close()
    return links
