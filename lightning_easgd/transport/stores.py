"""The store that the ranks share: a client of it for one thread, and the network in which it is."""

import fcntl
import os
import socket
import struct
from ipaddress import IPv6Address
from typing import NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store

from lightning_easgd.transport.errors import CenterError

__all__ = ["OwnAddress", "own_address", "own_client", "store_address"]

_INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915
_IPV6_ADDRESSES = "/proc/net/if_inet6"
_LINK_LOCAL = 0x20  # scope of addresses that mean nothing without an interface, whose name is another on another host


class OwnAddress(NamedTuple):
    """Where this host is reached.

    Attributes:
        host: Address or name for the others.
        listener: The address to listen at; empty for all of them.
    """

    host: str
    listener: str


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


def own_address(server: tuple[str, int] | None) -> OwnAddress:
    """The address that this host has in the network in which the store is.

    It is an address of the interface that ``GLOO_SOCKET_IFNAME`` names, if that is set; nothing listens elsewhere then.
    Otherwise it is the one from which the store's host is reached; on that host itself it is the name under which the
    others know it.

    Args:
        server: Host and port of the store, None if it has none.
    """
    interface = os.environ.get(_INTERFACE_VARIABLE, "").split(",")[0]
    if interface:
        host = _interface_address(interface)
        return OwnAddress(host, host)
    if server is None:
        return OwnAddress(socket.gethostname(), "")
    for family, kind, protocol, _, address in socket.getaddrinfo(*server, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.connect(address)  # sends nothing: asks the routing table
            except OSError:
                continue
            own = str(probe.getsockname()[0])
            return OwnAddress(server[0] if own == address[0] else own, "")
    raise CenterError(f"open_center: no route to the store's host {server[0]!r}; check MASTER_ADDR.")


def _interface_address(interface: str) -> str:
    address = _ipv4_address(interface) or _ipv6_address(interface)
    if address is None:
        raise CenterError(
            f"open_center: {_INTERFACE_VARIABLE}={interface!r} names no interface with an address that other hosts can"
            " use; correct it, or unset it."
        )
    return address


def _ipv4_address(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:
            return None


def _ipv6_address(interface: str) -> str | None:
    try:
        with open(_IPV6_ADDRESSES, encoding="ascii") as file:
            lines = [line.split() for line in file]
    except OSError:
        return None
    for digits, _, _, scope, _, name in lines:
        if name == interface and int(scope, 16) != _LINK_LOCAL:
            return str(IPv6Address(bytes.fromhex(digits)))
    return None
