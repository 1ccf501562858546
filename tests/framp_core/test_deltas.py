"""Deltas kept as they came, against the dense ones."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from framp_core.deltas import KeptDeltas, columns
from framp_core.packed_mask import PackedMask


@given(size=st.integers(1, 40), clients=st.integers(1, 4), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_parts_are_those_of_the_dense_vectors(size: int, clients: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(size) < density for _ in range(clients)]
    dense = [np.where(mask, rng.normal(size=size), 0).astype(np.float32) for mask in masks]
    packed = [PackedMask.of(mask) for mask in masks]
    kept = KeptDeltas([delta[mask] for delta, mask in zip(dense, masks, strict=True)], packed)
    first, last = sorted(rng.integers(size + 1, size=2).tolist())
    assert len(kept) == clients
    assert np.array_equal(np.stack(list(kept)), np.stack(dense))
    assert np.array_equal(columns(kept, slice(first, last)), columns(dense, slice(first, last)))
    assert np.array_equal(kept[1:].columns(slice(0, size)).reshape(-1), np.ravel(dense[1:]))
