import contextlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.codec.bits import decode_bits, encode_bits, longest_code
from framp_core.errors import MaskMismatchError, ProtocolError, TruncatedMessageError

GOLDEN = (math.sqrt(5) - 1) / 2
PLAIN, GAPS, HOLES, CONSTANT = "00", "01", "10", "11"

densities = st.one_of(st.sampled_from([0.0, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0]), st.floats(0, 1))
segments = st.lists(st.tuples(st.integers(0, 400), densities), max_size=5)
seeds = st.integers(0, 2**32)


def drawn(parts: list[tuple[int, float]], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([np.zeros(0, bool), *(rng.random(size) < density for size, density in parts)])


def random_bits(size: int, kept: int, seed: int = 0) -> np.ndarray:
    bits = np.zeros(size, bool)
    bits[np.random.default_rng(seed).choice(size, kept, replace=False)] = True
    return bits


def entropy_bytes(size: int, kept: int) -> float:
    p = kept / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8 if 0 < kept < size else 0.0


def binary(value: int, width: int) -> str:
    return format(value, f"0{width}b") if width else ""


def to_bytes(stream: str) -> bytes:
    padded = stream + "0" * (-len(stream) % 8)
    return bytes(int(padded[start : start + 8], 2) for start in range(0, len(padded), 8))


def segment_by_hand(bits: list[bool]) -> str:
    """The format, bit by bit."""
    size, count = len(bits), sum(bits)
    if size == 0:
        return ""
    if count in (0, size):
        return CONSTANT + str(int(bits[0]))
    plain = PLAIN + "".join(str(int(bit)) for bit in bits)
    rarer = 2 * count <= size
    places = [-1] + [index for index, bit in enumerate(bits) if bit == rarer]
    gaps = [place - before - 1 for before, place in itertools.pairwise(places)]
    parameter = 0
    while (1 - len(gaps) / size) ** (2**parameter) > GOLDEN:
        parameter += 1
    planes = "".join(str(gap >> bit & 1) for bit in range(parameter) for gap in gaps)
    unary = "".join("0" * (gap >> parameter) + "1" for gap in gaps)
    rice = (GAPS if rarer else HOLES) + binary(len(gaps), (size // 2).bit_length()) + planes + unary
    return rice if len(rice) < len(plain) else plain


def by_hand(bits: np.ndarray, choice: int, partition: list[int]) -> bytes:
    stream, rest = binary(choice, 2), bits.tolist()
    for size in partition:
        stream, rest = stream + segment_by_hand(rest[:size]), rest[size:]
    return to_bytes(stream)


@given(parts=segments, seed=seeds)
def test_code_is_one_of_those_written_by_hand_and_comes_back_exactly(parts, seed):
    bits, sizes = drawn(parts, seed), [size for size, _ in parts]
    partitions = [[bits.size], sizes]
    code = encode_bits(bits, partitions)
    shortest, other = sorted((by_hand(bits, choice, each) for choice, each in enumerate(partitions)), key=len)
    assert code in (shortest, other)
    assert len(code) <= longest_code(bits.size) == math.ceil((bits.size + 4) / 8)
    decoded, used = decode_bits(code + b"\xff\x00", partitions)
    assert used == len(code)
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, bits)
    for each in (shortest, other):
        if len(each) <= longest_code(bits.size):
            np.testing.assert_array_equal(decode_bits(each, partitions)[0], bits)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_every_vector_of_a_small_size(size):
    partitions = [[size], [size // 2, size - size // 2]]
    codes = set()
    for pattern in range(2**size):
        bits = np.array([pattern >> bit & 1 for bit in range(size)], bool)
        codes.add(encode_bits(bits, partitions))
        np.testing.assert_array_equal(decode_bits(encode_bits(bits, partitions), partitions)[0], bits)
    assert len(codes) == 2**size


@pytest.mark.parametrize("density", [1e-3, 1 / 64, 1 / 16, 0.1, 1 / 5, 1 / 4, 0.3, 0.38, 0.45, 1 / 2, 0.8, 63 / 64])
def test_size_is_near_the_entropy_bound_at_every_density(density):
    size = 200_000
    limit = 1.042 if 0.2 < density < 0.45 and density != 1 / 4 else 1.03
    for seed in range(3):
        bits = random_bits(size, round(size * density), seed)
        assert len(encode_bits(bits, [[size]])) <= limit * entropy_bytes(size, int(bits.sum()))
    assert size / 8 > 1.03 * entropy_bytes(size, size // 4)  # plain bits would fail


def test_parameter_is_the_best_one_for_geometric_gaps():
    """Length with every other r, counted from the gaps: none is shorter than the code by more than chance."""
    for size, kept in ((5000, 40), (5000, 400), (5000, 1300)):
        bits = random_bits(size, kept)
        gaps = np.diff(np.flatnonzero(bits), prepend=-1) - 1
        lengths = [int(kept * (1 + r) + (gaps >> r).sum()) for r in range(12)]
        assert 8 * len(encode_bits(bits, [[size]])) <= 1.01 * min(lengths) + 2 + 2 + 12 + 8


def test_constant_segments_take_three_bits():
    for value in (False, True):
        bits = np.full(90, value)
        assert encode_bits(bits, [[90]]) == to_bytes("00" + CONSTANT + str(int(value)))
    mixed = np.repeat([True, False, True], 30)
    assert encode_bits(mixed, [[90], [30, 0, 30, 30]]) == to_bytes("01" + "111" + "110" + "111")


def test_segments_of_their_own_density_pay():
    bits = np.concatenate([random_bits(5000, 4000), random_bits(5000, 50)])
    together, apart = encode_bits(bits, [[10_000]]), encode_bits(bits, [[10_000], [5000, 5000]])
    bound = entropy_bytes(5000, 4000) + entropy_bytes(5000, 50)
    assert len(apart) <= 1.04 * bound < 0.9 * len(together)


SIZE = 100
PARTITIONS = [[SIZE], [40, 60]]


def gap_code(count: int, remainders: str, unary: str, form: str = GAPS) -> str:
    return "00" + form + binary(count, 6) + remainders + unary


FOUR = "0" * 4 * 4  # four gaps at r = 4, all remainders 0: (1 - 0.04)**(2**4) = 0.52 is the first below 0.618
BAD_CODES = {
    "empty": (b"", TruncatedMessageError),
    "unknown partition": (b"\x80", ProtocolError),
    "ends within the count": (to_bytes("0001"), TruncatedMessageError),
    "ends within plain bits": (to_bytes("0000" + "01" * 40), TruncatedMessageError),
    "no index": (to_bytes(gap_code(0, "", "1" * 20)), MaskMismatchError),
    "more than half": (to_bytes(gap_code(51, "", "1" * 51)), MaskMismatchError),
    "ends within remainders": (to_bytes(gap_code(4, "0" * 2, "")), TruncatedMessageError),
    "fewer quotients than announced": (to_bytes(gap_code(4, FOUR, "111")), MaskMismatchError),
    "quotient out of range": (to_bytes(gap_code(4, FOUR, "111" + "0" * 9 + "1")), MaskMismatchError),
    "index out of range": (to_bytes(gap_code(4, FOUR, "1" + 2 * "0001" + "01")), MaskMismatchError),
    "bits behind the end": (to_bytes("00" + CONSTANT + "1" + "001"), ProtocolError),
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_bad_codes_are_refused_by_name(name):
    code, error = BAD_CODES[name]
    with pytest.raises(ProtocolError) as caught:
        decode_bits(code, PARTITIONS)
    assert type(caught.value) is error


def test_the_good_neighbours_of_the_bad_codes_are_read():
    def indices(stream: str) -> list[int]:
        return np.flatnonzero(decode_bits(to_bytes(stream), PARTITIONS)[0]).tolist()

    assert indices(gap_code(4, FOUR, "1111")) == [0, 1, 2, 3]
    assert indices(gap_code(4, FOUR, "1" + 2 * "0001" + "1")) == [0, 49, 98, 99]
    assert indices(gap_code(4, FOUR, "1111", HOLES)) == list(range(4, SIZE))


@pytest.mark.parametrize("start", [b"\x00", b"\x1f", b"\x2f", b"\x30", b"\x5f", b"\x6f"])
def test_what_a_code_claims_allocates_nothing(start):
    code = start + b"\xff" * 10_000_000
    tracemalloc.start()
    with contextlib.suppress(ProtocolError):
        decode_bits(code, [[100_000], [50_000, 50_000]])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000  # int64 indices of half the bits, three times


@settings(max_examples=300)
@given(data=st.binary(max_size=30), sizes=st.lists(st.integers(0, 60), max_size=4))
def test_any_bytes_are_refused_or_make_bits(data, sizes):
    partitions = [[sum(sizes)], sizes]
    try:
        bits, used = decode_bits(data, partitions)
    except ProtocolError:
        return
    assert bits.shape == (sum(sizes),)
    assert 1 <= used <= len(data)
    np.testing.assert_array_equal(decode_bits(encode_bits(bits, partitions), partitions)[0], bits)


@settings(max_examples=200)
@given(parts=segments, seed=seeds, place=st.integers(0, 10**6), change=st.integers(1, 255))
def test_a_changed_or_cut_code_is_refused_or_makes_bits(parts, seed, place, change):
    bits = drawn(parts, seed)
    partitions = [[bits.size], [size for size, _ in parts]]
    code = bytearray(encode_bits(bits, partitions))
    place %= len(code)
    with pytest.raises(ProtocolError):
        decode_bits(bytes(code[:place]), partitions)
    code[place] ^= change
    with contextlib.suppress(ProtocolError):
        assert decode_bits(bytes(code), partitions)[0].shape == bits.shape
