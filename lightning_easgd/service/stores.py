"""The store that the ranks share: a client of it for one thread, and the network in which it is."""

import fcntl
import os
import socket
import struct

from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_easgd.service.errors import CenterError

__all__ = ["own_address", "own_client", "store_address"]

_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def own_client(store: Store) -> Store:
    """A client of the same store, with the same prefixes, for the use of one thread: clients are not thread-safe."""
    client: Store = store.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
    return client


def store_address(store: Store) -> tuple[str, int] | None:
    """Host and port of the TCP store under this store, None if there is none."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    return None if host is None or port is None else (str(host), int(port))


def own_address(store: Store) -> str:
    """The address that this host has in the network in which the store is.

    It is the address of the interface that ``GLOO_SOCKET_IFNAME`` names, if that is set. Otherwise it is the one from
    which the store's host is reached; on that host itself it is the name under which the others know it.
    """
    interface = os.environ.get(_INTERFACE_VARIABLE, "").split(",")[0]
    if interface:
        return _interface_address(interface)
    server = store_address(store)
    if server is None:
        return socket.gethostname()
    for family, kind, protocol, _, address in socket.getaddrinfo(*server, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # sends nothing: asks the routing table
            except OSError:
                continue
            own = str(probe.getsockname()[0])
            return server[0] if own == address[0] else own
    raise CenterError(f"open_center: no route to the store's host {server[0]!r}; check MASTER_ADDR.")


def _interface_address(interface: str) -> str:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError as error:
            raise CenterError(
                f"open_center: {_INTERFACE_VARIABLE}={interface!r} names no interface with an IPv4 address"
                f" ({error.strerror}); correct it, or unset it."
            ) from error
