"""Delay for kernels without netem: a process that carries packets between the nodes, and keeps each for a while.

A node's interface is then a TUN device, whose other end this process reads and writes. That costs processor time, some
tens of microseconds for each packet of up to 9000 bytes: little at 100 Mbit/s, much at 1 Gbit/s.
"""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection

__all__ = ["MTU", "relay"]

MTU = 9000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # include/uapi/linux/if_tun.h
_PR_SET_PDEATHSIG = 1
_DESTINATION = slice(16, 20)  # of an IPv4 header

Entering = Callable[[], None]


@contextlib.contextmanager
def relay(nodes: Mapping[str, Entering], interface: str, mbit: float, delay_ms: float) -> Iterator[None]:
    """Context in which packets travel between nodes.

    Args:
        nodes: For each node's address, what moves a process into its namespace, where a TUN device exists.
        interface: The name of that device in every node.
        mbit: Megabits per second that a node can receive.
        delay_ms: Milliseconds that every packet takes.

    Raises:
        OSError: If the devices cannot be opened.
    """
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(
        target=_carry, args=(nodes, interface, 1e6 * mbit / 8, delay_ms / 1e3, writer), daemon=True
    )
    process.start()
    writer.close()
    try:
        try:
            problem = reader.recv()
        except EOFError:
            problem = "it died"
        if problem is not None:
            raise OSError(f"the relay that delays packets could not begin: {problem}")
        yield
    finally:
        process.kill()
        process.join()
        reader.close()


def _carry(
    nodes: Mapping[str, Entering], interface: str, bytes_per_second: float, delay: float, ready: Connection
) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should the parent be killed
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    devices: dict[bytes, int] = {}
    try:
        for address, enter in nodes.items():
            enter()
            devices[socket.inet_aton(address)] = _open(interface)
    except OSError as error:
        ready.send(str(error))
        return
    ready.send(None)
    _Queues(devices, bytes_per_second, delay).run()


def _open(interface: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


class _Queues:
    """Packets under way to each node, in the order in which they arrive there."""

    def __init__(self, devices: Mapping[bytes, int], bytes_per_second: float, delay: float) -> None:
        self._devices = devices
        self._bytes_per_second = bytes_per_second
        self._delay = delay
        self._waiting: dict[bytes, deque[tuple[float, bytes]]] = {address: deque() for address in devices}
        self._free = dict.fromkeys(devices, 0.0)  # when a node's cable has carried what was sent before

    def run(self) -> None:
        poll = select.epoll()
        for device in self._devices.values():
            poll.register(device, select.EPOLLIN)
        while True:
            due = min((queue[0][0] for queue in self._waiting.values() if queue), default=None)
            for device, _ in poll.poll(None if due is None else max(0.0, due - time.monotonic())):
                self._take(device)
            self._deliver()

    def _take(self, device: int) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                packet = os.read(device, MTU)
                target = packet[_DESTINATION]
                if packet[0] >> 4 == 4 and target in self._devices:
                    now = time.monotonic()
                    self._free[target] = max(now, self._free[target]) + len(packet) / self._bytes_per_second
                    self._waiting[target].append((self._free[target] + self._delay, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        for address, queue in self._waiting.items():
            while queue and queue[0][0] <= now:
                with contextlib.suppress(BlockingIOError):  # the node's queue is full: the packet is lost
                    os.write(self._devices[address], queue.popleft()[1])
