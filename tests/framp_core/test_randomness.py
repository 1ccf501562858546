from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from framp_core.randomness import stream, torch_stream


@given(st.integers(0, 2**32), st.text(max_size=8), st.integers(0, 1000))
def test_same_keys_same_numbers(seed: int, name: str, server_round: int) -> None:
    first = stream(seed, "purpose", name, server_round).integers(2**62, size=4)
    assert (first == stream(seed, "purpose", name, server_round).integers(2**62, size=4)).all()


def test_every_key_matters() -> None:
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", "client-0001"), (0, "a", "client-0002"), (0, "a", 1), (0, "a", 1, 2)]
    draws = [tuple(stream(seed, *rest).integers(2**62, size=2)) for seed, *rest in keys]
    assert all(one != other for one, other in combinations(draws, 2))


def test_torch_stream_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=torch_stream(0, "purpose"))
    assert torch.equal(first, torch.rand(3, generator=torch_stream(0, "purpose")))
    assert not torch.equal(first, torch.rand(3, generator=torch_stream(1, "purpose")))
    assert torch.equal(before, torch.random.get_rng_state())
