"""The idx format of MNIST and its kin: big-endian sizes, then raw bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_easgd.lab.data.errors import DataError

_UNSIGNED_BYTE = 0x08
_AGAIN = "download the file again"


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read a file of unsigned bytes of so many dimensions, as it is or compressed by gzip (`.gz`), in its own shape.

    A file begins with two zero bytes, the code of the type, the number of dimensions, and each size as a big-endian
    32-bit integer. (Format: http://yann.lecun.com/exdb/mnist)

    Raises:
        DataError: If the file is torn, or of another type or number of dimensions.
    """
    content = _content(path)
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path}: {len(content)} bytes are too few for the header of an idx file; {_AGAIN}")
    zero, code, stated = struct.unpack_from(">HBB", content)
    if (zero, code) != (0, _UNSIGNED_BYTE):
        raise DataError(f"{path}: it begins with {content[:4].hex()}, not as an idx file of unsigned bytes; {_AGAIN}")
    if stated != dimensions:
        raise DataError(f"{path}: an idx file of {stated} dimensions where {dimensions} are expected; {_AGAIN}")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: {len(content) - start} bytes of data where the header's shape {shape} needs {math.prod(shape)};"
            f" {_AGAIN}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: this gzip file cannot be read ({error}); {_AGAIN}") from error
