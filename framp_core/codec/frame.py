"""The frame around every message: what it is, how long its parts are, and a checksum.

Little-endian: magic ``FRMP``, protocol version (1 byte), kind (1), value format (1), the length of each part (4 each),
the parts, CRC-32 of everything before (4).
"""

import struct
import zlib
from dataclasses import dataclass

from framp_core.codec.values import BYTES_PER_VALUE, ValueFormat
from framp_core.errors import ChecksumError, ProtocolError, TruncatedMessageError, VersionMismatchError

PROTOCOL_VERSION = 3

_MAGIC = b"FRMP"
_FORMATS: tuple[ValueFormat, ...] = tuple(BYTES_PER_VALUE)
_HEAD = struct.Struct("<4sBBB")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Kind:
    """A kind of message and the parts it has, in order."""

    code: int
    name: str
    parts: tuple[str, ...]

    @property
    def lengths(self) -> struct.Struct:
        """The table of lengths in the header."""
        return struct.Struct(f"<{len(self.parts)}I")


SUBMODEL = Kind(1, "submodel", ("values", "mask", "prototypes"))
UPDATE = Kind(2, "update", ("values", "prototypes"))
DESCRIPTOR = Kind(3, "descriptor", ("descriptor",))
SLIM = Kind(4, "slim", ("values", "mask"))
_KINDS = {kind.code: kind for kind in (SUBMODEL, UPDATE, DESCRIPTOR, SLIM)}


@dataclass(frozen=True)
class Encoded:
    """A message and where its bytes go.

    Attributes:
        blob: the message.
        parts: bytes by part; they sum to ``len(blob)``. ``framing`` is the header and the checksum.
    """

    blob: bytes
    parts: dict[str, int]


@dataclass(frozen=True)
class Message:
    """A message that was cut into its parts.

    Attributes:
        value_format: how its values are written.
        contents: the bytes of each part.
        parts: bytes by part and of the framing, as in :class:`Encoded`.
    """

    value_format: ValueFormat
    contents: dict[str, memoryview]
    parts: dict[str, int]


def pack(kind: Kind, value_format: ValueFormat, *contents: bytes) -> Encoded:
    """Put parts into a frame.

    Args:
        kind: the kind of message.
        value_format: how its values are written.
        contents: one per part of the kind.
    """
    head = _HEAD.pack(_MAGIC, PROTOCOL_VERSION, kind.code, _FORMATS.index(value_format))
    pieces = [head, kind.lengths.pack(*map(len, contents)), *contents]
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    blob = b"".join([*pieces, _CHECKSUM.pack(checksum)])
    parts = dict(zip(kind.parts, map(len, contents), strict=True))
    return Encoded(blob, parts | {"framing": len(blob) - sum(parts.values())})


def unpack(blob: bytes, expected: Kind) -> Message:
    """Check the frame of a message and cut it into its parts, without copying them.

    Raises:
        ProtocolError: a subclass per fault, see :mod:`framp_core.errors`.
    """
    if not isinstance(blob, bytes):
        raise ProtocolError(f"the message is of type {type(blob).__name__}, expected bytes; send the encoded blob")
    kind, format_code = read_head(blob)
    start = _HEAD.size + kind.lengths.size
    if len(blob) < start:
        raise TruncatedMessageError(f"the message ends in its header, after {len(blob)} bytes; have it sent again")
    lengths = kind.lengths.unpack_from(blob, _HEAD.size)
    announced = start + sum(lengths) + _CHECKSUM.size
    if len(blob) != announced:
        raise TruncatedMessageError(f"got {len(blob)} bytes and the header announces {announced}; have it sent again")
    view = memoryview(blob)
    if _CHECKSUM.unpack(view[-_CHECKSUM.size :]) != (zlib.crc32(view[: -_CHECKSUM.size]),):
        raise ChecksumError(f"the {len(blob)} bytes changed on the way (CRC-32 differs); have the message sent again")
    if kind != expected:
        raise ProtocolError(f"got a message of kind {kind.name}, expected {expected.name}; check who sends what")
    if format_code >= len(_FORMATS):
        raise ProtocolError(f"value format {format_code} is unknown, expected 0 to {len(_FORMATS) - 1} {_FORMATS}")
    contents = {}
    for name, length in zip(kind.parts, lengths, strict=True):
        contents[name], start = view[start : start + length], start + length
    parts = {name: len(content) for name, content in contents.items()}
    return Message(_FORMATS[format_code], contents, parts | {"framing": len(blob) - sum(lengths)})


def read_head(blob: bytes) -> tuple[Kind, int]:
    """Kind and format code. The version is looked at before anything whose place depends on it."""
    if len(blob) < _HEAD.size:
        raise TruncatedMessageError(f"got {len(blob)} bytes, a message has at least {_HEAD.size}; have it sent again")
    magic, version, kind_code, format_code = _HEAD.unpack_from(blob)
    if magic != _MAGIC:
        raise ProtocolError(f"the message starts with {magic!r}, expected {_MAGIC!r}; it is not a FRAMP message")
    if version != PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"the message is of protocol version {version}, this side speaks {PROTOCOL_VERSION}; "
            f"install the same FRAMP version on server and clients"
        )
    if kind_code not in _KINDS:
        raise ProtocolError(f"message kind {kind_code} is unknown, expected one of {sorted(_KINDS)}")
    return _KINDS[kind_code], format_code
