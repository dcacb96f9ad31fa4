"""Memory that processes of one host share."""

import mmap
import os
import secrets
from contextlib import suppress
from typing import final

from typing_extensions import override

from lightning_easgd.transport.available_memory import available_memory
from lightning_easgd.transport.errors import CenterError, SharedMemoryUnavailableError
from lightning_easgd.transport.forking import ForkAware

__all__ = ["SharedSegment"]

_IDENTITY = 16  # bytes, of random content, by which a segment is told from whatever else has its creator's descriptor


@final
class SharedSegment(ForkAware):
    """A piece of memory that other processes of the host can map while its creator has it open.

    It is anonymous: there is no file to remove, and it is gone with the last process that maps it, however that ends.
    Make one with :meth:`create`, and reach it from other processes with :meth:`attach`.

    Args:
        descriptor: Descriptor of the memory; the object takes it over.
        path: Where the memory was found, None for its creator.

    Attributes:
        RESERVED: Bytes at the start of the memory that are the segment's own.
        memory: The mapping.
        descriptor: As given; closed by :meth:`close`, and in a forked child.
    """

    RESERVED = 64

    def __init__(self, descriptor: int, path: str | None = None) -> None:
        super().__init__()
        self.descriptor = descriptor
        self._path = path
        self._is_open = True
        try:
            self.memory = mmap.mmap(descriptor, 0)
        except (OSError, ValueError) as error:
            self.abandon()
            raise SharedMemoryUnavailableError(f"SharedSegment: the memory cannot be mapped: {error}.") from error

    @classmethod
    def create(cls, size: int, name: str, what: str) -> "SharedSegment":
        """Allocate a segment of zeros, with all of its pages in place.

        Args:
            size: Bytes, with the reserved ones.
            name: What ``/proc`` shows it as.
            what: What it is for, for the error.

        Raises:
            SharedMemoryUnavailableError: If this platform has no ``memfd``.
            CenterError: If there is not enough memory.
        """
        if not hasattr(os, "memfd_create"):
            raise SharedMemoryUnavailableError("SharedSegment: this platform has no memfd_create.")
        available = available_memory()
        if available is not None and available < size:
            raise _too_small(size, what, f"{available / 2**20:.1f} MiB are available")
        try:
            descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        except OSError as error:
            raise SharedMemoryUnavailableError(f"SharedSegment: memfd_create failed: {error}.") from error
        try:
            # Taken now, not at the first write: there a lack of memory would be a SIGBUS.
            os.posix_fallocate(descriptor, 0, size)
            os.pwrite(descriptor, secrets.token_bytes(_IDENTITY), 0)
        except OSError as error:
            os.close(descriptor)
            raise _too_small(size, what, str(error)) from error
        return cls(descriptor)

    @classmethod
    def attach(cls, address: str) -> "SharedSegment":
        """Map the segment of another process of this host.

        Args:
            address: Its :attr:`address` there.

        Raises:
            SharedMemoryUnavailableError: If it cannot be reached.
        """
        path, _, identity = address.rpartition("#")
        remedy = "Ranks that share memory run in one process namespace, and as one user."
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryUnavailableError(
                f"SharedSegment.attach(address={path!r}): {error.strerror}. {remedy}"
            ) from error
        try:
            found = os.pread(descriptor, _IDENTITY, 0).hex()
        except OSError:  # no memory at all
            found = ""
        if found != identity:
            os.close(descriptor)
            raise SharedMemoryUnavailableError(
                f"SharedSegment.attach(address={path!r}): something else than the memory is there. {remedy}"
            )
        return cls(descriptor, path)

    @property
    def address(self) -> str:
        """Where other processes find it; valid while this one, its creator, keeps it open."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}#{self.memory[:_IDENTITY].hex()}"

    @property
    def creator_has_it(self) -> bool:
        """Whether its creator lives, and still has it open."""
        if self._path is None or not self._is_open:
            return True
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self.descriptor))
        except OSError:
            return False

    def close(self) -> None:
        """Let go of it. A second call does nothing."""
        self.abandon()
        with suppress(BufferError):  # somebody still has a view: the mapping goes with that
            self.memory.close()

    @override
    def abandon(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self.descriptor)


def _too_small(size: int, what: str, why: str) -> CenterError:
    return CenterError(
        f"{what} needs {size / 2**20:.1f} MiB of shared memory, but {why}. Free memory, raise the limits of the process"
        " (ulimit -f) or of its control group, or use more nodes."
    )
