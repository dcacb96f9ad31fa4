"""The directory that a benchmark writes: tables, figures, and what they were measured with."""

import csv
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness.ratios import Row

__all__ = ["print_table", "write_results"]

_PACKAGES = ("torch", "lightning", "lightning_easgd", "accelerate", "torchft-nightly")


def write_results(
    directory: Path,
    tables: Mapping[str, Sequence[Row]],
    options: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write each table to ``<name>.csv``, and ``setting.json``: command, options, versions, hardware, load, date.

    Args:
        directory: Made if it is not there.
        tables: Their rows, by name.
        options: Of the command.
        more: What else belongs to the setting.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with (directory / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    setting = {
        "command": f"python {Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        "options": {name: value for name, value in options.items() if name != "output"},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": _hardware(),
        "load_average_at_the_end": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
        **(more or {}),
    }
    (directory / "setting.json").write_text(json.dumps(setting, indent=2) + "\n", encoding="utf-8")
    print(f"written: {directory}", flush=True)


def print_table(rows: Sequence[Row]) -> None:
    """Print rows below their names."""
    if not rows:
        return
    columns = {name: [name, *(str(row[name]) for row in rows)] for name in rows[0]}
    widths = [max(map(len, column)) for column in columns.values()]
    print()
    for line in zip(*columns.values(), strict=True):
        print(" ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    return {
        "machine": platform.machine(),
        "processor": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": _gpu(),
    }


@cache
def _gpu() -> str | None:
    """Asked for without CUDA, which a process that still forks ranks must not start."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):  # the results count more
        return None


def _field(path: str, field: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == field), None
    )
