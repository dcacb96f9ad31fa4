"""How much memory this process may still take, and memory that several processes share."""

import os
from pathlib import Path

from lightning_easgd.transport.control_groups import control_group_memory
from lightning_easgd.transport.errors import CenterError, SharedMemoryUnavailableError

__all__ = ["allocate_shared", "available_memory"]


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated without swapping or breaking a control group's limit; None if unknown.

    Args:
        root: Where ``proc`` and the mounted control groups are found.
    """
    limits = [limit for limit in (_system_memory(root), control_group_memory(root)) if limit is not None]
    return min(limits, default=None)


def allocate_shared(size: int, name: str, what: str) -> int:
    """Create anonymous shared memory of this size, with all of its pages in place.

    Args:
        size: Bytes.
        name: What ``/proc`` shows it as.
        what: What it is for, for the error.

    Returns:
        Its descriptor. The memory is gone with the last descriptor and mapping; there is no file to remove.

    Raises:
        SharedMemoryUnavailableError: If this platform has no ``memfd``.
        CenterError: If there is not enough memory.
    """
    if not hasattr(os, "memfd_create"):
        raise SharedMemoryUnavailableError("allocate_shared: this platform has no memfd_create.")
    available = available_memory()
    if available is not None and available < size:
        raise _too_small(size, what, f"{available / 2**20:.1f} MiB are available")
    try:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    except OSError as error:
        raise SharedMemoryUnavailableError(f"allocate_shared: memfd_create failed: {error}.") from error
    try:
        # Taken now, not at the first write: there a lack of memory would be a SIGBUS.
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        os.close(descriptor)
        raise _too_small(size, what, str(error)) from error
    return descriptor


def _too_small(size: int, what: str, why: str) -> CenterError:
    return CenterError(
        f"{what} needs {size / 2**20:.1f} MiB of shared memory, but {why}. Free memory, raise the limits of the process"
        " (ulimit -f) or of its control group, or use more nodes."
    )


def _system_memory(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
