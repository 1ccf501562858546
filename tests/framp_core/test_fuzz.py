"""Mutated messages, a hundred thousand and more, through everything that reads the wire.

The criterion. A reader may do one of two things with a mutated message:

- refuse it with an error of :mod:`framp_core.errors`; any other exception fails the test;
- read it. Behind a checksum that was not made anew this is allowed for the original's own bytes alone. Behind one that
  was, the message is one that another client could have sent, and what was read must satisfy every invariant of
  :func:`assert_valid` (exactly k kept, shapes, ranges, all finite) and survive a round trip: written and read again, it
  is the same, so that nothing was read that the message does not say.
"""

import struct
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framp_core.codec import (
    Encoded,
    Reference,
    SlimSubmodel,
    Submodel,
    Update,
    decode_descriptor,
    decode_mask,
    decode_slim,
    decode_submodel,
    decode_update,
    encode_descriptor,
    encode_mask,
    encode_mask_part,
    encode_slim,
    encode_submodel,
    encode_update,
    is_slim,
)
from framp_core.codec.messages import MAX_DESCRIPTOR_SIZE
from framp_core.config import ModelConfig
from framp_core.errors import FrampError
from framp_core.layout import ParameterLayout
from framp_core.models import build_model
from framp_core.prototypes import Prototypes
from framp_core.structured import by_group, channel_mask, held_classes, kept_channels, kept_sizes, window

LAYOUT = ParameterLayout.of(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)))
SLICEABLE = ParameterLayout.of(build_model(ModelConfig(widths=(4, 8), groups=2), (1, 4, 4), 5))
CLASSES, FEATURES, KEPT, CAPACITY = 5, 3, 17, Fraction(1, 4)
HEAD = 7
"""Magic 4, version 1, kind 1, value format 1; the lengths of the parts follow, 4 bytes each."""
MUTANTS_PER_TARGET = 12_000


def rng_of(*key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(6, spawn_key=key))


def make_mask(seed: int) -> np.ndarray:
    mask = ~LAYOUT.maskable
    mask[rng_of(0, seed).choice(np.flatnonzero(LAYOUT.maskable), KEPT, replace=False)] = True
    return mask


def make_values(size: int, seed: int) -> np.ndarray:
    return rng_of(1, seed).normal(size=size).astype(np.float32)


def make_prototypes(classes: tuple[int, ...], features: int = FEATURES) -> Prototypes:
    ids = np.array(classes, np.int64)
    return Prototypes(ids, ids + 1, make_values(ids.size * features, len(classes)).reshape(-1, features))


MASK = make_mask(0)
HELD, NEW = (Reference.of(make_mask(seed)[LAYOUT.maskable]) for seed in (7, 8))
SIZES = LAYOUT.maskable_sizes
CHANNELS = list(SLICEABLE.hidden.values())


def submodel(seed: int, value_format: str, held: Reference | None = None, new: Reference | None = None) -> bytes:
    mask, prototypes = make_mask(seed), make_prototypes((0, 2, 4)[: seed % 4]) if seed % 4 else None
    code = encode_mask_part(mask[LAYOUT.maskable], SIZES, held, new)
    return encode_submodel(make_values(mask.sum(), seed), mask, prototypes, LAYOUT, value_format, code).blob


def slim(shift: int) -> bytes:
    mask = channel_mask(SLICEABLE, window(SLICEABLE, CAPACITY, shift))
    return encode_slim(make_values(mask.sum(), shift), mask, SLICEABLE, ("float32", "bfloat16", "int8")[shift % 3]).blob


def update(seed: int, value_format: str, prototypes: Prototypes | None) -> bytes:
    return encode_update(make_values(MASK.sum(), seed), prototypes, LAYOUT, MASK, value_format).blob


def assert_prototypes(prototypes: Prototypes | None, features: int) -> None:
    if prototypes is None:
        return
    ids = prototypes.classes.tolist()
    assert ids == sorted(set(ids) & set(range(CLASSES)))
    assert prototypes.counts.shape == (len(ids),)
    assert (prototypes.counts >= 1).all()
    assert prototypes.means.shape == (len(ids), features)
    assert np.isfinite(prototypes.means).all()


def assert_floats(values: np.ndarray, size: int) -> None:
    assert (values.dtype, values.shape) == (np.float32, (size,))
    assert np.isfinite(values).all()


def assert_valid(read: object) -> None:
    """What a decoder lets through can be used without further checks."""
    if isinstance(read, Submodel):
        assert read.mask.shape == (LAYOUT.size,)
        assert read.mask[~LAYOUT.maskable].all()
        assert read.mask[LAYOUT.maskable].sum() == KEPT
        assert_floats(read.values, int(read.mask.sum()))
        assert_prototypes(read.prototypes, FEATURES)
        assert read.reference is None or read.reference.size == LAYOUT.maskable_size
    elif isinstance(read, SlimSubmodel):
        kept = [(channels.sum(), channels.size) for channels in by_group(SLICEABLE, read.selection).values()]
        assert all(count == kept_channels(size, CAPACITY) for count, size in kept)
        assert_floats(read.values, sum(kept_sizes(SLICEABLE, read.selection)))
    elif isinstance(read, Update):
        assert_floats(read.delta_kept, int(MASK.sum()))
        assert_prototypes(read.prototypes, FEATURES if read.prototypes is None else read.prototypes.means.shape[1])
    else:
        assert isinstance(read, np.ndarray)
        if read.dtype == np.bool_:
            assert read.shape == (LAYOUT.maskable_size,)
        else:
            assert 1 <= read.size <= MAX_DESCRIPTOR_SIZE
            assert_floats(read, read.size)


def written(read: object) -> bytes:
    """The message that says what was read; values in float32, whatever they came in."""
    if isinstance(read, Submodel):
        return encode_submodel(read.values, read.mask, read.prototypes, LAYOUT, "float32").blob
    if isinstance(read, SlimSubmodel):
        return encode_slim(read.values, channel_mask(SLICEABLE, read.selection), SLICEABLE, "float32").blob
    if isinstance(read, Update):
        return encode_update(read.delta_kept, read.prototypes, LAYOUT, MASK, "float32").blob
    assert isinstance(read, np.ndarray)
    return encode_mask(read, SIZES) if read.dtype == np.bool_ else encode_descriptor(read).blob


@dataclass(frozen=True)
class Target:
    """A reader, messages that it reads, and whether they have a frame with a checksum."""

    read: Callable[[bytes], object]
    messages: list[bytes]
    framed: bool = True


def read_any(blob: bytes) -> object:
    """What a client does first: look which kind it was sent."""
    if is_slim(blob):
        return decode_slim(blob, SLICEABLE, CAPACITY)
    return decode_submodel(blob, LAYOUT, CLASSES, FEATURES, KEPT, HELD)


def _formats(make: Callable[..., bytes], *arguments: object) -> list[bytes]:
    return [
        make(seed, value_format, *arguments) for seed, value_format in enumerate(("float32", "bfloat16", "int8"), 1)
    ]


def _submodels(held: Reference | None, new: Reference | None) -> Target:
    return Target(
        lambda blob: decode_submodel(blob, LAYOUT, CLASSES, FEATURES, KEPT, HELD), _formats(submodel, held, new)
    )


TARGETS: dict[str, Target] = {
    "submodel-alone": _submodels(None, None),
    "submodel-held": _submodels(HELD, None),
    "submodel-given": _submodels(None, NEW),
    "submodel-renewed": _submodels(HELD, NEW),
    "slim": Target(lambda blob: decode_slim(blob, SLICEABLE, CAPACITY), [slim(shift) for shift in range(6)]),
    "any": Target(read_any, [*_formats(submodel, HELD, NEW), *map(slim, range(3))]),
    "update": Target(
        lambda blob: decode_update(blob, LAYOUT, MASK, CLASSES, FEATURES),
        [*_formats(update, make_prototypes((0, 2, 4))), *_formats(update, make_prototypes(()))],
    ),
    "update-slim": Target(
        lambda blob: decode_update(blob, LAYOUT, MASK, CLASSES, 0),
        _formats(update, held_classes(np.array([0, 7, 0, 1, 0]))),
    ),
    "descriptor": Target(decode_descriptor, [encode_descriptor(make_values(size, size)).blob for size in (2, 9, 40)]),
    "mask": Target(
        lambda blob: decode_mask(blob, SIZES),
        [encode_mask(make_mask(seed)[LAYOUT.maskable], SIZES) for seed in range(8)],
        framed=False,
    ),
}


# --- mutations: (message, other messages of the kind, stream) -> bytes --------------------------------------------

Mutation = Callable[[bytes, list[bytes], np.random.Generator], bytes]
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF)
LENGTHS = (0, 1, 2, 3, 2**16, 2**31 - 1, 2**31, 2**32 - 4, 2**32 - 1)


def place(blob: bytes, rng: np.random.Generator) -> int:
    return int(rng.integers(len(blob))) if blob else 0


def flip_bits(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    changed = bytearray(blob)
    for _ in range(rng.integers(1, 9)):
        changed[place(blob, rng)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def set_bytes(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    changed, start = bytearray(blob), place(blob, rng)
    for index in range(start, min(len(blob), start + int(rng.integers(1, 9)))):
        changed[index] = EXTREMES[rng.integers(len(EXTREMES))]
    return bytes(changed)


def truncate(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    return blob[: place(blob, rng)]


def extend(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    return blob + rng.bytes(int(rng.integers(1, 40)))


def splice(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """The beginning of one message and the end of another."""
    other = others[rng.integers(len(others))]
    return blob[: place(blob, rng)] + other[place(other, rng) :]


def repeat_section(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    start, end = sorted((place(blob, rng), place(blob, rng)))
    return blob[:end] + blob[start:end] + blob[end:]


def remove_section(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    start, end = sorted((place(blob, rng), place(blob, rng)))
    return blob[:start] + blob[end:]


def noise(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """Random bytes behind a header that is right."""
    return blob[: int(rng.integers(HEAD + 13))] + rng.bytes(int(rng.integers(len(blob) + 20)))


def edit_length(blob: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One of the lengths, and maybe another one by as much in the other direction, so that their sum is kept."""
    changed = bytearray(blob)
    first, second = (HEAD + 4 * int(rng.integers(3)) for _ in range(2))
    if len(blob) < HEAD + 16:
        return flip_bits(blob, others, rng)
    (old,) = struct.unpack_from("<I", blob, first)
    new = LENGTHS[rng.integers(len(LENGTHS))] if rng.random() < 0.5 else (old + int(rng.integers(-9, 10))) % 2**32
    struct.pack_into("<I", changed, first, new)
    if first != second and rng.random() < 0.5:
        (kept,) = struct.unpack_from("<I", blob, second)
        struct.pack_into("<I", changed, second, (kept + old - new) % 2**32)
    return bytes(changed)


MUTATIONS: tuple[Mutation, ...] = (
    *(flip_bits, set_bytes, truncate, extend, splice),
    *(repeat_section, remove_section, noise, edit_length),
)


def parts_of(blob: bytes) -> list[bytes]:
    """The parts of a message whose header is right."""
    count = {1: 3, 2: 2, 3: 1, 4: 2}[blob[5]]
    start, parts = HEAD + 4 * count, []
    for length in struct.unpack_from(f"<{count}I", blob, HEAD):
        parts.append(blob[start : start + length])
        start += length
    return parts


def sealed(body: bytes) -> bytes:
    """The body with a checksum that fits it."""
    return body + struct.pack("<I", zlib.crc32(body))


def joined(head: bytes, parts: list[bytes]) -> bytes:
    """A frame around parts: lengths and checksum fit them."""
    return sealed(head + struct.pack(f"<{len(parts)}I", *map(len, parts)) + b"".join(parts))


def mutate_part(blob: bytes, others: list[bytes], mutation: Mutation, rng: np.random.Generator) -> bytes:
    """One part mutated or taken from another message, in a frame that fits: what gets the deepest."""
    parts, donors = parts_of(blob), parts_of(others[rng.integers(len(others))])
    index = int(rng.integers(len(parts)))
    donor = donors[index % len(donors)]
    parts[index] = mutation(parts[index], [donor], rng) if parts[index] and donor and rng.random() < 0.8 else donor
    head = blob[: HEAD - 1] + bytes([int(rng.integers(3))]) if rng.random() < 0.1 else blob[:HEAD]
    return joined(head, parts)


def mutant(target: Target, rng: np.random.Generator) -> tuple[bytes, bool]:
    """A mutated message, and whether its checksum was made anew."""
    blob = target.messages[rng.integers(len(target.messages))]
    mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
    way = rng.random()
    if not target.framed:
        return mutation(blob, target.messages, rng), True
    if way < 0.25:
        return mutation(blob, target.messages, rng), False
    if way < 0.5:
        return sealed(mutation(blob[:-4], [other[:-4] for other in target.messages], rng)), True
    return mutate_part(blob, target.messages, mutation, rng), True


# --- the test -----------------------------------------------------------------------------------------------------


def outcome(target: Target, blob: bytes, resealed: bool) -> str:
    """What came of a mutant; asserts the criterion of this file."""
    try:
        read = target.read(blob)
    except FrampError as error:
        return type(error).__name__
    assert resealed or blob in target.messages
    assert_valid(read)
    again = written(read)
    assert written(target.read(again)) == again
    return "read"


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_refused_by_name_or_are_valid(name: str) -> None:
    target, rng = TARGETS[name], rng_of(2, list(TARGETS).index(name))
    for blob in target.messages:
        assert outcome(target, blob, resealed=False) == "read"
    outcomes = Counter(outcome(target, *mutant(target, rng)) for _ in range(MUTANTS_PER_TARGET))
    # The mutator reaches past the frame: some mutants are valid messages, and most faults of the kind are met.
    assert outcomes["read"] > MUTANTS_PER_TARGET // 100
    assert outcomes.total() - outcomes["read"] > MUTANTS_PER_TARGET // 10
    if target.framed:
        assert {"ProtocolError", "TruncatedMessageError", "ChecksumError", "NonFiniteError"} <= set(outcomes)
    if name.startswith("submodel"):
        assert {"MaskMismatchError", "UnknownReferenceError"} <= set(outcomes)


def test_there_are_enough_mutants() -> None:
    assert MUTANTS_PER_TARGET * len(TARGETS) >= 100_000


def test_the_criterion_notices_what_is_accepted_without_cause() -> None:
    """Negative control: a reader that skips the checksum, and one that lets infinity through, fail it."""
    target = TARGETS["update"]

    def careless(blob: bytes) -> object:
        return target.read(sealed(blob[:-4]))

    def lenient(blob: bytes) -> object:
        read = target.read(blob)
        assert isinstance(read, Update)
        read.delta_kept[0] = np.inf
        return read

    blob = target.messages[0]
    with pytest.raises(AssertionError):
        outcome(Target(careless, [blob]), blob[:-1] + bytes([blob[-1] ^ 1]), resealed=False)
    with pytest.raises(AssertionError):
        outcome(Target(lenient, [blob]), blob, resealed=True)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60)
@given(data=st.data())
def test_mutants_that_shrink(name: str, data: st.DataObject) -> None:
    """The same criterion for parts that hypothesis makes up, which it cuts down to the smallest that fails."""
    target = TARGETS[name]
    blob = data.draw(st.sampled_from(target.messages))
    content = st.one_of(st.binary(max_size=60), st.integers(0, 300).map(bytes), st.just(b"\xff" * 300))
    if not target.framed:
        outcome(target, data.draw(content), resealed=True)
        return
    parts = parts_of(blob)
    index = data.draw(st.integers(0, len(parts) - 1))
    start = data.draw(st.integers(0, len(parts[index])))
    parts[index] = parts[index][:start] + data.draw(content)
    outcome(target, joined(blob[:HEAD], parts), resealed=True)


def peak_bytes(action: Callable[[], object]) -> int:
    """Memory that an action allocates at most, NumPy's arrays included."""
    action()
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", TARGETS)
def test_claims_of_size_allocate_nothing(name: str) -> None:
    """Lengths, counts and names of 2**32 - 1 wherever one can stand; a valid message bounds what reading may take."""
    target = TARGETS[name]

    def attempt(blob: bytes) -> None:
        try:
            target.read(blob)
        except FrampError:
            return

    blob = max(target.messages, key=len)
    allowed = peak_bytes(lambda: attempt(blob)) + 4 * len(blob) + 20_000
    claim = b"\xff" * 4
    bodies = [blob[:start] + claim + blob[start + 4 :] for start in range(len(blob) - 4)]
    claims = [sealed(body[:-4]) for body in bodies] if target.framed else bodies
    if target.framed:
        for index in range(len(parts_of(blob))):
            parts = parts_of(blob)
            parts[index] = claim + parts[index][4:]
            claims.append(joined(blob[:HEAD], parts))
    for changed in claims:
        assert peak_bytes(lambda: attempt(changed)) < allowed  # noqa: B023


def test_a_part_of_another_message_is_refused() -> None:
    """An update read as a submodel, a descriptor as an update, and so on for every pair of kinds."""
    kinds = {"submodel-alone": 1, "update": 2, "descriptor": 3, "slim": 4}
    for reader in kinds:
        for other in kinds:
            if reader != other:
                for blob in TARGETS[other].messages:
                    with pytest.raises(FrampError):
                        TARGETS[reader].read(blob)


def test_encoded_messages_are_bytes() -> None:
    encoded: Encoded = encode_descriptor(make_values(3, 0))
    for given_blob in (bytearray(encoded.blob), memoryview(encoded.blob), encoded.blob.hex(), None, 7):
        with pytest.raises(FrampError):
            decode_descriptor(given_blob)  # type: ignore[arg-type]
