"""Pickled arrays read without running what the pickle says: the one place where this project opens a pickle.

Planetoid's data sets exist as pickles alone, and a pickle is a program: whoever wrote the file chooses what it calls.
Here it can call nothing. Of each name that arrays, sparse matrices and plain containers need, a stand-in is handed out
that only remembers its arguments; every other name is refused. The arrays are then made by the functions below, from
checked bytes, shapes and types, so that neither NumPy's nor SciPy's own way of restoring state ever sees the file.
"""

import io
import math
import pickle
import re
from typing import Any, ClassVar, Self

import numpy as np
from scipy import sparse

from framp_core.memory import require_memory

csr_array: Any = sparse.csr_array


class _Noted:
    """An object as the pickle describes it: its arguments and its state."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: object) -> Self:
        noted = super().__new__(cls)
        noted.args, noted.state = args, None
        return noted

    def __init__(self, *args: object) -> None:
        """Takes what ``__new__`` has kept."""

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Class(_Noted):
    """A class that is named and never made: the type of an array, or what a default dictionary fills in."""

    __slots__ = ()


class _Array(_Noted):
    __slots__ = ()


class _Type(_Noted):
    __slots__ = ()


class _Rows(_Noted):
    """A sparse matrix by rows."""

    __slots__ = ()


class _Text(_Noted):
    """Bytes that Python 3 wrote as latin-1 text, or none, for pickles of protocol 2."""

    __slots__ = ()


class _Made(_Noted):
    """``copyreg``'s way to say: an object of this class."""

    __slots__ = ()


class _Dict(dict[Any, Any]):
    """A default dictionary without its default."""

    __slots__ = ()

    def __init__(self, *args: object) -> None:
        """Takes no content: a default dictionary may be told another to copy."""
        super().__init__()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a dictionary has no further state")


_ADMITTED: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): _Class,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("scipy.sparse.csr", "csr_matrix"): _Rows,
    ("scipy.sparse._csr", "csr_matrix"): _Rows,
    ("scipy.sparse._csr", "csr_array"): _Rows,
    ("_codecs", "encode"): _Text,
    ("collections", "defaultdict"): _Dict,
    **{(module, "_reconstructor"): _Made for module in ("copy_reg", "copyreg")},
    **{(module, name): _Class for module in ("__builtin__", "builtins") for name in ("list", "object")},
    **{(module, "bytes"): _Text for module in ("__builtin__", "builtins")},
}
_NUMBERS = re.compile(r"[biuf][1248]")


class _Reader(pickle._Unpickler):
    """Python's own unpickler: the one in C takes memory for whatever position in its memo a file names.

    Both take it for a byte array before they have one, so there are none; protocol 4 and older have none either.
    """

    dispatch: ClassVar = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in; nothing is imported."""
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {f'{module}.{name}'[:80]!r}; only arrays, sparse matrices and plain containers are read"
            ) from None


def read_pickle(content: bytes) -> Any:
    """What a pickle holds: numbers, text and plain containers, and stand-ins that :func:`dense` reads.

    Raises:
        Exception: of almost any kind, if the pickle is damaged; ``pickle.UnpicklingError`` if it asks for more.
    """
    return _Reader(io.BytesIO(content), encoding="latin1").load()


def dense(found: object) -> np.ndarray:
    """The array, or the sparse matrix as an array, of a stand-in.

    Raises:
        ValueError: it is neither, or is not consistent.
        DataError: it takes more memory than is free.
    """
    if isinstance(found, _Made) and found.args and found.args[0] is _Rows:
        state, found = found.state, _Rows()
        found.state = state
    if not isinstance(found, _Rows):
        return _array(found)
    state = found.state
    if not isinstance(state, dict):
        raise ValueError("a sparse matrix has no content")
    rows, columns = _shape(state.get("_shape", state.get("shape")), 2)
    data, indices, indptr = (_array(state.get(name)) for name in ("data", "indices", "indptr"))
    require_memory(3 * rows * columns * max(4, data.itemsize), f"a sparse matrix has {rows} x {columns} numbers")
    matrix = csr_array((data, indices, indptr), shape=(rows, columns))
    matrix.check_format(full_check=True)  # What fills the array in looks at no bounds.
    array: np.ndarray = matrix.toarray()
    return array


def _array(found: object) -> np.ndarray:
    if not isinstance(found, _Array) or not isinstance(found.state, tuple) or len(found.state) != 5:
        raise ValueError(f"expected an array and found {type(found).__name__.strip('_').lower()}")
    _, sides, kind, by_columns, raw = found.state
    dtype, content = _dtype(kind), _bytes(raw)
    shape = _shape(sides)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"an array of {len(content)} bytes says that it is {dtype} of shape {shape}"[:200])
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")


def _shape(sides: object, count: int = 0) -> tuple[int, ...]:
    if not isinstance(sides, tuple) or not all(type(side) is int and side >= 0 for side in sides):
        raise ValueError("a shape is not a tuple of whole numbers")
    if len(sides) > 8 or (count and len(sides) != count):
        raise ValueError(f"a shape has {len(sides)} sides")
    return sides


def _dtype(kind: object) -> np.dtype[Any]:
    """Plain numbers alone, so that no byte is ever taken for the address of an object."""
    if not isinstance(kind, _Type) or not kind.args or not isinstance(kind.args[0], str):
        raise ValueError("an array has no type")
    order = kind.state[1] if isinstance(kind.state, tuple) and len(kind.state) > 1 else "="
    if not _NUMBERS.fullmatch(kind.args[0]) or order not in ("<", ">", "|", "="):
        raise ValueError(f"an array has type {str(kind.args[0])[:20]!r}, expected numbers")
    return np.dtype(f"{order}{kind.args[0]}")


def _bytes(raw: object) -> bytes:
    if isinstance(raw, _Text):
        raw = raw.args[0] if raw.args else b""
    if isinstance(raw, str):
        return raw.encode("latin1")
    if not isinstance(raw, bytes):
        raise ValueError("an array has no bytes")
    return raw
