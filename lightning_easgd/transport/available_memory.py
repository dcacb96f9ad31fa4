"""How much memory this process may still take: the system's, and the limits of the control groups that it is in."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["available_memory"]


class _Files(NamedTuple):
    """What a version of control groups calls the files of its memory controller."""

    limit: str
    usage: str
    inactive: str  # the line of memory.stat: file pages of the group and those below


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated without swapping or breaking a control group's limit; None if unknown.

    A batch system such as SLURM limits the job, and puts the process into a group below, which has no limit of its own.
    Both versions of control groups are looked at, wherever they are mounted.

    Args:
        root: Where ``proc`` and the mounts are found.
    """
    limits = [limit for limit in (_system_memory(root), _control_group_memory(root)) if limit is not None]
    return min(limits, default=None)


def _system_memory(root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _control_group_memory(root: Path) -> int | None:
    """Bytes below the tightest limit of this process's control group and those above it; None if there is none."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    rooms = [room for folder, files in _folders(groups, mounts, root) if (room := _room(folder, files)) is not None]
    return max(0, min(rooms)) if rooms else None


def _folders(groups: list[str], mounts: list[str], root: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's memory groups and of all above them that are visible."""
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            kind, option, files = "cgroup2", "", _VERSION_2
        elif "memory" in controllers.split(","):
            kind, option, files = "cgroup", "memory", _VERSION_1
        else:
            continue
        for mount in mounts:
            point = _mount_point(mount, kind, option)
            if point is not None:
                yield from ((folder, files) for folder in _upwards(*point, group, root))


def _mount_point(mount: str, kind: str, option: str) -> tuple[str, str] | None:
    """The group at the root of a mount, and where it is mounted; None if it is a mount of something else."""
    fields, _, rest = mount.partition(" - ")
    _, _, _, top, point, *_ = fields.split(" ")
    found, _, options = rest.split(" ", 2)
    return (top, point) if found == kind and (not option or option in options.split(",")) else None


def _upwards(top: str, point: str, group: str, root: Path) -> Iterator[Path]:
    """The folders from a group up to the mount point. In a namespace of its own a process may see only the latter."""
    folder = root / point.lstrip("/")
    below = group if top == "/" else group.removeprefix(top)
    names = [name for name in below.split("/") if name and name != ".."]
    for depth in range(len(names), -1, -1):
        yield folder.joinpath(*names[:depth])


def _room(folder: Path, files: _Files) -> int | None:
    """Bytes below the limit of one group; None if it has none."""
    try:
        limit = (folder / files.limit).read_text().strip()
        return None if limit == "max" else int(limit) - int((folder / files.usage).read_text()) + _held(folder, files)
    except (OSError, ValueError):
        return None


def _held(folder: Path, files: _Files) -> int:
    """Bytes of files that have been read: they count as used, and are given up when something else needs the memory."""
    try:
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(lines.get(files.inactive, 0))
    except (OSError, ValueError):
        return 0
