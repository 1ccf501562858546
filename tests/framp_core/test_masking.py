from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from framp_core.config import ExtractionConfig
from framp_core.errors import ModelError, NonFiniteError
from framp_core.layout import ParameterLayout
from framp_core.masking import extract, global_top_k, layer_top_k, scores

LAYOUT = ParameterLayout.of(
    nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2), nn.Linear(2, 4, bias=False))
)
MASKABLE = LAYOUT.maskable_size
LAYERS = [slot for slot in LAYOUT.slots if slot.maskable]

many_ties = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=LAYOUT.size, max_size=LAYOUT.size).map(
    lambda values: np.array(values, dtype=np.float32)
)
counts = st.integers(0, MASKABLE)


def by_full_sort(values: np.ndarray, candidates: list[int], k: int) -> set[int]:
    return set(sorted(candidates, key=lambda index: (-values[index], index))[:k])


def by_hand_share(k: int) -> list[int]:
    quotas = [Fraction(k * slot.size, MASKABLE) for slot in LAYERS]
    shares = [int(quota) for quota in quotas]
    while sum(shares) < k:
        remainders = [quota - share for quota, share in zip(quotas, shares, strict=True)]
        shares[remainders.index(max(remainders))] += 1
    return shares


@settings(derandomize=True, deadline=None)
@given(values=many_ties, k=counts)
def test_global_top_k_equals_a_full_sort(values, k):
    always_kept = set(np.flatnonzero(~LAYOUT.maskable))
    expected = always_kept | by_full_sort(values, list(np.flatnonzero(LAYOUT.maskable)), k)
    mask = global_top_k(values, LAYOUT, k)
    assert mask.dtype == bool
    assert mask.shape == (LAYOUT.size,)
    assert set(np.flatnonzero(mask)) == expected
    assert np.count_nonzero(mask & LAYOUT.maskable) == k


@settings(derandomize=True, deadline=None)
@given(values=many_ties, k=counts)
def test_layer_top_k_equals_a_full_sort_per_layer(values, k):
    expected = set(np.flatnonzero(~LAYOUT.maskable))
    for slot, share in zip(LAYERS, by_hand_share(k), strict=True):
        assert share <= slot.size
        expected |= by_full_sort(values, list(range(slot.offset, slot.offset + slot.size)), share)
    mask = layer_top_k(values, LAYOUT, k)
    assert set(np.flatnonzero(mask)) == expected
    assert np.count_nonzero(mask & LAYOUT.maskable) == k


@settings(derandomize=True, deadline=None)
@given(values=many_ties, k=counts, more=counts)
def test_global_masks_are_nested(values, k, more):
    small, large = sorted((k, more))
    assert not np.any(global_top_k(values, LAYOUT, small) & ~global_top_k(values, LAYOUT, large))


def test_all_equal_scores_keep_the_first_weights():
    mask = global_top_k(np.ones(LAYOUT.size, dtype=np.float32), LAYOUT, 7)
    assert set(np.flatnonzero(mask & LAYOUT.maskable)) == set(np.flatnonzero(LAYOUT.maskable)[:7])


def test_layer_and_global_differ_where_one_layer_is_larger():
    values = np.ones(LAYOUT.size, dtype=np.float32)
    values[LAYERS[0].slice] = 9.0
    k = LAYERS[0].size
    assert np.count_nonzero(global_top_k(values, LAYOUT, k)[LAYERS[0].slice]) == k
    assert np.count_nonzero(layer_top_k(values, LAYOUT, k)[LAYERS[0].slice]) == by_hand_share(k)[0] < k


@settings(derandomize=True, deadline=None)
@given(exponent=st.floats(0, 1))
def test_scores_scale_magnitudes_by_fan_in(exponent):
    theta = np.linspace(-2, 3, LAYOUT.size, dtype=np.float32)
    kept = theta.copy()
    expected = np.abs(theta.astype(np.float64)) * LAYOUT.fan_in.astype(np.float64) ** exponent
    result = scores(theta, LAYOUT, exponent)
    assert result.dtype == np.float32
    assert np.allclose(result, expected, rtol=1e-6)
    assert np.array_equal(theta, kept), "the model itself must not change"


def test_exponent_zero_ranks_by_magnitude_and_a_half_does_not():
    theta = np.linspace(-2, 3, LAYOUT.size, dtype=np.float32)
    assert np.array_equal(scores(theta, LAYOUT, 0.0), np.abs(theta))
    assert not np.array_equal(
        global_top_k(scores(theta, LAYOUT, 0.5), LAYOUT, 9), global_top_k(np.abs(theta), LAYOUT, 9)
    )


@pytest.mark.parametrize("name", ["global-top-k", "layer-top-k"])
@pytest.mark.parametrize("capacity", [Fraction(1, 16), Fraction(1, 4), 0.3, Fraction(1)])
def test_extract_keeps_the_floor_and_all_always_kept(name, capacity):
    theta = np.random.default_rng(0).normal(size=LAYOUT.size).astype(np.float32)
    mask = extract(theta, LAYOUT, ExtractionConfig(name=name), capacity)
    assert np.count_nonzero(mask & LAYOUT.maskable) == int(capacity * MASKABLE)
    assert mask[~LAYOUT.maskable].all()
    select = global_top_k if name == "global-top-k" else layer_top_k
    assert np.array_equal(mask, select(np.abs(theta), LAYOUT, int(capacity * MASKABLE)))


def test_extract_passes_the_fan_in_exponent_on():
    theta = np.random.default_rng(0).normal(size=LAYOUT.size).astype(np.float32)
    scaled = extract(theta, LAYOUT, ExtractionConfig(fan_in_exponent=1.0), 0.25)
    assert np.array_equal(scaled, global_top_k(scores(theta, LAYOUT, 1.0), LAYOUT, MASKABLE // 4))
    assert not np.array_equal(scaled, extract(theta, LAYOUT, ExtractionConfig(), 0.25))


def test_full_keeps_everything_whatever_the_capacity():
    theta = np.zeros(LAYOUT.size, dtype=np.float32)
    assert extract(theta, LAYOUT, ExtractionConfig(name="full"), Fraction(1, 64)).all()


def test_capacity_that_leaves_no_weight_is_refused():
    theta = np.ones(LAYOUT.size, dtype=np.float32)
    with pytest.raises(ModelError, match=f"of {MASKABLE} maskable weights leaves none"):
        extract(theta, LAYOUT, ExtractionConfig(), Fraction(1, MASKABLE + 1))
    assert extract(theta, LAYOUT, ExtractionConfig(), Fraction(1, MASKABLE)).any()


@pytest.mark.parametrize("k", [-1, MASKABLE + 1])
@pytest.mark.parametrize("select", [global_top_k, layer_top_k])
def test_k_out_of_range_is_refused(select, k):
    with pytest.raises(ModelError, match=f"cannot keep {k} of {MASKABLE}"):
        select(np.ones(LAYOUT.size, dtype=np.float32), LAYOUT, k)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["global-top-k", "layer-top-k", "full"])
def test_non_finite_model_is_refused(name, bad):
    theta = np.ones(LAYOUT.size, dtype=np.float32)
    theta[4] = bad
    with pytest.raises(NonFiniteError, match=r"1 values .* index 4\)"):
        extract(theta, LAYOUT, ExtractionConfig(name=name), 0.5)


@pytest.mark.parametrize("select", [global_top_k, layer_top_k])
def test_non_finite_scores_are_refused(select):
    values = np.ones(LAYOUT.size, dtype=np.float32)
    values[[2, 3]] = np.nan
    with pytest.raises(NonFiniteError, match="2 values"):
        select(values, LAYOUT, 5)
