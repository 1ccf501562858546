import contextlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framp_core.codec import (
    PROTOCOL_VERSION,
    Encoded,
    Reference,
    SlimSubmodel,
    Submodel,
    Update,
    decode_descriptor,
    decode_slim,
    decode_submodel,
    decode_update,
    encode_descriptor,
    encode_mask,
    encode_mask_part,
    encode_slim,
    encode_submodel,
    encode_update,
    frame,
    is_slim,
)
from framp_core.codec.messages import MAX_DESCRIPTOR_SIZE
from framp_core.config import ModelConfig
from framp_core.errors import (
    ChecksumError,
    MaskMismatchError,
    NonFiniteError,
    ProtocolError,
    TruncatedMessageError,
    UnknownReferenceError,
    VersionMismatchError,
)
from framp_core.layout import ParameterLayout
from framp_core.models import build_model
from framp_core.prototypes import Prototypes
from framp_core.structured import by_group, channel_mask, held_classes, kept_channels, kept_sizes, window

LAYOUT = ParameterLayout.of(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)))
CLASSES, FEATURES, KEPT = 5, 3, 17
FORMATS = ["float32", "bfloat16", "int8"]
HEAD = 7  # magic 4, version 1, kind 1, value format 1


def make_mask(kept: int = KEPT, layout: ParameterLayout = LAYOUT, seed: int = 0) -> np.ndarray:
    mask = ~layout.maskable
    mask[np.random.default_rng(seed).choice(np.flatnonzero(layout.maskable), kept, replace=False)] = True
    return mask


def make_values(mask: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=mask.sum()).astype(np.float32)


def make_prototypes(classes: tuple[int, ...] = (0, 2, 4), features: int = FEATURES) -> Prototypes:
    ids = np.array(classes, np.int64)
    means = np.random.default_rng(2).normal(size=(ids.size, features)).astype(np.float32)
    return Prototypes(ids, ids + 1, means)


MASK = make_mask()
VALUES = make_values(MASK)
SUBMODEL = encode_submodel(VALUES, MASK, make_prototypes(), LAYOUT, "float32")
HELD, NEW = (Reference.of(make_mask(KEPT, seed=seed)[LAYOUT.maskable]) for seed in (7, 8))
RETURNING = encode_submodel(
    VALUES,
    MASK,
    make_prototypes(),
    LAYOUT,
    "float32",
    encode_mask_part(MASK[LAYOUT.maskable], LAYOUT.maskable_sizes, HELD, NEW),
)
UPDATE = encode_update(VALUES, make_prototypes(), LAYOUT, MASK, "int8")
DESCRIPTOR = encode_descriptor(np.array([0.6, -0.8], np.float32))
SLICEABLE = ParameterLayout.of(build_model(ModelConfig(widths=(4, 8), groups=2), (1, 4, 4), CLASSES))
CAPACITY = Fraction(1, 4)
CHANNELS = list(SLICEABLE.hidden.values())
SELECTION = window(SLICEABLE, CAPACITY, shift=3)
SLIM_MASK = channel_mask(SLICEABLE, SELECTION)
SLIM_VALUES = make_values(SLIM_MASK)
SLIM = encode_slim(SLIM_VALUES, SLIM_MASK, SLICEABLE, "float32")


def alone(mask: np.ndarray) -> bytes:
    """The mask part of a submodel."""
    return encode_mask_part(mask[LAYOUT.maskable], LAYOUT.maskable_sizes)


def read_submodel(blob: bytes) -> Submodel:
    return decode_submodel(blob, LAYOUT, CLASSES, FEATURES)


def read_returning(blob: bytes) -> Submodel:
    return decode_submodel(blob, LAYOUT, CLASSES, FEATURES, held=HELD)


def read_update(blob: bytes) -> Update:
    return decode_update(blob, LAYOUT, MASK, CLASSES, FEATURES)


def read_slim(blob: bytes) -> SlimSubmodel:
    return decode_slim(blob, SLICEABLE, CAPACITY)


MESSAGES: dict[str, tuple[Encoded, Callable[[bytes], object]]] = {
    "submodel": (SUBMODEL, read_submodel),
    "returning": (RETURNING, read_returning),
    "update": (UPDATE, read_update),
    "descriptor": (DESCRIPTOR, decode_descriptor),
    "slim": (SLIM, read_slim),
}
every_message = pytest.mark.parametrize(("encoded", "read"), MESSAGES.values(), ids=MESSAGES)


def sealed(body: bytes) -> bytes:
    """The body with a checksum that fits it."""
    return body + struct.pack("<I", zlib.crc32(body))


def rebuilt(encoded: Encoded, part: str, content: bytes) -> bytes:
    """The message with one part replaced, lengths and checksum fitting."""
    names = [name for name in encoded.parts if name != "framing"]
    start, contents = HEAD + 4 * len(names), {}
    for name in names:
        contents[name] = encoded.blob[start : start + encoded.parts[name]]
        start += encoded.parts[name]
    contents[part] = content
    lengths = struct.pack(f"<{len(names)}I", *(len(contents[name]) for name in names))
    return sealed(encoded.blob[:HEAD] + lengths + b"".join(contents.values()))


def assert_same_prototypes(given: Prototypes | None, expected: Prototypes | None) -> None:
    if given is None or expected is None:
        assert given is expected
        return
    assert (given.classes.dtype, given.counts.dtype, given.means.dtype) == (np.int64, np.int64, np.float32)
    np.testing.assert_array_equal(given.classes, expected.classes)
    np.testing.assert_array_equal(given.counts, expected.counts)
    np.testing.assert_array_equal(given.means, expected.means)
    assert given.means.shape == expected.means.shape


def assert_valid(result: object) -> None:
    """What a decoder lets through can be used without further checks."""
    if isinstance(result, np.ndarray):
        assert result.dtype == np.float32
        assert result.ndim == 1
        assert 1 <= result.size <= MAX_DESCRIPTOR_SIZE
        assert np.isfinite(result).all()
        return
    if isinstance(result, SlimSubmodel):
        counts = [(kept.sum(), kept.size) for kept in by_group(SLICEABLE, result.selection).values()]
        assert all(kept == kept_channels(channels, CAPACITY) for kept, channels in counts)
        assert result.values.shape == (sum(kept_sizes(SLICEABLE, result.selection)),)
        assert np.isfinite(result.values).all()
        return
    values, mask = (result.values, result.mask) if isinstance(result, Submodel) else (result.delta_kept, MASK)
    assert mask.shape == (LAYOUT.size,)
    assert mask[~LAYOUT.maskable].all()
    assert values.shape == (mask.sum(),)
    assert np.isfinite(values).all()
    if result.prototypes is not None:
        ids = result.prototypes.classes.tolist()
        assert ids == sorted(set(ids) & set(range(CLASSES)))
        assert (result.prototypes.counts >= 1).all()
        assert result.prototypes.means.shape == (len(ids), FEATURES)
        assert np.isfinite(result.prototypes.means).all()


@settings(derandomize=True, deadline=None)
@given(
    kept=st.integers(0, LAYOUT.maskable_size),
    seed=st.integers(0, 1000),
    prototypes=st.sampled_from([None, make_prototypes(()), make_prototypes((1,)), make_prototypes(tuple(range(5)))]),
)
def test_submodel_and_update_round_trip(kept, seed, prototypes):
    mask = make_mask(kept, seed=seed)
    values = make_values(mask, seed)
    submodel = decode_submodel(
        encode_submodel(values, mask, prototypes, LAYOUT, "float32").blob, LAYOUT, CLASSES, FEATURES, expected_kept=kept
    )
    np.testing.assert_array_equal(submodel.values, values)
    np.testing.assert_array_equal(submodel.mask, mask)
    assert_same_prototypes(submodel.prototypes, prototypes)
    dense, position = [], 0
    for is_kept in mask:
        dense.append(values[position] if is_kept else 0)
        position += is_kept
    assert submodel.theta().tolist() == dense

    encoded = encode_update(values, prototypes, LAYOUT, mask, "float32")
    update = decode_update(encoded.blob, LAYOUT, mask, CLASSES, FEATURES)
    np.testing.assert_array_equal(update.delta_kept, values)
    assert_same_prototypes(update.prototypes, prototypes)
    assert update.parts == encoded.parts


@pytest.mark.parametrize("value_format", FORMATS)
def test_value_format_travels_with_the_message(value_format):
    step = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 254}[value_format]
    encoded = encode_submodel(VALUES, MASK, None, LAYOUT, value_format)
    error = np.abs(read_submodel(encoded.blob).values - VALUES).max()
    assert error <= step * np.abs(VALUES).max() * 1.001
    assert (error > 0) == (value_format != "float32")
    tensors = len(LAYOUT.slots)
    size = {"float32": 4 * VALUES.size, "bfloat16": 2 * VALUES.size, "int8": VALUES.size + 4 * tensors}[value_format]
    assert encoded.parts["values"] == size


def test_descriptor_round_trip():
    vector = decode_descriptor(DESCRIPTOR.blob)
    assert vector.dtype == np.float32
    assert vector.tolist() == np.array([0.6, -0.8], np.float32).tolist()


@pytest.mark.parametrize("value_format", FORMATS)
@pytest.mark.parametrize("capacity", [Fraction(1, 64), Fraction(1, 4), Fraction(1)])
def test_slim_submodel_round_trip(capacity, value_format):
    for shift in range(9):
        selection = window(SLICEABLE, capacity, shift)
        mask = channel_mask(SLICEABLE, selection)
        values = make_values(mask, shift)
        slim = decode_slim(encode_slim(values, mask, SLICEABLE, value_format).blob, SLICEABLE, capacity)
        assert np.array_equal(slim.selection, selection)
        step = {"float32": 0, "bfloat16": 2**-8, "int8": 1 / 254}[value_format]
        assert np.abs(slim.values - values).max() <= step * np.abs(values).max() * 1.001


def test_header_says_which_messages_are_slim():
    assert {kind: is_slim(encoded.blob) for kind, (encoded, _) in MESSAGES.items()} == {
        kind: kind == "slim" for kind in MESSAGES
    }
    with pytest.raises(TruncatedMessageError):
        is_slim(b"FRMP")
    with pytest.raises(ProtocolError, match="not a FRAMP message"):
        is_slim(b"XXXX" + SLIM.blob[4:])


def test_update_of_a_slim_client_carries_its_classes_without_features():
    """The client writes with the slim network's layout and an all-ones mask, the server reads with its own mask."""
    slim = ParameterLayout.of(build_model(ModelConfig(widths=(4, 8), groups=2), (1, 4, 4), CLASSES, (2, 4)))
    held = held_classes(np.array([0, 7, 0, 1, 0]))
    encoded = encode_update(SLIM_VALUES, held, slim, np.ones(slim.size, bool), "float32")
    assert encoded.parts["prototypes"] == 4 + 2 * (4 + 4)
    update = decode_update(encoded.blob, SLICEABLE, SLIM_MASK, CLASSES, feature_size=0)
    assert np.array_equal(update.delta_kept, SLIM_VALUES)
    assert_same_prototypes(update.prototypes, held)
    with pytest.raises(ProtocolError, match="0 features"):
        decode_update(UPDATE.blob, LAYOUT, MASK, CLASSES, feature_size=0)


@every_message
def test_parts_account_for_every_byte(encoded, read):
    assert sum(encoded.parts.values()) == len(encoded.blob)
    parts = len(encoded.parts) - 1
    assert encoded.parts["framing"] == HEAD + 4 * parts + 4
    assert encoded.parts["framing"] < 40


def test_part_sizes_are_those_of_the_contents():
    prototypes = 4 + 3 * (4 + 4 + 4 * FEATURES)
    mask = 1 + len(encode_mask(MASK[LAYOUT.maskable], LAYOUT.maskable_sizes))
    assert SUBMODEL.parts == {"values": 4 * VALUES.size, "mask": mask, "prototypes": prototypes, "framing": 23}
    assert UPDATE.parts == {
        "values": VALUES.size + 4 * len(LAYOUT.slots),
        "prototypes": prototypes,
        "framing": 19,
    }
    channels = len(encode_mask(SELECTION, CHANNELS))
    assert channels <= 1 + 2  # 12 channels as bits
    assert SLIM.parts == {"values": 4 * SLIM_VALUES.size, "mask": channels, "framing": 19}
    assert DESCRIPTOR.parts == {"descriptor": 8, "framing": 15}


def test_a_returning_client_reads_the_mask_and_holds_the_new_reference():
    submodel = read_returning(RETURNING.blob)
    np.testing.assert_array_equal(submodel.mask, MASK)
    assert submodel.reference is not None
    assert submodel.reference.name == NEW.name
    assert read_submodel(SUBMODEL.blob).reference is None
    for held in (None, NEW):
        with pytest.raises(UnknownReferenceError, match=f"{HELD.name:08x}"):
            decode_submodel(RETURNING.blob, LAYOUT, CLASSES, FEATURES, held=held)


def test_framing_is_below_one_percent_of_the_smallest_real_submodel():
    layout = ParameterLayout.of(build_model(ModelConfig(), (1, 8, 8), 10))
    mask = make_mask(layout.kept(1 / 64), layout)
    encoded = encode_submodel(make_values(mask), mask, None, layout, "float32")
    assert encoded.parts["framing"] < 0.01 * len(encoded.blob)


@every_message
def test_every_flipped_bit_and_every_other_length_is_refused(encoded, read):
    assert_valid(read(encoded.blob))
    for place in range(len(encoded.blob)):
        for bit in range(8):
            changed = bytearray(encoded.blob)
            changed[place] ^= 1 << bit
            with pytest.raises(ProtocolError):
                read(bytes(changed))
        with pytest.raises(TruncatedMessageError):
            read(encoded.blob[:place])
    with pytest.raises(TruncatedMessageError):
        read(encoded.blob + b"\0")


@every_message
def test_behind_a_fitting_checksum_every_flipped_bit_is_refused_or_harmless(encoded, read):
    refused = 0
    for place in range(len(encoded.blob) - 4):
        for bit in range(8):
            changed = bytearray(encoded.blob[:-4])
            changed[place] ^= 1 << bit
            try:
                assert_valid(read(sealed(bytes(changed))))
            except ProtocolError:
                refused += 1
    assert 0 < refused < 8 * (len(encoded.blob) - 4)


@every_message
@settings(derandomize=True, deadline=None, max_examples=300)
@given(data=st.data())
def test_behind_a_fitting_checksum_every_foreign_part_is_refused_or_harmless(encoded, read, data):
    part = data.draw(st.sampled_from([name for name in encoded.parts if name != "framing"]))
    content = data.draw(st.one_of(st.binary(max_size=40), st.integers(0, 200).map(bytes), st.just(b"\xff" * 200)))
    with contextlib.suppress(ProtocolError):
        assert_valid(read(rebuilt(encoded, part, content)))


@every_message
@settings(derandomize=True, deadline=None)
@given(noise=st.binary(max_size=60), intact=st.integers(0, HEAD))
def test_noise_is_refused(encoded, read, noise, intact):
    with pytest.raises(ProtocolError):
        read(encoded.blob[:intact] + noise)


@every_message
def test_each_frame_fault_has_its_name(encoded, read):
    blob = encoded.blob

    def fault_of(changed: object) -> tuple[type, str]:
        with pytest.raises(ProtocolError) as caught:
            read(changed)  # type: ignore[arg-type]
        return type(caught.value), str(caught.value)

    newer = fault_of(blob[:4] + bytes([PROTOCOL_VERSION + 1]) + blob[5:])
    assert newer[0] is VersionMismatchError
    assert f"version {PROTOCOL_VERSION + 1}, this side speaks {PROTOCOL_VERSION}" in newer[1]
    assert fault_of(b"")[0] is TruncatedMessageError
    assert fault_of(blob[:-1] + bytes([blob[-1] ^ 1]))[0] is ChecksumError
    assert "not a FRAMP message" in fault_of(b"XXXX" + blob[4:])[1]
    assert "kind 9 is unknown" in fault_of(blob[:5] + b"\x09" + blob[6:])[1]
    assert "value format 7 is unknown" in fault_of(sealed(blob[:6] + b"\x07" + blob[7:-4]))[1]
    assert "type str" in fault_of("text")[1]
    own = frame.read_head(blob)[0]
    for message, _ in MESSAGES.values():
        kind = frame.read_head(message.blob)[0]
        if kind != own:
            assert f"got a message of kind {kind.name}" in fault_of(message.blob)[1]


def test_mask_and_values_must_fit_together():
    with pytest.raises(MaskMismatchError, match=f"keeps {KEPT} .* expects {KEPT + 1}"):
        decode_submodel(SUBMODEL.blob, LAYOUT, CLASSES, FEATURES, expected_kept=KEPT + 1)
    other_mask = alone(make_mask(KEPT - 1))
    with pytest.raises(MaskMismatchError, match="kept weights"):
        read_submodel(rebuilt(SUBMODEL, "mask", other_mask))
    same_size = alone(make_mask(KEPT, seed=5))
    assert read_submodel(rebuilt(SUBMODEL, "mask", same_size)).values.size == VALUES.size
    with pytest.raises(MaskMismatchError):
        decode_update(UPDATE.blob, LAYOUT, make_mask(KEPT + 1), CLASSES, FEATURES)
    larger = ParameterLayout.of(nn.Linear(40, 30))
    with pytest.raises(ProtocolError):
        decode_submodel(SUBMODEL.blob, larger, CLASSES, FEATURES)


def test_slim_submodels_of_another_width_are_refused():
    for capacity, holds in ((Fraction(1, 16), 1), (Fraction(1), 4)):
        with pytest.raises(MaskMismatchError, match=f"keeps 2 of the 4 channels of features.0 .* holds {holds}"):
            decode_slim(SLIM.blob, SLICEABLE, capacity)
    moved = SELECTION.copy()
    moved[[0, 1]] = moved[[1, 0]]  # as many channels of each group, others
    assert np.array_equal(read_slim(rebuilt(SLIM, "mask", encode_mask(moved, CHANNELS))).selection, moved)
    across = ~moved  # 2 of 4 and 4 of 8 as well
    across[[np.flatnonzero(across[:4])[0], 4 + np.flatnonzero(~across[4:])[0]]] ^= True
    with pytest.raises(MaskMismatchError, match="keeps 1 of the 4 channels"):
        read_slim(rebuilt(SLIM, "mask", encode_mask(across, CHANNELS)))
    with pytest.raises(MaskMismatchError, match="kept weights"):
        read_slim(rebuilt(SLIM, "values", bytes(4 * (SLIM_VALUES.size - 1))))


def test_slim_encoder_refuses_masks_of_single_weights():
    mask = SLIM_MASK.copy()
    mask[np.flatnonzero(mask)[3]] = False
    with pytest.raises(MaskMismatchError, match="whole channels"):
        encode_slim(make_values(mask), mask, SLICEABLE, "float32")
    with pytest.raises(MaskMismatchError, match="keeps"):
        encode_slim(SLIM_VALUES[1:], SLIM_MASK, SLICEABLE, "float32")
    with pytest.raises(MaskMismatchError, match="shape"):
        encode_slim(SLIM_VALUES, SLIM_MASK[1:], SLICEABLE, "float32")


def test_encoders_refuse_what_does_not_fit():
    with pytest.raises(MaskMismatchError, match="keeps"):
        encode_submodel(VALUES[1:], MASK, None, LAYOUT, "float32")
    with pytest.raises(MaskMismatchError, match="shape"):
        encode_update(VALUES, None, LAYOUT, MASK[1:], "float32")
    dropped = MASK.copy()
    dropped[np.flatnonzero(~LAYOUT.maskable)[0]] = False
    with pytest.raises(MaskMismatchError, match="always kept"):
        encode_submodel(VALUES[1:], dropped, None, LAYOUT, "float32")
    for count in (-1, 2**32):
        prototypes = replace(make_prototypes(), counts=np.array([1, count, 1]))
        with pytest.raises(ProtocolError, match="counts of prototypes"):
            encode_update(VALUES, prototypes, LAYOUT, MASK, "float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("value_format", FORMATS)
def test_non_finite_numbers_are_refused_by_the_receiver(bad, value_format):
    poisoned = VALUES.copy()
    poisoned[3] = bad
    with pytest.raises(NonFiniteError, match="values"):
        read_submodel(encode_submodel(poisoned, MASK, None, LAYOUT, value_format).blob)
    with pytest.raises(NonFiniteError, match="values"):
        read_update(encode_update(poisoned, None, LAYOUT, MASK, value_format).blob)
    slim = SLIM_VALUES.copy()
    slim[3] = bad
    with pytest.raises(NonFiniteError, match="values"):
        read_slim(encode_slim(slim, SLIM_MASK, SLICEABLE, value_format).blob)
    with pytest.raises(NonFiniteError, match="descriptor"):
        decode_descriptor(encode_descriptor(np.array([1, bad], np.float32)).blob)
    prototypes = make_prototypes()
    prototypes.means[1, 1] = bad
    with pytest.raises(NonFiniteError, match="prototypes"):
        read_update(encode_update(VALUES, prototypes, LAYOUT, MASK, value_format).blob)


BAD_PROTOTYPES = {
    "class out of range": (replace(make_prototypes(), classes=np.array([0, 2, CLASSES])), "below 5"),
    "class twice": (replace(make_prototypes(), classes=np.array([0, 2, 2])), "each class once"),
    "not ascending": (replace(make_prototypes(), classes=np.array([2, 0, 4])), "ascending"),
    "no images": (replace(make_prototypes(), counts=np.array([1, 0, 1])), "0 examples"),
    "another width": (make_prototypes(features=FEATURES + 1), "3 features"),
}


@pytest.mark.parametrize("name", BAD_PROTOTYPES)
def test_bad_prototypes_are_refused(name):
    prototypes, words = BAD_PROTOTYPES[name]
    with pytest.raises(ProtocolError, match=words):
        read_submodel(encode_submodel(VALUES, MASK, prototypes, LAYOUT, "float32").blob)
    with pytest.raises(ProtocolError, match=words):
        read_update(encode_update(VALUES, prototypes, LAYOUT, MASK, "float32").blob)


@pytest.mark.parametrize("size", [0, MAX_DESCRIPTOR_SIZE + 1])
def test_descriptor_of_no_or_too_many_floats_is_refused(size):
    words = f"{size} floats, expected 1 to 65536"
    with pytest.raises(ProtocolError, match=words):
        encode_descriptor(np.zeros(size, np.float32))
    with pytest.raises(ProtocolError, match=words):
        decode_descriptor(rebuilt(DESCRIPTOR, "descriptor", bytes(4 * size)))


@pytest.mark.parametrize("size", [1, MAX_DESCRIPTOR_SIZE])
def test_descriptor_of_an_extreme_size_is_read(size):
    vector = np.arange(size, dtype=np.float32)
    np.testing.assert_array_equal(decode_descriptor(encode_descriptor(vector).blob), vector)
