"""Norm bound, screening and robust prototypes against slow oracles, with the attacks that they are for."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import framp_core.defence as module
from framp_core.config import DefenceConfig
from framp_core.defence import (
    Defence,
    Verdict,
    agreement,
    combined_prototypes,
    norm,
    pairwise_cosines,
    shortening,
)
from framp_core.deltas import KeptDeltas
from framp_core.packed_mask import PackedMask
from framp_core.prototypes import PrototypeBank, Prototypes

CLIENTS, SIZE = 10, 4000
ALL = np.ones(CLIENTS, bool)


def cohort(seed: int, liars: int = 0, noise: float = 1.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Dense deltas and masks of clients that share a direction below their noise; the first ones send its opposite."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=SIZE)
    masks = [rng.random(SIZE) < density for density in np.resize([0.2, 0.6, 1.0], CLIENTS)]
    signs = [-1 if index < liars else 1 for index in range(CLIENTS)]
    deltas = [
        (sign * (direction + noise * rng.normal(size=SIZE)) * mask).astype(np.float32)
        for sign, mask in zip(signs, masks, strict=True)
    ]
    return deltas, masks


def cosine_by_hand(one: np.ndarray, other: np.ndarray, common: np.ndarray) -> float:
    a, b = one[common].astype(float), other[common].astype(float)
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else math.nan


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 30), st.sampled_from([1, 7, 2**24]))
def test_cosines_are_over_what_both_hold(seed: int, clients: int, size: int, group: int) -> None:
    rng = np.random.default_rng(seed)
    masks = [rng.random(size) < 0.5 for _ in range(clients)]
    kept = [rng.normal(size=mask.sum()).astype(np.float32) * rng.integers(0, 2) for mask in masks]
    deltas = KeptDeltas(kept, [PackedMask.of(mask) for mask in masks])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_FLOATS", group)
        found = pairwise_cosines(deltas, masks)
    expected = [
        [cosine_by_hand(one, other, mine & its) for other, its in zip(deltas, masks, strict=True)]
        for one, mine in zip(deltas, masks, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_long_deltas_are_cut_to_a_multiple_of_the_median() -> None:
    """Lengths 1, 2, 3, 100: the lower middle one is 2, so that twice the median is 4."""
    assert shortening([100.0, 1.0, 3.0, 2.0], 2.0) == [4 / 100, 1.0, 1.0, 1.0]
    assert shortening([5.0, 500.0], 1.0) == [1.0, 5 / 500]
    assert shortening([0.0, 0.0, 7.0], 3.0) == [1.0, 1.0, 0.0]
    assert shortening([], 2.0) == []


@given(arrays(np.float32, st.integers(0, 50), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_the_length_neither_overflows_nor_depends_on_a_library(delta: np.ndarray) -> None:
    assert norm(delta) == pytest.approx(math.sqrt(math.fsum(float(x) ** 2 for x in delta)), rel=1e-12)


@pytest.mark.parametrize("liars", [1, 2, 3])
def test_those_who_go_the_other_way_are_told_apart(liars: int) -> None:
    for seed in range(5):
        found = agreement(pairwise_cosines(*cohort(seed, liars)), 0.2, ALL)
        assert max(found[:liars]) < 0 < 0.5 < min(found[liars:])


def test_noise_agrees_with_nobody() -> None:
    deltas, masks = cohort(0)
    deltas[0] = np.random.default_rng(1).normal(size=SIZE).astype(np.float32) * masks[0]
    found = agreement(pairwise_cosines(deltas, masks), 0.2, ALL)
    assert abs(found[0]) < 0.3 < 0.5 < min(found[1:])


def test_two_liars_cannot_vouch_for_each_other() -> None:
    """Orthogonal to the rest and equal to each other: of nine cosines one is 1 and eight are 0."""
    cosines = np.full((CLIENTS, CLIENTS), 0.1)
    cosines[:2, :], cosines[:, :2] = 0.0, 0.0
    cosines[:2, :2] = 1.0
    np.fill_diagonal(cosines, 1.0)
    assert agreement(cosines, 0.2, ALL)[:2].tolist() == [0.0, 0.0]
    untrimmed = agreement(cosines, 0.0, ALL)
    assert untrimmed[:2] == pytest.approx([1.0, 1.0])  # (1 / 9) / (7 * 0.1 / 9), cut to 1


def test_nobody_stands_out_where_there_is_nothing_to_stand_out_from() -> None:
    equal, all_six = np.ones((6, 6)), np.ones(6, bool)
    assert agreement(equal, 0.2, all_six).tolist() == [1.0] * 6
    for undecided in (-equal, np.full((6, 6), np.nan)):
        assert np.isnan(agreement(undecided, 0.2, all_six)).all()
    assert np.isnan(agreement(equal, 0.2, np.arange(6) < 3)).all()
    assert agreement(equal, 0.2, np.arange(6) < 4).tolist() == [1.0] * 6


def test_known_liars_are_no_reference() -> None:
    """With five of ten nobody can tell who lies, unless two of the five were found before."""
    cosines = pairwise_cosines(*cohort(0, liars=5))
    blind = agreement(cosines, 0.2, ALL)
    assert np.isnan(blind).all() or blind[:5].max() > 0
    seeing = agreement(cosines, 0.2, np.arange(CLIENTS) > 1)
    assert max(seeing[:5]) < 0 < 0.5 < min(seeing[5:])


def test_one_who_shares_no_weight_with_the_others_is_left_alone() -> None:
    deltas, masks = cohort(0)
    masks = [mask & (np.arange(SIZE) > 0) for mask in masks]
    masks[3] = np.arange(SIZE) == 0
    deltas = [delta * mask for delta, mask in zip(deltas, masks, strict=True)]
    names = [str(index) for index in range(CLIENTS)]
    defence = Defence(DefenceConfig(screening="cosine"))
    verdict = defence.judge(names, deltas, masks, [norm(delta) for delta in deltas])[3]
    assert (verdict.agreement, verdict.screened) == (1.0, False)
    assert "3" not in defence.agreements


def test_agreement_is_remembered_and_screened_by() -> None:
    defence = Defence(DefenceConfig(screening="cosine", screening_threshold=0.5, screening_memory=0.75))
    names = [f"client-{index}" for index in range(CLIENTS)]

    def judged(liars: int) -> list[Verdict]:
        deltas, masks = cohort(0, liars)
        return defence.judge(names, deltas, masks, [norm(delta) for delta in deltas])

    honest = judged(0)[0].agreement
    assert honest is not None
    now = float(agreement(pairwise_cosines(*cohort(0, 1)), 0.2, ALL)[0])
    turned = judged(1)
    assert turned[0].agreement == pytest.approx(0.75 * honest + 0.25 * now)
    assert [verdict.screened for verdict in turned] == [True] + [False] * (CLIENTS - 1)
    assert defence.agreements[names[0]] == turned[0].agreement


def test_without_settings_nothing_is_done() -> None:
    defence = Defence(DefenceConfig())
    deltas, masks = cohort(0, 2)
    assert defence.judge([str(i) for i in range(CLIENTS)], deltas, masks, [1.0] * CLIENTS) == [Verdict()] * CLIENTS
    assert defence.agreements == {}
    local = [prototypes({0: [1.0]}), prototypes({1: [2.0]})]
    assert defence.prototypes(local) == local


def prototypes(means: dict[int, list[float]], counts: dict[int, int] | None = None) -> Prototypes:
    classes = sorted(means)
    return Prototypes(
        np.array(classes, np.int64),
        np.array([(counts or {}).get(label, 1) for label in classes], np.int64),
        np.array([means[label] for label in classes], np.float32).reshape(len(classes), -1),
    )


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 0.4]))
def test_combined_prototypes_class_by_class_and_number_by_number(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    local = []
    for _ in range(rng.integers(1, 7)):
        held = np.flatnonzero(rng.random(4) < 0.6)
        local.append(Prototypes(held, rng.integers(1, 9, held.size), rng.normal(size=(held.size, 3)).astype("f4")))
    for rule in ("median", "trimmed-mean"):
        found = combined_prototypes(local, rule, share)  # type: ignore[arg-type]
        for label in range(4):
            sent = [(each.means[i], each.counts[i]) for each in local for i in np.flatnonzero(each.classes == label)]
            assert (label in found.classes) == bool(sent)
            if not sent:
                continue
            (place,) = np.flatnonzero(found.classes == label)
            assert found.counts[place] == sum(count for _, count in sent)
            for coordinate in range(3):
                ordered = sorted(float(mean[coordinate]) for mean, _ in sent)
                cut = int(share * len(ordered)) if rule == "trimmed-mean" else (len(ordered) - 1) // 2
                left = ordered[cut : len(ordered) - cut]
                assert found.means[place, coordinate] == pytest.approx(sum(left) / len(left), abs=1e-6)


def test_a_poisoned_prototype_moves_the_mean_and_not_the_median() -> None:
    honest = [prototypes({0: [value]}) for value in (0.9, 1.0, 1.1, 1.2)]
    local = [*honest, prototypes({0: [-100.0]}, {0: 50})]

    def learnt(rule: str) -> float:
        bank = PrototypeBank(classes=2, feature_size=1, decay=0.0)
        bank.update(Defence(DefenceConfig(prototypes=rule)).prototypes(local))  # type: ignore[arg-type]
        return float(bank.means[0, 0])

    assert learnt("mean") == pytest.approx((4.2 - 5000) / 54, rel=1e-5)
    assert learnt("median") == pytest.approx(1.0)
    assert learnt("trimmed-mean") == pytest.approx((0.9 + 1.0 + 1.1) / 3)
