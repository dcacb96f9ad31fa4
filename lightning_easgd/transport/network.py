"""The address that this host has in the network in which the ranks' store is, and sockets that listen."""

import fcntl
import os
import socket
import struct
from ipaddress import IPv6Address
from typing import NamedTuple

from lightning_easgd.transport.errors import CenterError

__all__ = ["OwnAddress", "listen", "own_address"]

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


def own_address(server: tuple[str, int] | None, user: str = "own_address") -> OwnAddress:
    """The address that this host has in the network in which the store is.

    It is an address of the interface that ``GLOO_SOCKET_IFNAME`` names, if that is set; nothing listens elsewhere then.
    Otherwise it is the one from which the store's host is reached; on that host itself it is the name under which the
    others know it.

    Args:
        server: Host and port of the store, None if it has none.
        user: The name of who asks, for errors.
    """
    interface = os.environ.get(_INTERFACE_VARIABLE, "").split(",")[0]
    if interface:
        host = _interface_address(interface, user)
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
    raise CenterError(f"{user}: no route to the store's host {server[0]!r}; check MASTER_ADDR.")


def listen(host: str, backlog: int | None = None) -> socket.socket:
    """A socket that listens at a port that the system chooses.

    Args:
        host: The address; empty for all of this host's.
        backlog: How many may have connected before they are accepted; None for what the system takes.
    """
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


def _interface_address(interface: str, user: str) -> str:
    address = _ipv4_address(interface) or _ipv6_address(interface)
    if address is None:
        raise CenterError(
            f"{user}: {_INTERFACE_VARIABLE}={interface!r} names no interface with an address that other hosts can"
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
