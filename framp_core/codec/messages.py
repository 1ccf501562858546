"""Messages between server and client: submodel down, update up, descriptor up.

Wire format, little-endian: magic ``FRMP``, protocol version (1 byte), kind (1), value format (1), the length of each
part (4 each), the parts, CRC-32 of everything before (4). A submodel has the parts values, mask and prototypes; an
update values and prototypes, since both ends know the mask; a descriptor its vector alone. A slim submodel, one of
whole channels, has values and, as its mask, the selected channels. Prototypes are their number p, then p class ids,
p image counts and p x f float32 means; an empty part stands for no prototypes, and those of a slim client have f = 0.
"""

import struct
import zlib
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from framp_core.codec.masks import decode_mask, encode_mask
from framp_core.codec.values import BYTES_PER_VALUE, ValueFormat, decode_values, encode_values
from framp_core.errors import (
    ChecksumError,
    MaskMismatchError,
    NonFiniteError,
    ProtocolError,
    TruncatedMessageError,
    VersionMismatchError,
)
from framp_core.layout import ParameterLayout
from framp_core.prototypes import Prototypes
from framp_core.structured import by_group, held_channels, kept_sizes, selection_of, slim_size

PROTOCOL_VERSION = 2
MAX_DESCRIPTOR_SIZE = 65_536
"""Floats of a descriptor; the server keeps one per client, so a client must not choose how much that is."""

_MAGIC = b"FRMP"
_FORMATS: tuple[ValueFormat, ...] = tuple(BYTES_PER_VALUE)
_HEAD = struct.Struct("<4sBBB")
_UINT32 = struct.Struct("<I")


@dataclass(frozen=True)
class _Kind:
    code: int
    name: str
    parts: tuple[str, ...]

    @property
    def lengths(self) -> struct.Struct:
        return struct.Struct(f"<{len(self.parts)}I")


_SUBMODEL = _Kind(1, "submodel", ("values", "mask", "prototypes"))
_UPDATE = _Kind(2, "update", ("values", "prototypes"))
_DESCRIPTOR = _Kind(3, "descriptor", ("descriptor",))
_SLIM = _Kind(4, "slim", ("values", "mask"))
_KINDS = {kind.code: kind for kind in (_SUBMODEL, _UPDATE, _DESCRIPTOR, _SLIM)}


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
class Submodel:
    """What a client receives.

    Attributes:
        values: float32 ``(k + always kept,)``, theta at the kept positions in layout order; finite.
        mask: bool ``(n,)``, true where kept; always-kept parameters are true.
        prototypes: global prototypes, None when the server sent none.
    """

    values: np.ndarray
    mask: np.ndarray
    prototypes: Prototypes | None

    def theta(self) -> np.ndarray:
        """The submodel as a full vector, float32 ``(n,)``, zero where dropped."""
        theta = np.zeros(self.mask.size, dtype=np.float32)
        theta[self.mask] = self.values
        return theta


@dataclass(frozen=True)
class SlimSubmodel:
    """What a client of a method that slices channels receives.

    Attributes:
        values: float32 ``(k,)``, the flat vector of the slim network; finite.
        selection: bool ``(hidden_size,)``, the channels it keeps of each hidden group, in layout order.
    """

    values: np.ndarray
    selection: np.ndarray


@dataclass(frozen=True)
class Update:
    """What the server receives after local training.

    Attributes:
        delta_kept: float32 ``(k + always kept,)``, trained minus received weights at the kept positions; finite.
        prototypes: local prototypes, None when the client sent none.
        parts: bytes of the message by part.
    """

    delta_kept: np.ndarray
    prototypes: Prototypes | None
    parts: dict[str, int]


@dataclass(frozen=True)
class _Message:
    value_format: ValueFormat
    contents: dict[str, memoryview]
    parts: dict[str, int]


def encode_submodel(
    theta_kept: np.ndarray,
    mask: np.ndarray,
    prototypes: Prototypes | None,
    layout: ParameterLayout,
    value_format: ValueFormat,
) -> Encoded:
    """Server to client: the kept weights, which they are, and the global prototypes.

    Args:
        theta_kept: float32 ``(k + always kept,)``, ``theta[mask]``.
        mask: bool ``(n,)``; always-kept parameters must be true.
        prototypes: global prototypes, None for none.
        layout: description of the full vector.
        value_format: how the weights are written.

    Raises:
        MaskMismatchError: mask, values and layout do not fit together.
    """
    sizes = _kept_sizes(mask, layout)
    if not mask[~layout.maskable].all():
        raise MaskMismatchError("the mask drops parameters that are always kept; start it from ~layout.maskable")
    return _pack(
        _SUBMODEL,
        value_format,
        encode_values(theta_kept, value_format, sizes),
        encode_mask(mask[layout.maskable]),
        _encode_prototypes(prototypes),
    )


def decode_submodel(
    blob: bytes, layout: ParameterLayout, classes: int, feature_size: int, expected_kept: int | None = None
) -> Submodel:
    """Inverse of :func:`encode_submodel`.

    Args:
        blob: the message.
        layout: description of the model that this client would build.
        classes: C; class ids of prototypes lie in [0, C).
        feature_size: f, the width of a prototype.
        expected_kept: k, maskable weights that this client can hold; None accepts any number.

    Raises:
        ProtocolError: a subclass per fault, see :mod:`framp_core.errors`.
    """
    message = _unpack(blob, _SUBMODEL)
    maskable_kept = decode_mask(message.contents["mask"], layout.maskable_size)
    kept = int(np.count_nonzero(maskable_kept))
    if expected_kept not in (None, kept):
        raise MaskMismatchError(
            f"the mask keeps {kept} maskable weights and this client expects {expected_kept}; "
            f"check that the server knows the client's capacity"
        )
    mask = ~layout.maskable
    mask[layout.maskable] = maskable_kept
    values = _decode_finite(message, "values", _kept_sizes(mask, layout))
    prototypes = _decode_prototypes(message.contents["prototypes"], classes, feature_size)
    return Submodel(values, mask, prototypes)


def is_slim(blob: bytes) -> bool:
    """Whether a message is a slim submodel, going by its header alone.

    Raises:
        ProtocolError: a subclass per fault of the header, see :mod:`framp_core.errors`.
    """
    return _read_head(blob)[0] == _SLIM


def encode_slim(
    theta_kept: np.ndarray, mask: np.ndarray, layout: ParameterLayout, value_format: ValueFormat
) -> Encoded:
    """Server to client: the weights of a submodel of whole channels, and which channels those are.

    Args:
        theta_kept: float32 ``(k,)``, ``theta[mask]``.
        mask: bool ``(n,)``, of :func:`framp_core.structured.channel_mask`.
        layout: description of the full vector.
        value_format: how the weights are written.

    Raises:
        MaskMismatchError: mask, values and layout do not fit together, or channels are kept in part.
    """
    values = encode_values(theta_kept, value_format, _kept_sizes(mask, layout))
    return _pack(_SLIM, value_format, values, encode_mask(selection_of(layout, mask)))


def decode_slim(blob: bytes, layout: ParameterLayout, capacity: Fraction) -> SlimSubmodel:
    """Inverse of :func:`encode_slim`; allocates no more than the slim network takes.

    Args:
        blob: the message.
        layout: description of the full model.
        capacity: gamma of this client, which fixes how many channels of each group it holds
            (:func:`framp_core.structured.slim_size`).

    Raises:
        ProtocolError: a subclass per fault, see :mod:`framp_core.errors`.
    """
    message = _unpack(blob, _SLIM)
    selection = decode_mask(message.contents["mask"], layout.hidden_size)
    held = held_channels(layout, slim_size(layout, capacity))
    for group, channels in by_group(layout, selection).items():
        kept, expected = int(np.count_nonzero(channels)), held[group]
        if kept != expected:
            raise MaskMismatchError(
                f"the submodel keeps {kept} of the {channels.size} channels of {group} and a client of capacity "
                f"{capacity} holds {expected}; check that the server knows the client's capacity"
            )
    return SlimSubmodel(_decode_finite(message, "values", kept_sizes(layout, selection)), selection)


def encode_update(
    delta_kept: np.ndarray,
    prototypes: Prototypes | None,
    layout: ParameterLayout,
    mask: np.ndarray,
    value_format: ValueFormat,
    rng: np.random.Generator | None = None,
) -> Encoded:
    """Client to server: the change of the kept weights and the local prototypes. The mask does not travel.

    Args:
        delta_kept: float32 ``(k + always kept,)``, ``delta[mask]``.
        prototypes: local prototypes, None for none.
        layout: description of the full vector.
        mask: bool ``(n,)``, the one that came with the submodel.
        value_format: how the values are written.
        rng: stream for the stochastic rounding of int8; None rounds to nearest.

    Raises:
        MaskMismatchError: mask, values and layout do not fit together.
    """
    values = encode_values(delta_kept, value_format, _kept_sizes(mask, layout), rng)
    return _pack(_UPDATE, value_format, values, _encode_prototypes(prototypes))


def decode_update(blob: bytes, layout: ParameterLayout, mask: np.ndarray, classes: int, feature_size: int) -> Update:
    """Inverse of :func:`encode_update`, up to the rounding of the value format.

    Args:
        blob: the message.
        layout: description of the full vector.
        mask: bool ``(n,)``, the one that went down to this client.
        classes: C; class ids of prototypes lie in [0, C).
        feature_size: f, the width of a prototype.

    Raises:
        ProtocolError: a subclass per fault, see :mod:`framp_core.errors`.
    """
    message = _unpack(blob, _UPDATE)
    delta_kept = _decode_finite(message, "values", _kept_sizes(mask, layout))
    prototypes = _decode_prototypes(message.contents["prototypes"], classes, feature_size)
    return Update(delta_kept, prototypes, message.parts)


def encode_descriptor(vector: np.ndarray) -> Encoded:
    """Client to server, once: its descriptor.

    Args:
        vector: descriptor, float32 ``(d,)``, 1 <= d <= ``MAX_DESCRIPTOR_SIZE``.

    Raises:
        ProtocolError: d is out of range.
    """
    _require_descriptor_size(vector.size)
    return _pack(_DESCRIPTOR, "float32", encode_values(vector, "float32", [vector.size]))


def decode_descriptor(blob: bytes) -> np.ndarray:
    """Inverse of :func:`encode_descriptor`.

    Returns:
        float32 ``(d,)``, finite, 1 <= d <= ``MAX_DESCRIPTOR_SIZE``.

    Raises:
        ProtocolError: a subclass per fault, see :mod:`framp_core.errors`.
    """
    message = _unpack(blob, _DESCRIPTOR)
    size = message.parts["descriptor"] // BYTES_PER_VALUE[message.value_format]
    _require_descriptor_size(size)
    return _decode_finite(message, "descriptor", [size])


def _require_descriptor_size(size: int) -> None:
    if not 1 <= size <= MAX_DESCRIPTOR_SIZE:
        raise ProtocolError(
            f"the descriptor has {size} floats, expected 1 to {MAX_DESCRIPTOR_SIZE}; "
            f"choose another descriptor.name or a smaller network"
        )


def _kept_sizes(mask: np.ndarray, layout: ParameterLayout) -> list[int]:
    """Kept weights per tensor."""
    if mask.shape != (layout.size,):
        raise MaskMismatchError(
            f"the mask has shape {mask.shape} and the model {layout.size} parameters; use one model"
        )
    return [int(np.count_nonzero(mask[slot.slice])) for slot in layout.slots]


def _pack(kind: _Kind, value_format: ValueFormat, *contents: bytes) -> Encoded:
    head = _HEAD.pack(_MAGIC, PROTOCOL_VERSION, kind.code, _FORMATS.index(value_format))
    pieces = [head, kind.lengths.pack(*map(len, contents)), *contents]
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    blob = b"".join([*pieces, _UINT32.pack(checksum)])
    parts = dict(zip(kind.parts, map(len, contents), strict=True))
    return Encoded(blob, parts | {"framing": len(blob) - sum(parts.values())})


def _unpack(blob: bytes, expected: _Kind) -> _Message:
    """Check the frame of a message and cut it into its parts, without copying them."""
    if not isinstance(blob, bytes):
        raise ProtocolError(f"the message is of type {type(blob).__name__}, expected bytes; send the encoded blob")
    kind, format_code = _read_head(blob)
    start = _HEAD.size + kind.lengths.size
    if len(blob) < start:
        raise TruncatedMessageError(f"the message ends in its header, after {len(blob)} bytes; have it sent again")
    lengths = kind.lengths.unpack_from(blob, _HEAD.size)
    announced = start + sum(lengths) + _UINT32.size
    if len(blob) != announced:
        raise TruncatedMessageError(f"got {len(blob)} bytes and the header announces {announced}; have it sent again")
    view = memoryview(blob)
    if _UINT32.unpack(view[-_UINT32.size :]) != (zlib.crc32(view[: -_UINT32.size]),):
        raise ChecksumError(f"the {len(blob)} bytes changed on the way (CRC-32 differs); have the message sent again")
    if kind != expected:
        raise ProtocolError(f"got a message of kind {kind.name}, expected {expected.name}; check who sends what")
    if format_code >= len(_FORMATS):
        raise ProtocolError(f"value format {format_code} is unknown, expected 0 to {len(_FORMATS) - 1} {_FORMATS}")
    contents = {}
    for name, length in zip(kind.parts, lengths, strict=True):
        contents[name], start = view[start : start + length], start + length
    parts = {name: len(content) for name, content in contents.items()}
    return _Message(_FORMATS[format_code], contents, parts | {"framing": len(blob) - sum(lengths)})


def _read_head(blob: bytes) -> tuple[_Kind, int]:
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


def _decode_finite(message: _Message, part: str, sizes: list[int]) -> np.ndarray:
    values = decode_values(message.contents[part], message.value_format, sizes)
    _require_finite(values, part)
    return values


def _require_finite(values: np.ndarray, what: str) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"{np.count_nonzero(~np.isfinite(values))} of {values.size} numbers in {what} are NaN or infinite; "
            f"lower the learning rate of the side that sent them"
        )


def _uint32_bytes(numbers: np.ndarray, what: str) -> bytes:
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < 2**32:
        raise ProtocolError(f"{what} range from {numbers.min()} to {numbers.max()}, expected 0 to 2**32 - 1")
    return numbers.astype("<u4").tobytes()


def _encode_prototypes(prototypes: Prototypes | None) -> bytes:
    if prototypes is None:
        return b""
    return b"".join(
        [
            _UINT32.pack(len(prototypes.classes)),
            _uint32_bytes(prototypes.classes, "class ids of prototypes"),
            _uint32_bytes(prototypes.counts, "image counts of prototypes"),
            prototypes.means.astype("<f4").tobytes(),
        ]
    )


def _decode_prototypes(data: memoryview, classes: int, feature_size: int) -> Prototypes | None:
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
        raise ProtocolError("a prototype of 0 images was sent; a class without images has no prototype")
    means = np.frombuffer(data, "<f4", offset=_UINT32.size * (1 + 2 * number)).astype(np.float32)
    _require_finite(means, "prototypes")
    return Prototypes(ids, counts, means.reshape(number, feature_size))
