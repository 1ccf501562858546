"""Masks as bytes: alone, tensor by tensor, or as flips against a reference mask that the receiver holds or is sent.

Alone, each tensor of a mask has its own density, since the weights that one threshold keeps cluster by layer; where
that does not pay for the counts, all tensors are coded as one. Against a reference the flips ``mask ^ reference`` are
coded, those of kept weights apart from those of dropped weights: as many weights leave the mask as enter it, but they
leave from among fewer.

The mask in a submodel begins with one byte that names its form. References go by :attr:`Reference.name` (4 bytes):

=========  ==============================================================================
form       what follows
=========  ==============================================================================
alone      the mask
held       name of the reference that the client holds; flips of the mask
given      a new reference, alone; flips of the mask against it
renewed    name of the reference held; flips of a new one against it; flips of the mask against the new one
=========  ==============================================================================
"""

import struct
import zlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from framp_core.codec.bits import Partition, decode_bits, encode_bits, expected_segment
from framp_core.errors import ProtocolError, TruncatedMessageError, UnknownReferenceError
from framp_core.packed_mask import PackedMask

_ALONE, _HELD, _GIVEN, _RENEWED = range(4)
_UINT32 = struct.Struct("<I")


class Reference(PackedMask):
    """A mask over the maskable weights that server and client both hold."""

    @cached_property
    def name(self) -> int:
        """CRC-32 of the bits. Two ends that mean different masks by one name would go apart silently."""
        return zlib.crc32(self.bits.tobytes())


def encode_mask(kept: np.ndarray, sizes: Sequence[int]) -> bytes:
    """Code a mask alone.

    Args:
        kept: bool ``(m,)``, true where kept; m < 2**31.
        sizes: weights of each tensor, summing to m.

    Returns:
        At most :func:`framp_core.codec.bits.longest_code` of m bytes.
    """
    return encode_bits(kept, _by_tensor(sizes))


def decode_mask(data: bytes | memoryview, sizes: Sequence[int]) -> np.ndarray:
    """Inverse of :func:`encode_mask`. Allocates a small multiple of m, whatever ``data`` claims.

    Returns:
        Bool ``(m,)``.

    Raises:
        TruncatedMessageError: the code is shorter or longer than its content.
        MaskMismatchError: indices out of range.
        ProtocolError: no code of a mask.
    """
    kept, used = decode_bits(data, _by_tensor(sizes))
    _require_end(data, used)
    return kept


def encode_flips(kept: np.ndarray, reference: np.ndarray, sizes: Sequence[int]) -> bytes:
    """Code a mask as its differences from another one, in ``m * H(flips)`` bits or fewer.

    Args:
        kept: bool ``(m,)``.
        reference: bool ``(m,)``.
        sizes: weights of each tensor, summing to m.
    """
    # Through the few flipped positions: selecting by a random mask of a quarter takes NumPy ten times as long.
    places, held = np.flatnonzero(kept ^ reference), np.flatnonzero(reference)
    before = np.searchsorted(held, places)  # weights of the reference before each
    flips = np.zeros(kept.size, dtype=np.bool_)
    flips[np.where(reference[places], before, held.size + places - before)] = True
    return encode_bits(flips, _by_side(reference, sizes))


def expected_flips(kept: np.ndarray, reference: np.ndarray) -> float:
    """Bits that :func:`encode_flips` is expected to take, by the numbers of weights that leave and enter alone."""
    before, both = int(np.count_nonzero(reference)), int(np.count_nonzero(reference & kept))
    enter = int(np.count_nonzero(kept)) - both
    return expected_segment(before, before - both) + expected_segment(kept.size - before, enter)


def decode_flips(data: bytes | memoryview, reference: np.ndarray, sizes: Sequence[int]) -> tuple[np.ndarray, int]:
    """Inverse of :func:`encode_flips`.

    Returns:
        The mask, bool ``(m,)``, and the number of bytes of its code.

    Raises:
        ProtocolError: as :func:`decode_mask`.
    """
    flips, used = decode_bits(data, _by_side(reference, sizes))
    held = int(np.count_nonzero(reference))
    kept = reference.copy()
    kept[np.flatnonzero(reference)[np.flatnonzero(flips[:held])]] = False
    kept[np.flatnonzero(~reference)[np.flatnonzero(flips[held:])]] = True
    return kept, used


def encode_mask_part(
    kept: np.ndarray, sizes: Sequence[int], held: Reference | None = None, new: Reference | None = None
) -> bytes:
    """The mask in a submodel.

    Args:
        kept: bool ``(m,)``.
        sizes: weights of each tensor, summing to m.
        held: the reference that the client holds, None if it holds none or shall not need it.
        new: the reference that it shall hold from now on, None if that does not change.
    """
    if held is None and new is None:
        return bytes([_ALONE]) + encode_mask(kept, sizes)
    if held is None:
        mask = new.kept()  # type: ignore[union-attr]
        return bytes([_GIVEN]) + encode_mask(mask, sizes) + encode_flips(kept, mask, sizes)
    before, name = held.kept(), _UINT32.pack(held.name)
    if new is None:
        return bytes([_HELD]) + name + encode_flips(kept, before, sizes)
    mask = new.kept()
    return bytes([_RENEWED]) + name + encode_flips(mask, before, sizes) + encode_flips(kept, mask, sizes)


def decode_mask_part(
    data: bytes | memoryview, sizes: Sequence[int], held: Reference | None
) -> tuple[np.ndarray, Reference | None]:
    """Inverse of :func:`encode_mask_part`.

    Args:
        data: the code.
        sizes: weights of each tensor.
        held: the reference that this client holds.

    Returns:
        The mask, bool ``(m,)``, and the reference to hold from now on.

    Raises:
        UnknownReferenceError: it is coded against a reference that this client does not hold.
        ProtocolError: as :func:`decode_mask`.
    """
    form = data[0] if data else None
    if form == _ALONE:
        return decode_mask(data[1:], sizes), held
    if form not in (_HELD, _GIVEN, _RENEWED):
        raise ProtocolError(f"mask form {form} is unknown, expected 0 to {_RENEWED}; update this side")
    rest = data[1:]
    if form == _GIVEN:
        reference, used = decode_bits(rest, _by_tensor(sizes))
    else:
        reference, used = _named(rest, held).kept(), _UINT32.size
        if form == _RENEWED:
            reference, more = decode_flips(rest[used:], reference, sizes)
            used += more
    kept, more = decode_flips(rest[used:], reference, sizes)
    _require_end(rest, used + more)
    return kept, held if form == _HELD else Reference.of(reference)


def _named(data: bytes | memoryview, held: Reference | None) -> Reference:
    """The reference whose name ``data`` begins with."""
    if len(data) < _UINT32.size:
        raise TruncatedMessageError(f"the mask ends within the name of its reference, after {len(data)} bytes")
    (name,) = _UINT32.unpack_from(data)
    if held is None or held.name != name:
        holds = "holds none" if held is None else f"holds {held.name:08x}"
        raise UnknownReferenceError(
            f"the mask is coded against the reference {name:08x} and this client {holds}; it was started again or "
            f"missed a message, and is sent the full form next time"
        )
    return held


def _by_tensor(sizes: Sequence[int]) -> list[Partition]:
    return [[sum(sizes)], sizes]


def _by_side(reference: np.ndarray, sizes: Sequence[int]) -> list[Partition]:
    """All flips as one; those of kept and of dropped weights; both tensor by tensor."""
    ends = np.cumsum(sizes, dtype=np.int64)
    kept = [int(np.count_nonzero(reference[end - size : end])) for end, size in zip(ends, sizes, strict=True)]
    dropped = [size - count for size, count in zip(sizes, kept, strict=True)]
    return [[sum(sizes)], [sum(kept), sum(dropped)], [*kept, *dropped]]


def _require_end(data: bytes | memoryview, used: int) -> None:
    if used != len(data):
        raise TruncatedMessageError(f"the mask ends after {used} of {len(data)} bytes; use the same model, or resend")
