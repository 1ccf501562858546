"""Masks as bits, against the masks themselves."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from framp_core.deltas import columns
from framp_core.packed_mask import Masks, PackedMask


@given(size=st.integers(0, 70), clients=st.integers(1, 4), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_every_look_at_bits_is_one_at_the_mask(size: int, clients: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(size) < density for _ in range(clients)]
    packed = Masks([PackedMask.of(mask) for mask in masks])
    first, last = sorted(rng.integers(size + 1, size=2).tolist())
    assert len(packed) == clients
    assert np.array_equal(np.stack(list(packed)), np.stack(masks))
    assert np.array_equal(np.ravel(list(packed[1:])), np.ravel(masks[1:]))
    assert np.array_equal(columns(packed, slice(first, last)), columns(masks, slice(first, last)))
    for bits, mask in zip(packed.packed, masks, strict=True):
        assert bits.bits.nbytes == -(-size // 8)
        assert bits.count_before(last) == sum(mask[:last])
        assert bits.kept().dtype == bits.part(slice(first, last)).dtype == np.bool_
