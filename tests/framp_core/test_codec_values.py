import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framp_core.codec import decode_values, encode_values
from framp_core.errors import MaskMismatchError

FORMATS = ["float32", "bfloat16", "int8"]

any_bits = st.lists(st.integers(0, 2**32 - 1), max_size=40).map(lambda bits: np.array(bits, np.uint32).view(np.float32))
tensors = st.lists(
    st.lists(st.floats(-(2**99), 2**99, width=32, allow_subnormal=False), max_size=6).map(
        lambda values: np.array(values, np.float32)
    ),
    max_size=5,
)


def round_trip(values: np.ndarray, value_format: str, sizes: list[int] | None = None, rng=None) -> np.ndarray:
    sizes = [values.size] if sizes is None else sizes
    return decode_values(encode_values(values, value_format, sizes, rng), value_format, sizes)


@settings(derandomize=True, deadline=None)
@given(values=any_bits)
def test_float32_is_exact_for_every_bit_pattern(values):
    np.testing.assert_array_equal(round_trip(values, "float32").view(np.uint32), values.view(np.uint32))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(values=any_bits)
def test_bfloat16_rounds_as_torch_does(values):
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(round_trip(values, "bfloat16"), expected)  # NaN equals NaN here


def test_bfloat16_ties_go_to_even_and_nan_stays_nan():
    # bfloat16 has 7 fraction bits: neighbours of 1 are 1 + 2**-7 steps, ties lie at odd multiples of 2**-8.
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf], np.float32)
    np.testing.assert_array_equal(round_trip(values, "bfloat16"), [1, 1 + 2 * 2**-7, 1 + 2**-7, np.inf])
    every_nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(round_trip(every_nan, "bfloat16")).all()


@settings(derandomize=True, deadline=None)
@given(parts=tensors, stochastic=st.booleans())
def test_int8_error_is_bounded_by_each_tensors_own_scale(parts, stochastic):
    rng = np.random.default_rng(0) if stochastic else None
    values = np.concatenate([*parts, np.zeros(0, np.float32)])
    decoded = np.split(
        round_trip(values, "int8", [part.size for part in parts], rng), np.cumsum([p.size for p in parts])
    )
    for part, back in zip(parts, decoded, strict=False):
        scale = max((abs(float(value)) for value in part), default=0.0) / 127
        steps = 1.0 if stochastic else 0.5
        for value, result in zip(part, back, strict=True):
            # The scale is a float32: relative error 2**-24, or half of 2**-149 where it is subnormal, times 127.
            assert abs(float(value) - float(result)) <= steps * scale * (1 + 1e-4) + 127 * 2**-150


def test_int8_scale_belongs_to_the_tensor():
    values = np.array([1000, -500, 0.001, 0.0005, -0.001], np.float32)
    sizes = [2, 0, 3]
    relative = np.abs(round_trip(values, "int8", sizes) / values - 1)
    assert relative.max() <= 0.5 / 127 / 0.5 + 1e-5  # half a step of max / 127, on values of at least max / 2
    assert np.abs(round_trip(values, "int8")[2:]).max() == 0  # one scale for all would erase the small tensor


def test_int8_stochastic_rounding_has_the_right_mean():
    # max |x| = 127 makes the scale exactly 1, so 0.3 becomes 1 with probability 0.3 and 0 otherwise.
    n = 20_000
    values = np.concatenate([[127], np.full(n, 0.3)]).astype(np.float32)
    drawn = round_trip(values, "int8", rng=np.random.default_rng(0))[1:]
    assert set(drawn.tolist()) == {0.0, 1.0}
    assert abs(drawn.mean() - 0.3) <= 5 * (0.3 * 0.7 / n) ** 0.5
    assert set(round_trip(values, "int8")[1:].tolist()) == {0.0}
    whole = np.array([127, -127, 3, 0, -1], np.float32)
    np.testing.assert_array_equal(round_trip(whole, "int8", rng=np.random.default_rng(0)), whole)


def test_int8_stochastic_rounding_is_unbiased_in_every_tensor():
    """The mean of N draws lies within 5 standard errors; one draw's deviation is at most half a step."""
    draws, sizes = 1000, [40, 0, 60, 1]
    rng = np.random.default_rng(3)
    values = np.concatenate(
        [rng.normal(scale=scale, size=size) for scale, size in zip((1, 1, 1e-4, 9), sizes, strict=True)]
    )
    values = values.astype(np.float32)
    mean = np.mean([round_trip(values, "int8", sizes, rng).astype(np.float64) for _ in range(draws)], axis=0)
    nearest = round_trip(values, "int8", sizes)
    for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
        part = slice(start, start + size)
        step = np.abs(values[part]).max(initial=0) / 127
        assert np.abs(mean - values)[part].max(initial=0) <= 5 * (step / 2) / draws**0.5 + 1e-6 * step
        if size > 1:
            assert np.abs(nearest - values)[part].max() > 5 * (step / 2) / draws**0.5  # rounding to nearest is biased


def test_int8_draws_come_from_the_stream_alone():
    values = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    first, same, other = (encode_values(values, "int8", [1000], np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first == same != other


@pytest.mark.parametrize("value_format", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_cannot_pass_for_a_finite_one(value_format, bad):
    values = np.array([1, bad, 2], np.float32)
    assert not np.isfinite(round_trip(values, value_format)).all()


def test_int8_extremes():
    tiny = np.array([1e-45, 0], np.float32)  # its scale rounds to 0
    assert np.abs(round_trip(tiny, "int8") - tiny).max() <= 1e-45
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(round_trip(np.zeros(3, np.float32), "int8"), [0, 0, 0])


@pytest.mark.parametrize(("value_format", "expected"), [("float32", 4 * 5), ("bfloat16", 2 * 5), ("int8", 5 + 2 * 4)])
def test_bytes_on_the_wire(value_format, expected):
    assert len(encode_values(np.ones(5, np.float32), value_format, [2, 0, 3])) == expected


@pytest.mark.parametrize("value_format", FORMATS)
def test_empty_vectors_and_writable_results(value_format):
    assert round_trip(np.zeros(0, np.float32), value_format, []).shape == (0,)
    assert round_trip(np.zeros(0, np.float32), value_format, [0, 0]).shape == (0,)
    decoded = round_trip(np.ones(2, np.float32), value_format)
    assert decoded.dtype == np.float32
    decoded[0] = 7


@pytest.mark.parametrize("value_format", FORMATS)
def test_another_number_of_values_is_refused(value_format):
    values = np.ones(5, np.float32)
    with pytest.raises(MaskMismatchError, match="keeps 4"):
        encode_values(values, value_format, [2, 2])
    data = encode_values(values, value_format, [2, 3])
    for sizes in ([2, 2], [2, 4]):
        with pytest.raises(MaskMismatchError, match=f"{sum(sizes)} kept weights"):
            decode_values(data, value_format, sizes)
    with pytest.raises(MaskMismatchError):
        decode_values(data[:-1], value_format, [2, 3])
