"""A slow network on one machine: each rank in a network namespace of its own, all on one switch.

    rank 0 (namespace) ── veth, tbf ── bridge (namespace) ── veth, tbf ── rank 1 (namespace) ...

The token bucket filter (tbf) at both ends of a rank's cable limits what it sends and what it receives. Delay, if asked
for, is made by netem where the kernel has it; else a process that keeps packets for a while takes the switch's place.
Linux, and root: a user without it may not make namespaces.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from harness.delay import MTU, relay
from harness.ranks import Place

__all__ = ["Link", "NoNamespacesError", "slow_network"]

_CLONE_NEWNET = 0x40000000
_INTERFACE = "e0"
_PREFIX = "easgd-benchmark-"
_networks = itertools.count()


class NoNamespacesError(RuntimeError):
    """This machine does not let us make network namespaces; the message says why."""


@dataclass(frozen=True)
class Link:
    """What a rank's cable carries.

    Attributes:
        mbit: Megabits per second, in each direction.
        delay_ms: One-way delay between two ranks in milliseconds.
    """

    mbit: float
    delay_ms: float = 0.0

    @property
    def name(self) -> str:
        """For tables and titles."""
        rate = f"{self.mbit / 1000:g} Gbit/s" if self.mbit >= 1000 else f"{self.mbit:g} Mbit/s"
        return rate + (f", {self.delay_ms:g} ms" if self.delay_ms else "")


@contextlib.contextmanager
def slow_network(ranks: int, link: Link) -> Iterator[list[Place]]:
    """Context in which there are places for ranks, each a node of its own on a slow network.

    Everything it makes is in namespaces whose names hold this process's number, and is gone afterwards, after an error
    and SIGTERM too; what a killed process has left is removed by the next.

    Raises:
        NoNamespacesError: If the machine or its kernel lacks something.
    """
    _check()
    prefix = f"{_PREFIX}{os.getpid()}-{next(_networks)}"
    nodes = {_address(rank): f"{prefix}-{rank}" for rank in range(ranks)}
    with contextlib.ExitStack() as made:
        made.enter_context(_unwound_by_sigterm())
        _remove_leftovers()
        for name in (prefix, *nodes.values()):
            _run("ip", "netns", "add", name)
            made.callback(_remove, name)
        if link.delay_ms and not _has_netem(prefix):
            _connect_by_relay(nodes, link, made)
        else:
            _connect_by_switch(prefix, nodes, link)
        yield [
            Place(rank, 0, 1, address, _INTERFACE, _entering(name))
            for rank, (address, name) in enumerate(nodes.items())
        ]


def _connect_by_switch(switch: str, nodes: Mapping[str, str], link: Link) -> None:
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for rank, (address, name) in enumerate(nodes.items()):
        port = f"p{rank}"
        _run("ip", "link", "add", _INTERFACE, "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _start_interface(name, address)
        _shape(switch, port, link.mbit)
        if link.delay_ms:
            _run("tc", "-n", name, "qdisc", "add", "dev", _INTERFACE, "root", "handle", "1:",
                 "netem", "delay", f"{link.delay_ms}ms", "limit", "100000")  # fmt: skip
            _shape(name, _INTERFACE, link.mbit, "parent", "1:1")
        else:
            _shape(name, _INTERFACE, link.mbit)


def _connect_by_relay(nodes: Mapping[str, str], link: Link, made: contextlib.ExitStack) -> None:
    for address, name in nodes.items():
        _run("ip", "-n", name, "tuntap", "add", "dev", _INTERFACE, "mode", "tun")
        _run("ip", "-n", name, "link", "set", _INTERFACE, "mtu", str(MTU))
        _start_interface(name, address)
        _shape(name, _INTERFACE, link.mbit)
    entering = {address: _entering(name) for address, name in nodes.items()}
    try:
        made.enter_context(relay(entering, _INTERFACE, link.mbit, link.delay_ms))
    except OSError as error:
        raise NoNamespacesError(str(error)) from error


def _start_interface(namespace: str, address: str) -> None:
    _run("ip", "-n", namespace, "addr", "add", f"{address}/16", "dev", _INTERFACE)
    _run("ip", "-n", namespace, "link", "set", "lo", "up")
    _run("ip", "-n", namespace, "link", "set", _INTERFACE, "up")


def _has_netem(namespace: str) -> bool:
    """Whether the kernel delays packets itself, tried on the loopback of a namespace of ours."""
    command = ["tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


def _check() -> None:
    if os.geteuid() != 0:
        raise NoNamespacesError("network namespaces need root")
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            raise NoNamespacesError(f"the program {program} is missing (package iproute2)")


def _address(rank: int) -> str:
    return f"10.77.{rank // 250}.{rank % 250 + 1}"


def _shape(namespace: str, interface: str, mbit: float, *parent: str) -> None:
    burst = max(16, round(mbit * 1.28))  # kilobytes; 10 ms at the rate, so that a busy scheduler costs nothing
    _run("tc", "-n", namespace, "qdisc", "add", "dev", interface, *(parent or ("root",)),
         "tbf", "rate", f"{mbit}mbit", "burst", f"{burst}kb", "latency", "200ms")  # fmt: skip


def _entering(namespace: str) -> Callable[[], None]:
    def enter() -> None:
        """Move this process, which has one thread yet, into the namespace."""
        with open(f"/run/netns/{namespace}", "rb") as handle:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")

    return enter


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise NoNamespacesError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@contextlib.contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """Context that SIGTERM leaves as an exception does."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _remove_leftovers() -> None:
    """Remove the namespaces of processes that are gone."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=20, check=False).stdout
    for line in names.splitlines():
        name = line.split()[0]
        owner = name.removeprefix(_PREFIX).split("-")[0]
        if name.startswith(_PREFIX) and not os.path.exists(f"/proc/{owner}"):
            _remove(name)


def _remove(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=20, check=False)
