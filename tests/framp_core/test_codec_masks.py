import math
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.codec import decode_mask, encode_mask
from framp_core.errors import MaskMismatchError, ProtocolError, TruncatedMessageError

NONE, ALL, PACKED, ZSTD, RICE = (bytes([coding]) for coding in range(5))

masks = st.builds(
    lambda size, density, seed: np.random.default_rng(seed).random(size) < density,
    st.integers(0, 2000),
    st.one_of(st.sampled_from([0.0, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0]), st.floats(0, 1)),
    st.integers(0, 2**32),
)


def random_mask(size: int, kept: int, seed: int = 0) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[np.random.default_rng(seed).choice(size, kept, replace=False)] = True
    return mask


def entropy_bytes(size: int, kept: int) -> float:
    p = kept / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


def bits_to_bytes(bits: str) -> bytes:
    padded = bits + "0" * (-len(bits) % 8)
    return bytes(int(padded[start : start + 8], 2) for start in range(0, len(padded), 8))


def rice_by_hand(parameter: int, gaps: list[int]) -> bytes:
    """The format, bit by bit: low bits of all gaps, plane by plane, then zeros closed by a one per quotient."""
    planes = "".join(str(gap >> bit & 1) for bit in range(parameter) for gap in gaps)
    unary = "".join("0" * (gap >> parameter) + "1" for gap in gaps)
    header = bytes([parameter]) + len(gaps).to_bytes(4, "little")
    return RICE + header + bits_to_bytes(planes) + bits_to_bytes(unary)


def gaps_of(mask: np.ndarray) -> list[int]:
    kept = [-1, *(index for index, bit in enumerate(mask) if bit)]
    return [kept[i + 1] - kept[i] - 1 for i in range(len(kept) - 1)]


@settings(derandomize=True, deadline=None)
@given(mask=masks)
def test_round_trip_is_exact_and_never_longer_than_plain_bits(mask):
    code = encode_mask(mask)
    decoded = decode_mask(code, mask.size)
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)
    assert len(code) <= 1 + math.ceil(mask.size / 8)


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_every_mask_of_a_small_size(size):
    codes = set()
    for pattern in range(2**size):
        mask = np.array([pattern >> bit & 1 for bit in range(size)], bool)
        codes.add(encode_mask(mask))
        np.testing.assert_array_equal(decode_mask(encode_mask(mask), size), mask)
    assert len(codes) == 2**size


@settings(derandomize=True, deadline=None)
@given(size=st.integers(600, 2000), kept=st.integers(1, 40), seed=st.integers(0, 1000))
def test_sparse_masks_take_the_best_of_all_rice_codes_written_by_hand(size, kept, seed):
    mask = random_mask(size, kept, seed)
    by_hand = [rice_by_hand(parameter, gaps_of(mask)) for parameter in range(size.bit_length() + 1)]
    for code in by_hand:
        if len(code) <= 1 + math.ceil(size / 8):
            np.testing.assert_array_equal(decode_mask(code, size), mask)
    code = encode_mask(mask)
    assert code[:1] in (RICE, ZSTD)
    if code[:1] == RICE:
        assert code in by_hand
    # Of two parameters, the one with fewer bits may fill up to two bytes worse, one per padded stream.
    assert len(code) <= min(map(len, by_hand)) + 2


def test_size_on_the_wire_is_near_the_entropy_bound():
    size = 20_000
    for kept in (size // 64, size // 16, size // 4 - 1, size // 4, size // 2):
        for seed in range(3):
            code = encode_mask(random_mask(size, kept, seed))
            assert len(code) <= 1.1 * entropy_bytes(size, kept)
    assert size / 8 > 1.1 * entropy_bytes(size, size // 4)  # plain bits would fail


def test_structure_goes_below_the_bound_of_a_random_mask():
    channels = np.repeat(random_mask(200, 100), 100)
    code = encode_mask(channels)
    assert code[:1] == ZSTD
    assert len(code) < 0.5 * entropy_bytes(20_000, 10_000)
    assert encode_mask(random_mask(20_000, 10_000))[:1] == PACKED


def test_none_and_all_take_one_byte():
    for size in (1, 1000):
        assert encode_mask(np.zeros(size, bool)) == NONE
        assert encode_mask(np.ones(size, bool)) == ALL
    assert encode_mask(np.zeros(0, bool)) == NONE
    assert decode_mask(ALL, 3).tolist() == [True] * 3


def zstd(content: bytes, **options) -> bytes:
    return ZSTD + zstandard.ZstdCompressor(**options).compress(content)


SIZE = 804  # 101 bytes of bits, the last four of them padding
BAD_CODES = {
    "empty": (b"", TruncatedMessageError),
    "unknown coding": (b"\x09", ProtocolError),
    "bytes after all": (ALL + b"\0", TruncatedMessageError),
    "short bits": (PACKED + bytes(100), TruncatedMessageError),
    "longer than plain bits": (PACKED + bytes(102), TruncatedMessageError),
    "bit beyond the model": (PACKED + bytes(100) + b"\x01", MaskMismatchError),
    "compressed to fewer bits": (zstd(bytes(100)), TruncatedMessageError),
    "compressed to more bits": (zstd(bytes(102)), TruncatedMessageError),
    "bit beyond the model, compressed": (zstd(bytes(100) + b"\x01"), MaskMismatchError),
    "frame without a size": (zstd(bytes(101), write_content_size=False), TruncatedMessageError),
    "no frame": (ZSTD + b"garbage", ProtocolError),
    "half a frame": (zstd(bytes(101))[:-1], ProtocolError),
    "bytes after the frame": (zstd(bytes(101)) + b"\0", ProtocolError),
    "half a header": (RICE + b"\0\0", TruncatedMessageError),
    "no kept weight": (rice_by_hand(2, []), MaskMismatchError),
    "more kept than weights": (RICE + b"\0" + (SIZE + 1).to_bytes(4, "little") + b"\xff", MaskMismatchError),
    "parameter out of range": (RICE + b"\x40" + (1).to_bytes(4, "little") + bytes(8) + b"\x80", MaskMismatchError),
    "fewer quotients than announced": (RICE + b"\0" + (2).to_bytes(4, "little") + b"\x80", MaskMismatchError),
    "more quotients than announced": (RICE + b"\0" + (2).to_bytes(4, "little") + b"\xe0", MaskMismatchError),
    "remainders cut off": (RICE + b"\x07" + (20).to_bytes(4, "little") + b"\xff", MaskMismatchError),
    "index out of range": (rice_by_hand(4, [0, SIZE - 1]), MaskMismatchError),
    "bytes after the quotients": (rice_by_hand(4, [0, SIZE - 2]) + b"\0", TruncatedMessageError),
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_bad_codes_are_refused_by_name(name):
    code, error = BAD_CODES[name]
    with pytest.raises(ProtocolError) as caught:
        decode_mask(code, SIZE)
    assert type(caught.value) is error


def test_the_good_neighbours_of_the_bad_codes_are_read():
    assert np.flatnonzero(decode_mask(rice_by_hand(4, [0, SIZE - 2]), SIZE)).tolist() == [0, SIZE - 1]
    assert np.flatnonzero(decode_mask(PACKED + bytes(100) + b"\x10", SIZE)).tolist() == [SIZE - 1]
    assert np.flatnonzero(decode_mask(zstd(bytes(100) + b"\x10"), SIZE)).tolist() == [SIZE - 1]


@pytest.mark.parametrize(
    "code",
    [
        zstd(bytes(100_000_000)),
        RICE + b"\x0a" + (2**32 - 1).to_bytes(4, "little") + b"\xff" * 1000,
        RICE + b"\x0a" + (10_000).to_bytes(4, "little") + b"\xff" * 1000,
        PACKED + bytes(10_000_000),
    ],
)
def test_what_a_code_claims_allocates_nothing(code):
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        decode_mask(code, 100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def mask_or_refusal(code: bytes, size: int) -> np.ndarray | ProtocolError:
    try:
        return decode_mask(code, size)
    except ProtocolError as refusal:
        return refusal


def is_mask(result: object, size: int) -> bool:
    """Bool ``(size,)`` that survives another round trip."""
    fits = isinstance(result, np.ndarray) and result.dtype == bool and result.shape == (size,)
    return fits and np.array_equal(decode_mask(encode_mask(result), size), result)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(coding=st.sampled_from([NONE, ALL, PACKED, ZSTD, RICE]), rest=st.binary(max_size=20), size=st.integers(0, 150))
def test_any_bytes_are_refused_or_make_a_mask(coding, rest, size):
    result = mask_or_refusal(coding + rest, size)
    assert isinstance(result, ProtocolError) or is_mask(result, size)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(mask=masks, place=st.integers(0, 10**6), change=st.integers(1, 255), other_size=st.integers(0, 2000))
def test_a_changed_code_is_refused_or_makes_a_mask(mask, place, change, other_size):
    code = bytearray(encode_mask(mask))
    assert is_mask(decode_mask(bytes(code), mask.size), mask.size)
    result = mask_or_refusal(bytes(code), other_size)
    assert isinstance(result, ProtocolError) or is_mask(result, other_size)
    code[place % len(code)] ^= change
    for changed in (bytes(code), bytes(code[: place % len(code)])):
        result = mask_or_refusal(changed, mask.size)
        assert isinstance(result, ProtocolError) or is_mask(result, mask.size)
