"""Class prototypes as bytes: their number p, p class ids, p counts, p x f float32 means; little-endian.

No bytes stand for no prototypes.
"""

import struct

import numpy as np

from framp_core.codec.values import require_finite
from framp_core.errors import ProtocolError
from framp_core.prototypes import Prototypes

_UINT32 = struct.Struct("<I")


def _uint32_bytes(numbers: np.ndarray, what: str) -> bytes:
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < 2**32:
        raise ProtocolError(f"{what} range from {numbers.min()} to {numbers.max()}, expected 0 to 2**32 - 1")
    return numbers.astype("<u4").tobytes()


def encode_prototypes(prototypes: Prototypes | None) -> bytes:
    """Write prototypes; None is written as nothing."""
    if prototypes is None:
        return b""
    return b"".join(
        [
            _UINT32.pack(len(prototypes.classes)),
            _uint32_bytes(prototypes.classes, "class ids of prototypes"),
            _uint32_bytes(prototypes.counts, "counts of prototypes"),
            prototypes.means.astype("<f4").tobytes(),
        ]
    )


def decode_prototypes(data: memoryview, classes: int, feature_size: int) -> Prototypes | None:
    """Inverse of :func:`encode_prototypes`.

    Args:
        data: the code.
        classes: C; class ids lie in [0, C), each once, ascending.
        feature_size: f, the width of a prototype.

    Raises:
        ProtocolError: no code of such prototypes.
        NonFiniteError: a mean is NaN or infinite.
    """
    if not data:
        return None
    number = _UINT32.unpack_from(data)[0] if len(data) >= _UINT32.size else 0
    expected = _UINT32.size * (1 + number * (2 + feature_size))
    if len(data) != expected:
        raise ProtocolError(
            f"{number} prototypes take {len(data)} bytes, expected {expected} at {feature_size} features each; "
            f"use one model on both sides"
        )
    integers = np.frombuffer(data, "<u4", 2 * number, _UINT32.size).astype(np.int64)
    ids, counts = integers[:number], integers[number:]
    if number and (ids[-1] >= classes or (np.diff(ids) <= 0).any()):
        raise ProtocolError(
            f"got {number} prototypes of classes up to {ids.max()}, expected each class once, ascending, "
            f"below {classes}; use one data set on both sides"
        )
    if (counts < 1).any():
        raise ProtocolError("a prototype of 0 examples was sent; a class without examples has no prototype")
    means = np.frombuffer(data, "<f4", offset=_UINT32.size * (1 + 2 * number)).astype(np.float32)
    require_finite(means, "prototypes")
    return Prototypes(ids, counts, means.reshape(number, feature_size))
