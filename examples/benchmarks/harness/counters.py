"""What the kernel counts for this process: bytes that its TCP sockets have sent, and the most memory it has used."""

import contextlib
import ctypes
import gc
import os
import socket
import stat
from pathlib import Path

__all__ = ["PeakMemory", "bytes_sent"]

# include/uapi/linux/tcp.h, struct tcp_info: tcpi_bytes_sent counts payload bytes with those sent again, and
# tcpi_bytes_retrans the latter alone: on a busy machine the kernel sends again what was only late.
_SENT, _SENT_AGAIN = 200, 208


def bytes_sent() -> float:
    """Bytes that all open TCP sockets of this process have sent, each counted once; nan where nobody counts them."""
    total = 0.0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # the directory's own descriptor is gone by now
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                total += _sent_by(copy)
    return total


def _sent_by(connection: socket.socket) -> float:
    information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(information) < _SENT_AGAIN + 8:
        return float("nan")
    sent, again = (ctypes.c_uint64.from_buffer_copy(information, at).value for at in (_SENT, _SENT_AGAIN))
    return float(sent - again)


class PeakMemory:
    """The most memory that this process has had resident since this object was made, beyond what it had then.

    Memory that ranks share counts in every process that has touched it.
    """

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what earlier turns have left
        self._before = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
        except OSError:
            self._before = float("nan")

    def bytes(self) -> float:
        """The peak, nan where the kernel does not let it start anew."""
        return _status("VmHWM") - self._before


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024.0 * int(value.split()[0])
    return float("nan")
