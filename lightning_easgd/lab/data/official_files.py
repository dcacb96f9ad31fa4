"""Files as their authors publish them: found, downloaded, and compared with their published checksums."""

import contextlib
import hashlib
import os
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import final

from lightning_utilities.core.rank_zero import rank_zero_warn
from tqdm import tqdm

from lightning_easgd.lab.data.errors import DataError

_CHUNK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte


@final
@dataclass(frozen=True)
class OfficialFile:
    """A file and its published checksum.

    Args:
        path: Where it lies.
        md5: MD5 sum in hexadecimal digits; None where none is published.
    """

    path: Path
    md5: str | None


def check_sums(files: Sequence[OfficialFile], *, verify: bool) -> None:
    """Compare files with their checksums, or with `verify=False` warn, and name the files that are not compared.

    Raises:
        DataError: If a sum differs.
    """
    if not verify:
        names = ", ".join(str(file.path) for file in files)
        rank_zero_warn(f"verify=False: these files are used as they are, whatever they hold: {names}")
        return
    for file in files:
        if file.md5 is not None:
            with file.path.open("rb") as stream:
                _compare(file, hashlib.file_digest(stream, "md5").hexdigest())


def fetch(url: str, file: OfficialFile, *, verify: bool) -> None:
    """Fetch a file that is not there yet.

    It is written under a temporary name beside its place and gets its own name when it is whole and its checksum is
    right, so that a file under that name is never a part of one. A file that exists is left as it is.

    Raises:
        DataError: If the transfer fails, stops early, or brings another file.
    """
    if file.path.exists():
        return
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(file.path) as part:
        sum_ = _transfer(url, part)
        if verify and file.md5 is not None:
            _compare(OfficialFile(file.path, file.md5), sum_, url)
        _publish(part, file.path)


def _transfer(url: str, part: Path) -> str:
    """Write what a URL holds into a file and returns its MD5 sum."""
    digest = hashlib.md5(usedforsecurity=False)
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, part.open("xb") as stream:
            stated = answer.headers.get("Content-Length")
            total = int(stated) if stated else None
            with tqdm(total=total, unit="B", unit_scale=True, desc=url.rpartition("/")[2], disable=None) as bar:
                while chunk := answer.read(_CHUNK):
                    stream.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
    except (OSError, HTTPException, ValueError) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise DataError(f"{url}: the download failed ({error}); try again, or put the file there yourself") from error
    if total is not None and received != total:
        raise DataError(f"{url}: the download stopped after {received} of {total} bytes; try again")
    return digest.hexdigest()


def _publish(part: Path, path: Path) -> None:
    """Give a whole file its name, unless a file has it already."""
    try:
        os.link(part, path)  # unlike a rename it never replaces a file
    except FileExistsError:
        pass  # another process was faster, with the same file
    except OSError:  # a file system without hard links
        if not path.exists():
            part.rename(path)


def _compare(file: OfficialFile, sum_: str, origin: str | None = None) -> None:
    if sum_ != file.md5:
        what = f"what {origin} sends for {file.path.name}" if origin else str(file.path)
        remedy = "nothing was kept" if origin else "remove it and get it again"
        raise DataError(
            f"{what} has the MD5 sum {sum_} where {file.md5} is published: it is damaged or another version; {remedy}, "
            "or set verify=false to use it as it is"
        )


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    part = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
