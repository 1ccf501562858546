"""Messages between server and client: submodel down, update up, descriptor up.

Each is a frame (:mod:`framp_core.codec.frame`) around its parts. A submodel has the parts values, mask and prototypes;
an update values and prototypes, since both ends know the mask; a descriptor its vector alone. A slim submodel, one of
whole channels, has values and, as its mask, the selected channels. The prototypes of a slim client have f = 0.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from framp_core.codec.frame import DESCRIPTOR, SLIM, SUBMODEL, UPDATE, Encoded, Message, pack, read_head, unpack
from framp_core.codec.masks import Reference, decode_mask, decode_mask_part, encode_mask, encode_mask_part
from framp_core.codec.prototypes import decode_prototypes, encode_prototypes
from framp_core.codec.values import BYTES_PER_VALUE, ValueFormat, decode_values, encode_values, require_finite
from framp_core.errors import MaskMismatchError, ProtocolError
from framp_core.layout import ParameterLayout
from framp_core.prototypes import Prototypes
from framp_core.structured import by_group, held_channels, kept_sizes, selection_of, slim_size

MAX_DESCRIPTOR_SIZE = 65_536
"""Floats of a descriptor; the server keeps one per client, so a client must not choose how much that is."""


@dataclass(frozen=True)
class Submodel:
    """What a client receives.

    Attributes:
        values: float32 ``(k + always kept,)``, theta at the kept positions in layout order; finite.
        mask: bool ``(n,)``, true where kept; always-kept parameters are true.
        prototypes: global prototypes, None when the server sent none.
        reference: the reference mask that the client holds from now on, None for none.
    """

    values: np.ndarray
    mask: np.ndarray
    prototypes: Prototypes | None
    reference: Reference | None = None

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


def encode_submodel(
    theta_kept: np.ndarray,
    mask: np.ndarray,
    prototypes: Prototypes | None,
    layout: ParameterLayout,
    value_format: ValueFormat,
    mask_code: bytes | None = None,
) -> Encoded:
    """Server to client: the kept weights, which they are, and the global prototypes.

    Args:
        theta_kept: float32 ``(k + always kept,)``, ``theta[mask]``.
        mask: bool ``(n,)``; always-kept parameters must be true.
        prototypes: global prototypes, None for none.
        layout: description of the full vector.
        value_format: how the weights are written.
        mask_code: the mask as :func:`framp_core.codec.masks.encode_mask_part` wrote it, None to write it alone.

    Raises:
        MaskMismatchError: mask, values and layout do not fit together.
    """
    return assemble_submodel(
        encode_kept(theta_kept, mask, layout, value_format), mask, prototypes, layout, value_format, mask_code
    )


def encode_kept(
    kept: np.ndarray,
    mask: np.ndarray,
    layout: ParameterLayout,
    value_format: ValueFormat,
    rng: np.random.Generator | None = None,
) -> bytes:
    """The part ``values`` of a message: numbers at the kept positions.

    Args:
        kept: float32 ``(mask.sum(),)``, such as ``theta[mask]``.
        mask: bool ``(n,)``.
        layout: description of the full vector.
        value_format: how the numbers are written.
        rng: stream for the stochastic rounding of int8; None rounds to nearest.

    Raises:
        MaskMismatchError: mask, numbers and layout do not fit together.
    """
    return encode_values(kept, value_format, _kept_sizes(mask, layout), rng)


def assemble_submodel(
    values: bytes,
    mask: np.ndarray,
    prototypes: Prototypes | None,
    layout: ParameterLayout,
    value_format: ValueFormat,
    mask_code: bytes | None = None,
) -> Encoded:
    """:func:`encode_submodel` for weights that :func:`encode_kept` has written already.

    Raises:
        MaskMismatchError: the mask drops what is always kept.
    """
    if not mask[~layout.maskable].all():
        raise MaskMismatchError("the mask drops parameters that are always kept; start it from ~layout.maskable")
    code = mask_code or encode_mask_part(mask[layout.maskable], layout.maskable_sizes)
    return pack(SUBMODEL, value_format, values, code, encode_prototypes(prototypes))


def decode_submodel(
    blob: bytes,
    layout: ParameterLayout,
    classes: int,
    feature_size: int,
    expected_kept: int | None = None,
    held: Reference | None = None,
) -> Submodel:
    """Inverse of :func:`encode_submodel`.

    Args:
        blob: the message.
        layout: description of the model that this client would build.
        classes: C; class ids of prototypes lie in [0, C).
        feature_size: f, the width of a prototype.
        expected_kept: k, maskable weights that this client can hold; None accepts any number.
        held: the reference mask that this client holds, None for none.

    Raises:
        UnknownReferenceError: the mask is coded against another reference.
        ProtocolError: a subclass per fault, see :mod:`framp_core.errors`.
    """
    message = unpack(blob, SUBMODEL)
    maskable_kept, reference = decode_mask_part(message.contents["mask"], layout.maskable_sizes, held)
    kept = int(np.count_nonzero(maskable_kept))
    if expected_kept not in (None, kept):
        raise MaskMismatchError(
            f"the mask keeps {kept} maskable weights and this client expects {expected_kept}; "
            f"check that the server knows the client's capacity"
        )
    mask = ~layout.maskable
    mask[layout.maskable] = maskable_kept
    values = _decode_finite(message, "values", _kept_sizes(mask, layout))
    prototypes = decode_prototypes(message.contents["prototypes"], classes, feature_size)
    return Submodel(values, mask, prototypes, reference)


def is_slim(blob: bytes) -> bool:
    """Whether a message is a slim submodel, going by its header alone.

    Raises:
        ProtocolError: a subclass per fault of the header, see :mod:`framp_core.errors`.
    """
    return read_head(blob)[0] == SLIM


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
    return assemble_slim(encode_kept(theta_kept, mask, layout, value_format), mask, layout, value_format)


def assemble_slim(values: bytes, mask: np.ndarray, layout: ParameterLayout, value_format: ValueFormat) -> Encoded:
    """:func:`encode_slim` for weights that :func:`encode_kept` has written already.

    Raises:
        MaskMismatchError: channels are kept in part.
    """
    return pack(SLIM, value_format, values, encode_mask(selection_of(layout, mask), list(layout.hidden.values())))


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
    message = unpack(blob, SLIM)
    selection = decode_mask(message.contents["mask"], list(layout.hidden.values()))
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
    values = encode_kept(delta_kept, mask, layout, value_format, rng)
    return pack(UPDATE, value_format, values, encode_prototypes(prototypes))


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
    message = unpack(blob, UPDATE)
    delta_kept = _decode_finite(message, "values", _kept_sizes(mask, layout))
    prototypes = decode_prototypes(message.contents["prototypes"], classes, feature_size)
    return Update(delta_kept, prototypes, message.parts)


def encode_descriptor(vector: np.ndarray) -> Encoded:
    """Client to server, once: its descriptor.

    Args:
        vector: descriptor, float32 ``(d,)``, 1 <= d <= ``MAX_DESCRIPTOR_SIZE``.

    Raises:
        ProtocolError: d is out of range.
    """
    _require_descriptor_size(vector.size)
    return pack(DESCRIPTOR, "float32", encode_values(vector, "float32", [vector.size]))


def decode_descriptor(blob: bytes) -> np.ndarray:
    """Inverse of :func:`encode_descriptor`.

    Returns:
        float32 ``(d,)``, finite, 1 <= d <= ``MAX_DESCRIPTOR_SIZE``.

    Raises:
        ProtocolError: a subclass per fault, see :mod:`framp_core.errors`.
    """
    message = unpack(blob, DESCRIPTOR)
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


def _decode_finite(message: Message, part: str, sizes: list[int]) -> np.ndarray:
    values = decode_values(message.contents[part], message.value_format, sizes)
    require_finite(values, part)
    return values
