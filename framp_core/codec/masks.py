"""Masks as bytes: the smallest of gap codes, compressed bits and plain bits, exact at every density.

A mask over m weights of which k are kept carries at least ``m * H(k / m)`` bits when nothing is known of it but its
density, H being the binary entropy. The first byte of the code names the coding of the rest:

- none or all kept: nothing follows;
- Rice (Rice and Plaunt 1971): ``gap = index - previous index - 1`` of the kept weights in two streams, the low r bits
  of all gaps (bit planes) and the unary high parts (a bitmap in which each one ends a quotient). Gaps of a random mask
  are geometric, for which the Rice code is within a few percent of the bound;
- zstd over the packed bits: its Huffman stage comes within a few percent of the bound at densities near one half, and
  finds structure such as dead channels;
- the packed bits themselves, the upper limit of every code: a longer one is refused before anything is decoded.
"""

import struct
from collections.abc import Callable

import numpy as np
import zstandard

from framp_core.errors import MaskMismatchError, ProtocolError, TruncatedMessageError

RICE_BELOW_DENSITY = 0.25
_NONE, _ALL, _PACKED, _ZSTD, _RICE = range(5)
_RICE_HEADER = struct.Struct("<BI")


def encode_mask(kept: np.ndarray) -> bytes:
    """Code a mask; the smallest coding wins.

    Args:
        kept: bool ``(m,)`` over the maskable weights in layout order, true where kept; m < 2**31.

    Returns:
        At most ``1 + ceil(m / 8)`` bytes.
    """
    count = int(np.count_nonzero(kept))
    if count in (0, kept.size):
        return bytes([_ALL if count else _NONE])
    packed = np.packbits(kept).tobytes()
    codes = [bytes([_PACKED]) + packed, bytes([_ZSTD]) + zstandard.ZstdCompressor().compress(packed)]
    if count < RICE_BELOW_DENSITY * kept.size:
        codes.append(bytes([_RICE]) + _rice_code(kept))
    return min(codes, key=len)


def decode_mask(data: bytes | memoryview, size: int) -> np.ndarray:
    """Inverse of :func:`encode_mask`. Allocates a small multiple of ``size``, whatever ``data`` claims.

    Args:
        data: the code.
        size: m, the number of maskable weights.

    Returns:
        Bool ``(m,)``.

    Raises:
        TruncatedMessageError: the code is shorter or longer than its content.
        MaskMismatchError: indices out of range, or another number of kept weights than announced.
        ProtocolError: the coding is unknown or cannot be decompressed.
    """
    limit = 1 + _packed_size(size)
    if not 1 <= len(data) <= limit:
        raise TruncatedMessageError(
            f"the mask takes {len(data)} bytes; a mask over {size} weights takes 1 to {limit}; "
            f"server and client must use the same model"
        )
    if data[0] not in _DECODERS:
        raise ProtocolError(f"mask coding {data[0]} is unknown, expected 0 to {len(_DECODERS) - 1}; update this side")
    return _DECODERS[data[0]](data[1:], size)


def _packed_size(size: int) -> int:
    return (size + 7) // 8


def _constant(value: bool) -> Callable[[bytes | memoryview, int], np.ndarray]:
    def decode(data: bytes | memoryview, size: int) -> np.ndarray:
        _require_length("a mask of none or all weights", len(data), 0)
        return np.full(size, value)

    return decode


def _unpack(data: bytes | memoryview, size: int) -> np.ndarray:
    _require_length("a mask of packed bits", len(data), _packed_size(size))
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[size:].any():
        raise MaskMismatchError(f"the mask keeps weights beyond the {size} of the model; use the same model")
    return bits[:size].view(np.bool_)


def _decompress(data: bytes | memoryview, size: int) -> np.ndarray:
    # zstandard trusts the size in the frame over max_output_size, so that size is checked before decompressing.
    try:
        announced = zstandard.get_frame_parameters(data).content_size
        _require_length("a compressed mask", announced, _packed_size(size))
        packed = zstandard.ZstdDecompressor().decompress(data, max_output_size=announced, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"the mask cannot be decompressed ({error}); have it sent again") from error
    return _unpack(packed, size)


def _rice_code(kept: np.ndarray) -> bytes:
    """Parameter r and k, the r low bit planes of the gaps, the unary bitmap of ``gap >> r``."""
    gaps = np.diff(np.flatnonzero(kept), prepend=-1) - 1
    parameter, quotients = _best_parameter(gaps)
    ends = np.cumsum(quotients + 1) - 1
    unary = np.zeros(ends[-1] + 1, dtype=np.bool_)
    unary[ends] = True
    planes = [(gaps >> bit & 1).astype(np.bool_) for bit in range(parameter)]
    remainders = np.packbits(np.concatenate(planes)).tobytes() if planes else b""
    return _RICE_HEADER.pack(parameter, gaps.size) + remainders + np.packbits(unary).tobytes()


def _best_parameter(gaps: np.ndarray) -> tuple[int, np.ndarray]:
    """The r of the shortest code, and ``gaps >> r``.

    One more remainder bit costs one bit per gap and saves the upper halves of the quotients. What it saves only
    falls as r grows, so the first r at which it does not pay is the best one.
    """
    parameter, quotients = 0, gaps
    while (quotients - (quotients >> 1)).sum() > gaps.size:
        parameter, quotients = parameter + 1, quotients >> 1
    return parameter, quotients


def _decode_rice(data: bytes | memoryview, size: int) -> np.ndarray:
    if len(data) < _RICE_HEADER.size:
        raise TruncatedMessageError(f"a gap-coded mask takes more than {_RICE_HEADER.size} bytes, got {len(data)}")
    parameter, count = _RICE_HEADER.unpack_from(data)
    if not 0 < count <= size or parameter > size.bit_length():
        raise MaskMismatchError(
            f"the mask announces {count} of {size} weights with Rice parameter {parameter}; expected 1 to {size} "
            f"weights and a parameter up to {size.bit_length()}; use the same model on both sides"
        )
    start = _RICE_HEADER.size
    middle = start + (count * parameter + 7) // 8
    quotients = _decode_unary(data[middle:], count)
    remainders = _decode_remainders(data[start:middle], count, parameter)
    indices = np.cumsum((quotients << parameter | remainders) + 1) - 1
    if indices[-1] >= size:
        raise MaskMismatchError(f"the mask keeps weight {indices[-1]} of a model with {size}; use the same model")
    kept = np.zeros(size, dtype=np.bool_)
    kept[indices] = True
    return kept


def _decode_unary(data: bytes | memoryview, count: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    ends = np.flatnonzero(bits)
    if ends.size != count:
        raise MaskMismatchError(f"the mask announces {count} kept weights and codes {ends.size}; have it sent again")
    _require_length("the quotients of a gap-coded mask", len(data), _packed_size(int(ends[-1]) + 1))
    return np.diff(ends, prepend=-1) - 1


def _decode_remainders(data: bytes | memoryview, count: int, parameter: int) -> np.ndarray:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * parameter)
    remainders = np.zeros(count, dtype=np.int64)
    for bit, plane in enumerate(bits.reshape(parameter, count)):
        remainders |= plane.astype(np.int64) << bit
    return remainders


def _require_length(what: str, given: int, expected: int) -> None:
    if given != expected:
        raise TruncatedMessageError(f"{what} takes {expected} bytes here, got {given}; use the same model, or resend")


_DECODERS: dict[int, Callable[[bytes | memoryview, int], np.ndarray]] = {
    _NONE: _constant(False),
    _ALL: _constant(True),
    _PACKED: _unpack,
    _ZSTD: _decompress,
    _RICE: _decode_rice,
}
