"""Reading pickles that come from elsewhere: arrays and primitives, and no code."""

import io
import pickle
from typing import Any

import numpy as np

from lightning_easgd.lab.data.errors import DataError

# How NumPy's own pickles make an array, up to protocol 4 and from protocol 5 on.
_reconstruct = np.empty(0).__reduce__()[0]
_frombuffer = np.empty(0).__reduce_ex__(5)[0]


def _encode(text: str, codec: str) -> bytes:
    # Pickles of protocol 2 from Python 3 hold bytes as text; other codecs could decompress without bounds.
    if codec != "latin1":
        raise pickle.UnpicklingError(f"the codec {codec!r} is not allowed")
    return text.encode("latin1")


def _dtype(code: str, align: int, copy: int) -> np.dtype[Any]:
    # Python 2 wrote the two flags as integers, which NumPy 2.4 warns of.
    dtype = np.dtype(code, bool(align), bool(copy))
    if dtype.hasobject:
        raise pickle.UnpicklingError("arrays of objects are not allowed")
    return dtype


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # written with NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}; only arrays and primitives are read")
        return _ALLOWED[module, name]


def read_pickle(content: bytes, source: str) -> Any:
    """Read a pickle of NumPy arrays and Python primitives; nothing else in it is run.

    Text that Python 2 wrote is returned as `bytes`.

    Raises:
        DataError: If it is torn, or holds anything else.
    """
    try:
        return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a torn pickle can raise anything
        raise DataError(f"{source}: this pickle cannot be read ({error}); download the file again") from error
