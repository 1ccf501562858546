import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framp_core.codec import encode_mask_part
from framp_core.codec.masks import Reference, decode_mask_part
from framp_core.mask_references import KEPT_PER_SIZE, MaskReferences

SIZES = [500, 1500]


def mask(seed: int, density: float = 0.1) -> np.ndarray:
    return np.random.default_rng(seed).random(sum(SIZES)) < density


def near(kept: np.ndarray, flips: int, seed: int) -> np.ndarray:
    result = kept.copy()
    result[np.random.default_rng(seed).choice(kept.size, flips, replace=False)] ^= True
    return result


class Receiver:
    """A client that decodes what it is sent and holds what it is told to."""

    def __init__(self) -> None:
        self.held: Reference | None = None

    def read(self, code: bytes) -> np.ndarray:
        kept, self.held = decode_mask_part(code, SIZES, self.held)
        return kept

    @property
    def name(self) -> int | None:
        return None if self.held is None else self.held.name


def test_forms_follow_what_the_client_holds():
    references, client, base = MaskReferences(SIZES), Receiver(), mask(0)
    forms = []
    for server_round, kept in enumerate([base, near(base, 3, 1), near(base, 3, 2)], start=1):
        if server_round != 2:
            references.renew(server_round, [("s", kept)])
        coded = references.code("a", "s", kept)
        forms.append(coded.code[0])
        assert coded.alone == len(encode_mask_part(kept, SIZES))
        np.testing.assert_array_equal(client.read(coded.code), kept)
        references.confirm("a", client.name)
    assert forms == [2, 1, 3]  # given, held, renewed
    references.forget("a")
    assert references.code("a", "s", base).code[0] == 2
    references.confirm("a", None)
    assert references.code("a", "s", base).code[0] == 2
    assert references.code("a", "another size", base).code[0] == 0


def test_reference_is_the_majority():
    references, client, base = MaskReferences(SIZES), Receiver(), mask(0)
    outliers = [base, near(base, 30, 1), near(base, 30, 2)]
    references.renew(1, [("s", kept) for kept in outliers])
    client.read(references.code("a", "s", base).code)
    counts = np.sum(outliers, axis=0)
    np.testing.assert_array_equal(client.held.kept(), counts >= 2)


def test_returning_clients_cost_little_and_drift_is_followed():
    """Each round 2 % of the kept weights flip; against a reference that stands still the price would rise."""
    references, client, kept = MaskReferences(SIZES), Receiver(), mask(0)
    shares = []
    for server_round in range(1, 61):
        kept = near(kept, 4, server_round)
        references.renew(server_round, [("s", kept)])
        coded = references.code("a", "s", kept)
        np.testing.assert_array_equal(client.read(coded.code), kept)
        references.confirm("a", client.name)
        shares.append(len(coded.code) / coded.alone)
    assert shares[0] < 1.1
    assert np.mean(shares[1:]) < 0.3
    assert max(shares[1:]) < 0.5


def test_a_reference_from_too_long_ago_is_no_longer_kept():
    references, forms = MaskReferences(SIZES), {}
    for number in range(KEPT_PER_SIZE + 5):
        kept = mask(number)
        references.renew(number + 1, [("s", kept)])
        references.confirm(str(number), Reference.of(kept).name)
    for number in range(KEPT_PER_SIZE + 5):
        forms[number] = references.code(str(number), "s", near(mask(number), 1, 0)).code[0]
    assert [number for number, form in forms.items() if form == 2] == list(range(5))


def test_references_that_nobody_holds_are_dropped():
    references = MaskReferences(SIZES)
    for number in range(5):
        references.renew(number + 1, [("s", mask(number))])
    references.confirm("a", Reference.of(mask(0)).name)
    assert references.code("a", "s", mask(0)).code[0] == 2


def test_rare_visits_make_rare_references():
    references = MaskReferences(SIZES, visits=24)  # one in three rounds
    names = []
    for server_round in range(1, 8):
        references.renew(server_round, [("s", mask(server_round))])
        client = Receiver()
        client.read(references.code("new", "s", mask(server_round)).code)
        names.append(client.name)
    assert names == [Reference.of(mask(number)).name for number in (1, 1, 1, 4, 4, 4, 7)]
    references.renew(8, [("first seen between named rounds", mask(8))])
    assert references.code("b", "first seen between named rounds", mask(8)).code[0] == 2


def test_full_masks_need_no_reference():
    references, full = MaskReferences(SIZES), np.ones(sum(SIZES), bool)
    references.renew(1, [("s", full)])
    assert len(references.code("a", "s", full).code) == 2


@pytest.mark.parametrize("told", [None, "text", 1.5, -1, 2**40])
def test_what_a_client_claims_is_not_trusted(told):
    references = MaskReferences(SIZES)
    references.renew(1, [("s", mask(0))])
    references.confirm("a", told)
    assert references.code("a", "s", mask(0)).code[0] == 2


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 40), st.sampled_from(["served", "lost", "restarted"])), max_size=12
    )
)
def test_masks_arrive_exactly_whatever_happens(steps):
    """Clients come, miss messages and forget; a message is always readable by a client that told what it holds."""
    references, kept = MaskReferences(SIZES), mask(0)
    clients = [Receiver() for _ in range(3)]
    for server_round, (index, flips, fate) in enumerate(steps, start=1):
        kept = near(kept, flips, server_round)
        references.renew(server_round, [("s", kept)])
        client, name = clients[index], str(index)
        if fate == "restarted":
            client.held = None
            references.confirm(name, client.name)
        coded = references.code(name, "s", kept)
        np.testing.assert_array_equal(client.read(coded.code), kept)
        if fate == "lost":
            references.forget(name)
        else:
            references.confirm(name, client.name)
