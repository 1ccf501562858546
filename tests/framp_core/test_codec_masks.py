import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.codec import Reference, decode_mask, encode_mask, encode_mask_part, expected_flips
from framp_core.codec.masks import decode_flips, decode_mask_part, encode_flips
from framp_core.errors import ProtocolError, TruncatedMessageError, UnknownReferenceError

ALONE, HELD, GIVEN, RENEWED = (bytes([form]) for form in range(4))

sizes = st.lists(st.integers(0, 300), max_size=4)
densities = st.sampled_from([0.0, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 1.0])
seeds = st.integers(0, 2**32)


def random_mask(size: int, density: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size) < density


def moved(mask: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A mask of as many weights, ``share`` of them exchanged."""
    rng, result = np.random.default_rng(seed), mask.copy()
    count = round(share * mask.sum())
    result[rng.choice(np.flatnonzero(mask), count, replace=False)] = False
    result[rng.choice(np.flatnonzero(~mask), count, replace=False)] = True
    return result


def entropy_bytes(size: int, kept: float) -> float:
    p = kept / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


@given(sizes=sizes, density=densities, seed=seeds)
def test_a_mask_alone_comes_back_exactly(sizes, density, seed):
    mask = random_mask(sum(sizes), density, seed)
    code = encode_mask(mask, sizes)
    np.testing.assert_array_equal(decode_mask(code, sizes), mask)
    with pytest.raises(TruncatedMessageError):
        decode_mask(code + b"\0", sizes)


def test_clustered_masks_are_coded_at_the_densities_of_their_tensors():
    sizes = [10_000, 40_000, 100_000]
    densities = (0.6, 0.04, 0.005)
    mask = np.concatenate([random_mask(size, p, seed=size) for size, p in zip(sizes, densities, strict=True)])
    parts = np.split(mask, np.cumsum(sizes)[:-1])
    bound = sum(entropy_bytes(part.size, int(part.sum())) for part in parts)
    assert len(encode_mask(mask, sizes)) <= 1.03 * bound
    assert bound < 0.7 * entropy_bytes(mask.size, int(mask.sum()))


def test_full_and_empty_tensors_cost_nothing():
    sizes = [1000, 64, 1000, 64]
    mask = np.concatenate(
        [random_mask(1000, 0.1, 0), np.ones(64, bool), random_mask(1000, 0.02, 1), np.zeros(64, bool)]
    )
    without = np.concatenate([mask[:1000], mask[1064:2064]])
    assert len(encode_mask(mask, sizes)) <= len(encode_mask(without, [1000, 1000])) + 1


def test_flips_are_exact_for_all_pairs_of_masks():
    masks = [np.array(bits, bool) for bits in itertools.product([0, 1], repeat=6)]
    for reference in masks:
        codes = set()
        for mask in masks:
            code = encode_flips(mask, reference, [2, 0, 4])
            decoded, used = decode_flips(code + b"\xff", reference, [2, 0, 4])
            np.testing.assert_array_equal(decoded, mask)
            assert used == len(code)
            codes.add(code)
        assert len(codes) == len(masks)


@given(sizes=sizes, density=densities, other=densities, seed=seeds)
def test_flips_are_exact_for_any_pair_of_masks(sizes, density, other, seed):
    mask, reference = random_mask(sum(sizes), density, seed), random_mask(sum(sizes), other, seed + 1)
    before = reference.copy()
    code = encode_flips(mask, reference, sizes)
    np.testing.assert_array_equal(decode_flips(code, reference, sizes)[0], mask)
    np.testing.assert_array_equal(reference, before)


@pytest.mark.parametrize("density", [1 / 64, 1 / 16, 1 / 4])
def test_flips_are_coded_below_the_entropy_of_the_plain_difference(density):
    """d weights leave k, d enter the other m - k: ``k H(d / k) + (m - k) H(d / (m - k)) < m H(2 d / m)``."""
    size = 200_000
    reference = random_mask(size, density, 0)
    mask = moved(reference, 0.04, 1)
    kept, flipped = int(reference.sum()), int((reference & ~mask).sum())
    bound = entropy_bytes(kept, flipped) + entropy_bytes(size - kept, flipped)
    code = encode_flips(mask, reference, [size])
    assert len(code) <= 1.03 * bound < 1.03 * entropy_bytes(size, 2 * flipped)
    assert len(code) <= 0.2 * len(encode_mask(mask, [size]))


def test_the_same_mask_again_takes_a_byte():
    mask = random_mask(1000, 0.2, 0)
    assert len(encode_flips(mask, mask, [400, 600])) == 1


def some_parts(sizes: list[int], density: float, seed: int) -> tuple[np.ndarray, Reference, Reference]:
    mask, first, second = (random_mask(sum(sizes), density, seed + step) for step in range(3))
    return mask, Reference.of(first), Reference.of(second)


@given(sizes=sizes, density=densities, seed=seeds)
def test_every_form_comes_back_exactly_and_says_what_to_hold(sizes, density, seed):
    mask, held, new = some_parts(sizes, density, seed)
    for form, before, sent, after in (
        (ALONE, None, None, held),
        (HELD, held, None, held),
        (GIVEN, None, new, new),
        (RENEWED, held, new, new),
    ):
        code = encode_mask_part(mask, sizes, before, sent)
        assert code[:1] == form
        decoded, reference = decode_mask_part(code, sizes, held)
        np.testing.assert_array_equal(decoded, mask)
        assert reference is not None
        assert reference.name == after.name
        np.testing.assert_array_equal(reference.kept(), after.kept())
        with pytest.raises(ProtocolError):
            decode_mask_part(code + b"\0", sizes, held)


def test_an_unknown_reference_is_refused():
    sizes = [100, 300]
    mask, held, new = some_parts(sizes, 0.1, 0)
    for code in (encode_mask_part(mask, sizes, held), encode_mask_part(mask, sizes, held, new)):
        with pytest.raises(UnknownReferenceError, match=f"{held.name:08x} and this client holds none"):
            decode_mask_part(code, sizes, None)
        with pytest.raises(UnknownReferenceError, match=f"{held.name:08x} and this client holds {new.name:08x}"):
            decode_mask_part(code, sizes, new)
    for code in (encode_mask_part(mask, sizes), encode_mask_part(mask, sizes, new=new)):
        np.testing.assert_array_equal(decode_mask_part(code, sizes, None)[0], mask)


def test_what_the_client_holds_is_not_changed_by_reading():
    sizes = [100, 300]
    mask, held, new = some_parts(sizes, 0.1, 0)
    bits, name = held.bits.copy(), held.name
    decode_mask_part(encode_mask_part(mask, sizes, held, new), sizes, held)
    np.testing.assert_array_equal(held.bits, bits)
    assert Reference(held.bits, held.size).name == name


def test_bad_parts_are_refused_by_name():
    with pytest.raises(ProtocolError, match="form None"):
        decode_mask_part(b"", [10], None)
    with pytest.raises(ProtocolError, match="form 4"):
        decode_mask_part(b"\x04", [10], None)
    with pytest.raises(TruncatedMessageError, match="name of its reference"):
        decode_mask_part(HELD + b"abc", [10], None)


@settings(max_examples=150)
@given(sizes=sizes, density=densities, seed=seeds, form=st.integers(0, 3), change=st.integers(1, 255), data=st.data())
def test_a_changed_or_cut_part_is_refused_or_makes_a_mask(sizes, density, seed, form, change, data):
    mask, held, new = some_parts(sizes, density, seed)
    code = bytearray(encode_mask_part(mask, sizes, held if form in (1, 3) else None, new if form > 1 else None))
    place = data.draw(st.integers(0, len(code) - 1))
    with pytest.raises(ProtocolError):
        decode_mask_part(bytes(code[:place]), sizes, held)
    code[place] ^= change
    try:
        decoded, reference = decode_mask_part(bytes(code), sizes, held)
    except ProtocolError:
        return
    assert decoded.shape == mask.shape
    assert reference is None or reference.size == mask.size


@pytest.mark.parametrize("density", [1 / 64, 1 / 4, 0.9])
@pytest.mark.parametrize("turned", [0.0, 0.01, 0.1])
def test_the_expected_length_of_flips_is_near_their_code(density: float, turned: float) -> None:
    rng = np.random.default_rng(0)
    reference = rng.random(20_000) < density
    kept = reference ^ (rng.random(20_000) < turned)
    bits = 8 * len(encode_flips(kept, reference, [20_000]))
    assert abs(bits - expected_flips(kept, reference)) <= 0.02 * bits + 8
